"""Consistency regularisation: predictions stay near the mean of the example's own earlier ones."""

from __future__ import annotations

from typing import final

import torch
from torch import Tensor

from soteacher.errors import InputError
from soteacher.objective import Objective, ObjectiveConfig, Ramp
from soteacher.objectives.prediction_memory import take_in_predictions
from soteacher.precision import at_least_float32
from soteacher.types import Step, Task


def squared_distance(predictions: Tensor, average: Tensor, count: Tensor) -> Tensor:
    r"""Squared distance of predictions from an average of earlier ones, one value per example.

    .. math:: [n_i > 0] \, \sum_k (p_{ik} - a_{ik})^2

    Args:
        predictions: ``[B, K]`` probabilities; gradients flow.
        average: ``[B, K]`` averages of each example's earlier predictions; a constant.
        count: ``[B]`` how many predictions each average holds; an example without any has distance 0.

    Returns:
        ``[B]``, in [0, 2].

    Raises:
        InputError: the shapes do not fit.

    Source: Dong, Liu and Shang, ICLR 2024, arXiv:2206.06661, consistency regularisation, after the temporal ensembling
    of Laine and Aila 2017, arXiv:1610.02242.
    """
    if predictions.ndim != 2 or predictions.shape != average.shape or count.shape != predictions.shape[:1]:
        raise InputError(
            "consistency needs predictions and averages of one shape [B, K] and counts [B], got "
            f"{list(predictions.shape)}, {list(average.shape)} and {list(count.shape)}"
        )
    distance = (predictions - average.detach()).square().sum(dim=-1)
    return torch.where(count > 0, distance, 0.0)


def running_mean(mean: Tensor, value: Tensor, count: Tensor) -> Tensor:
    r"""Mean of :math:`n + 1` values, from the mean of the first :math:`n` and the last value, for each example.

    .. math:: m + (v - m) / (n + 1)

    Args:
        mean: ``[B, K]``; ignored in rows whose count is 0, as long as it is finite.
        value: ``[B, K]``.
        count: ``[B]`` integers :math:`n \ge 0`.

    Returns:
        ``[B, K]``.

    Raises:
        InputError: the shapes do not fit.
    """
    if mean.ndim != 2 or mean.shape != value.shape or count.shape != mean.shape[:1]:
        raise InputError(
            "a running mean needs means and values of one shape [B, K] and counts [B], got "
            f"{list(mean.shape)}, {list(value.shape)} and {list(count.shape)}"
        )
    return mean + (value - mean) / (count + 1).unsqueeze(-1)


class ConsistencyConfig(ObjectiveConfig):
    """Settings of :class:`Consistency`."""

    ramp: Ramp = "linear"
    """How the weight grows over the run; early averages deserve little trust."""

    def build(self, task: Task) -> Consistency:
        """Return the objective with an empty memory, one row for each training example."""
        return Consistency(self, task)


@final
class Consistency(Objective[Step]):
    """Stay near the mean of all earlier predictions for the same example; see :func:`squared_distance`.

    The mean is the true one, as in the paper; ``consistency_released`` has that of the authors' code. The memory takes
    4 N K bytes: 20 MB for CIFAR-100, 5 GB for ImageNet. No example may occur twice in one step.
    """

    name = "consistency"
    average: Tensor
    """``[N, K]`` float32 mean of each example's earlier predictions."""
    count: Tensor
    """``[N]`` int64 number of them."""

    def __init__(self, config: ConsistencyConfig, task: Task) -> None:
        super().__init__()
        self.config = config
        self.register_buffer("average", torch.zeros(task.num_examples, task.num_classes, dtype=torch.float32))
        self.register_buffer("count", torch.zeros(task.num_examples, dtype=torch.int64))

    def forward(self, step: Step) -> Tensor:
        """Return the mean squared distance of the batch, from the averages before this step."""
        predictions = at_least_float32(step.outputs.logits).softmax(dim=-1)
        average, count = self.average.index_select(0, step.indices), self.count.index_select(0, step.indices)
        return squared_distance(predictions, average, count).mean()

    def update(self, step: Step) -> None:
        """Take this step's predictions into the averages of its examples."""
        take_in_predictions(self.average, self.count, step, running_mean)
