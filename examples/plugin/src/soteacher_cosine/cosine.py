"""Distillation by the direction of the feature in front of the classifier."""

from __future__ import annotations

from typing import final

import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from soteacher.errors import InputError
from soteacher.objective import Method, Objective
from soteacher.objectives.features import FeatureConfig, TapPair, as_vectors
from soteacher.precision import full_precision
from soteacher.types import DistillStep, Task


def cosine_distance(student_feature: Tensor, teacher_feature: Tensor, *, epsilon: float = 1e-6) -> Tensor:
    r"""One minus the cosine of the angle between two vectors, one value per example.

    .. math:: 1 - \frac{s^\top t}{\max(\|s\| \|t\|, \epsilon)}

    Args:
        student_feature: ``[B, D]``; gradients flow.
        teacher_feature: ``[B, D]``; a constant.
        epsilon: least product of the lengths, so that a vector of zeros has distance 1.

    Returns:
        ``[B]``, in [0, 2]; 0 where the directions agree.

    Raises:
        InputError: the shapes differ or are not ``[B, D]``.
    """
    if student_feature.ndim != 2 or student_feature.shape != teacher_feature.shape:
        raise InputError(
            f"features must have one shape [B, D], got {list(student_feature.shape)} (student) and "
            f"{list(teacher_feature.shape)} (teacher)"
        )
    return 1 - F.cosine_similarity(student_feature, teacher_feature.detach(), dim=1, eps=epsilon)


class CosineConfig(FeatureConfig):
    """Settings of :class:`Cosine`."""

    default_taps = "pooled"
    hidden_factor: float = Field(default=1.0, gt=0)
    """Width of the bridge's inner layer, as a multiple of the teacher's feature."""

    def build(self, task: Task) -> Cosine:
        """Return the objective with a bridge from the student's feature to the teacher's."""
        return Cosine(self, self.pairs(task))


@final
class Cosine(Objective[DistillStep]):
    """Turn the student's last feature, behind a small bridge, towards the teacher's; see :func:`cosine_distance`."""

    name = "cosine"

    def __init__(self, config: CosineConfig, pairs: tuple[TapPair, ...]) -> None:
        super().__init__()
        if len(pairs) != 1:
            raise InputError(f"cosine compares one feature, got {len(pairs)} taps")
        self.pair = pairs[0]
        self.features = (self.pair.student,)
        self.teacher_features = (self.pair.teacher,)
        (inputs,), (outputs,) = self.pair.student_shape[:1], self.pair.teacher_shape[:1]
        hidden = max(1, round(config.hidden_factor * outputs))
        self.bridge = nn.Sequential(nn.Linear(inputs, hidden), nn.ReLU(), nn.Linear(hidden, outputs))

    def forward(self, step: DistillStep) -> Tensor:
        """Return the mean distance of the batch."""
        feature = as_vectors(step.outputs.features[self.pair.student])
        with full_precision(feature):
            bridged = self.bridge(feature)
        return cosine_distance(bridged, as_vectors(step.teacher.features[self.pair.teacher])).mean()


METHOD = Method(
    name="cosine",
    role="student",
    title="Labels, and the direction of the feature in front of the classifier",
    source="an example, nobody's published method",
    terms={"cross_entropy": {}, "cosine": {"weight": 2.0}},
)
