"""Squared distance of the predicted probabilities from the labels, in place of cross-entropy."""

from __future__ import annotations

from typing import ClassVar, final

from torch import Tensor

from soteacher.errors import InputError
from soteacher.mixing import mixed_labels
from soteacher.objective import Method, Objective, ObjectiveConfig
from soteacher.precision import at_least_float32
from soteacher.types import Step, Task


def squared_label_distance(logits: Tensor, soft_labels: Tensor) -> Tensor:
    r"""Squared distance of the predictions from the labels, one value per example: the Brier score.

    .. math:: \lVert \sigma(z) - q \rVert_2^2 = \sum_k (\sigma(z)_k - q_k)^2

    Over all functions of the input it is least at the true label distribution :math:`p^*`, because the label's own
    scatter does not depend on the prediction :math:`p`:

    .. math:: E \lVert p(x) - e_y \rVert^2 = E \lVert p(x) - p^*(x) \rVert^2 + E [1 - \lVert p^*(x) \rVert^2]

    Cross-entropy has the same minimiser; what differs is how far from it a network is allowed to stay, and where. From
    a constant prediction the gradient is 2 / K of that of cross-entropy, so that with many classes it starts slowly.

    Args:
        logits: ``[B, K]``; gradients flow.
        soft_labels: ``[B, K]`` distributions :math:`q`, one-hot for labels; a constant.

    Returns:
        ``[B]``, in [0, 2], float32 (float64 from float64 logits).

    Raises:
        InputError: the shapes differ or are not ``[B, K]``.

    Source: Hamidi, Deng, Tan, Ye and Salamah, ECCV 2024, arXiv:2407.18041. That they sum over the classes is from
    memory of the paper, not checked.
    """
    if logits.ndim != 2 or logits.shape != soft_labels.shape:
        raise InputError(
            "a squared distance needs logits and soft labels of one shape [B, K], got "
            f"{list(logits.shape)} and {list(soft_labels.shape)}"
        )
    predictions = at_least_float32(logits).softmax(dim=-1)
    return (predictions - soft_labels.detach()).square().sum(dim=-1)


class MSEConfig(ObjectiveConfig):
    """Settings of :class:`MSE`."""

    takes_mixtures: ClassVar[bool] = True

    def build(self, task: Task) -> MSE:
        """Return the objective; it needs nothing from the task."""
        del task
        return MSE(self)


@final
class MSE(Objective[Step]):
    """Fit the labels, or the mixed ones of blended images; see :func:`squared_label_distance`."""

    name = "mse"

    def __init__(self, config: MSEConfig) -> None:
        super().__init__()
        self.config = config

    def forward(self, step: Step) -> Tensor:
        """Return the mean squared distance of the batch."""
        logits = step.outputs.logits
        labels = mixed_labels(step.labels, step.mixture, num_classes=logits.shape[1])
        return squared_label_distance(logits, labels).mean()


METHOD = Method(
    name="mse",
    role="teacher",
    title="Squared distance of the probabilities from the labels in place of cross-entropy",
    venue="ECCV 2024",
    source="Hamidi, Deng, Tan, Ye and Salamah, ECCV 2024, arXiv:2407.18041",
    differs=(
        "The released code never takes the branch that this loss is in and trains with cross-entropy; the branch would "
        "compare logits, not probabilities, with the labels, and take the mean over the classes. Here it is the "
        "squared norm of the difference of probabilities, with weight 1."
    ),
    terms={"mse": {"weight": 1.0}},
)
