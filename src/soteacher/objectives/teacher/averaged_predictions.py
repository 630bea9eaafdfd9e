"""Self-distillation on the mean of the example's own earlier predictions: the control of ``consistency``."""

from __future__ import annotations

from typing import final

import torch
from torch import Tensor

from soteacher.errors import InputError
from soteacher.objective import Method, Objective, ObjectiveConfig, Ramp
from soteacher.objectives.prediction_memory import take_in_predictions
from soteacher.objectives.teacher.consistency import running_mean
from soteacher.precision import at_least_float32
from soteacher.types import Step, Task


def cross_entropy_with_average(logits: Tensor, average: Tensor, count: Tensor) -> Tensor:
    r"""Cross-entropy of predictions with an average of earlier ones, one value per example.

    .. math:: -[n_i > 0] \, \sum_k a_{ik} \log \sigma(z_i)_k = [n_i > 0] \, (\mathrm{KL}(a_i \| \sigma(z_i)) + H(a_i))

    The entropy :math:`H(a_i)` of the average is a constant: the gradient :math:`\sigma(z_i) - a_i` is that of the
    divergence, and the value at agreement is the entropy, not 0.

    Args:
        logits: ``[B, K]``; gradients flow.
        average: ``[B, K]`` averages of each example's earlier predictions; a constant.
        count: ``[B]`` how many predictions each average holds; an example without any has the value 0.

    Returns:
        ``[B]``, nats, float32 (float64 from float64 logits).

    Raises:
        InputError: the shapes do not fit.

    Source: ours, from the two parts that it joins: the average of Dong, Liu and Shang, ICLR 2024, arXiv:2206.06661, and
    the cross-entropy with soft labels of Hinton et al. 2015, arXiv:1503.02531, at temperature 1.
    """
    if logits.ndim != 2 or logits.shape != average.shape or count.shape != logits.shape[:1]:
        raise InputError(
            "cross-entropy with averages needs logits and averages of one shape [B, K] and counts [B], got "
            f"{list(logits.shape)}, {list(average.shape)} and {list(count.shape)}"
        )
    log_predictions = at_least_float32(logits).log_softmax(dim=-1)
    return torch.where(count > 0, -(average.detach() * log_predictions).sum(dim=-1), 0.0)


class AveragedPredictionsConfig(ObjectiveConfig):
    """Settings of :class:`AveragedPredictions`."""

    ramp: Ramp = "linear"
    """How the weight grows over the run; early averages deserve little trust."""

    def build(self, task: Task) -> AveragedPredictions:
        """Return the objective with an empty memory, one row for each training example."""
        return AveragedPredictions(self, task)


@final
class AveragedPredictions(Objective[Step]):
    """Learn from the mean of all earlier predictions for the same example; see :func:`cross_entropy_with_average`.

    Average, memory and restrictions are those of ``consistency``; only the distance from the average is another one.
    """

    name = "averaged_predictions"
    average: Tensor
    """``[N, K]`` float32 mean of each example's earlier predictions."""
    count: Tensor
    """``[N]`` int64 number of them."""

    def __init__(self, config: AveragedPredictionsConfig, task: Task) -> None:
        super().__init__()
        self.config = config
        self.register_buffer("average", torch.zeros(task.num_examples, task.num_classes, dtype=torch.float32))
        self.register_buffer("count", torch.zeros(task.num_examples, dtype=torch.int64))

    def forward(self, step: Step) -> Tensor:
        """Return the mean cross-entropy of the batch, with the averages before this step."""
        average, count = self.average[step.indices], self.count[step.indices]
        return cross_entropy_with_average(step.outputs.logits, average, count).mean()

    def update(self, step: Step) -> None:
        """Take this step's predictions into the averages of its examples."""
        take_in_predictions(self.average, self.count, step, running_mean)


METHOD = Method(
    name="averaged_predictions",
    role="teacher",
    title="Self-distillation on the mean of each example's earlier predictions, without Lipschitz regularisation",
    source="a control of ours: SoTeacher's average (arXiv:2206.06661) as the label of a cross-entropy",
    terms={
        "cross_entropy": {},
        "averaged_predictions": {"weight": 1.0, "ramp": "linear"},
    },
)
