"""Cross-entropy with the labels: the term that every training has."""

from __future__ import annotations

from typing import ClassVar, final

import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from soteacher.errors import InputError
from soteacher.objective import Objective, ObjectiveConfig
from soteacher.precision import at_least_float32
from soteacher.types import Step, Task


def cross_entropy(logits: Tensor, labels: Tensor, *, label_smoothing: float = 0.0) -> Tensor:
    r"""Cross-entropy of the predictions with the smoothed labels, one value per example.

    .. math:: -\sum_k q_k \log \sigma(z)_k, \qquad q_k = (1 - s) \, [k = y] + s / K

    Args:
        logits: ``[B, K]``; gradients flow.
        labels: ``[B]`` int64 class ids in [0, K). Their values are not checked here: a GPU would have to wait for it.
        label_smoothing: :math:`s` in [0, 1), the share of the label that is spread evenly over all classes.

    Returns:
        ``[B]``, nats, float32 (float64 from float64 logits).

    Raises:
        InputError: the shapes do not fit, the labels are not class ids, or ``label_smoothing`` is outside [0, 1).

    Source: label smoothing by Szegedy et al. 2016, arXiv:1512.00567, section 7.
    """
    if logits.ndim != 2 or labels.shape != logits.shape[:1]:
        raise InputError(
            f"cross-entropy needs logits [B, K] and labels [B], got {list(logits.shape)} and {list(labels.shape)}"
        )
    if labels.is_floating_point():
        raise InputError(f"labels must be integer class ids, got {labels.dtype}")
    if not 0 <= label_smoothing < 1:
        raise InputError(f"label_smoothing must be in [0, 1), got {label_smoothing}")
    return F.cross_entropy(at_least_float32(logits), labels.long(), reduction="none", label_smoothing=label_smoothing)


class CrossEntropyConfig(ObjectiveConfig):
    """Settings of :class:`CrossEntropy`."""

    takes_mixtures: ClassVar[bool] = True

    label_smoothing: float = Field(default=0.0, ge=0, lt=1)
    """Share of the label that is spread evenly over all classes; 0 trains on the label alone."""

    def build(self, task: Task) -> CrossEntropy:
        """Return the objective; it needs nothing from the task."""
        del task
        return CrossEntropy(self)


@final
class CrossEntropy(Objective[Step]):
    r"""Fit the labels; see :func:`cross_entropy`.

    Where images are blended, it is the cross-entropy with both labels by their shares, each smoothed:

    .. math:: \lambda \, \mathrm{CE}(y) + (1 - \lambda) \, \mathrm{CE}(y')
    """

    name = "cross_entropy"

    def __init__(self, config: CrossEntropyConfig) -> None:
        super().__init__()
        self.config = config

    def forward(self, step: Step) -> Tensor:
        """Return the mean cross-entropy of the batch."""
        logits, smoothing = step.outputs.logits, self.config.label_smoothing
        own = cross_entropy(logits, step.labels, label_smoothing=smoothing)
        if step.mixture is None:
            return own.mean()
        other = cross_entropy(logits, step.mixture.labels, label_smoothing=smoothing)
        return (step.mixture.share * own + (1 - step.mixture.share) * other).mean()
