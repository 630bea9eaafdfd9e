"""SRD: a linear projector, normalisation over the batch, and a distance that looks at the largest differences."""

from __future__ import annotations

import math
from typing import final

from pydantic import Field
from torch import Tensor, nn

from soteacher.errors import InputError
from soteacher.objective import Method, Objective
from soteacher.objectives.features import FeatureConfig, TapPair
from soteacher.objectives.pooled import pair_vectors, vector_pair
from soteacher.precision import at_least_float32, full_precision
from soteacher.types import DistillStep, Task

VARIANCE_EPSILON = 1e-4
"""Added to variances, as in the authors' normalisation."""
SUM_EPSILON = 1e-5
"""Added to the sum: the logarithm of 0 is not finite."""


def log_power_distance(student: Tensor, teacher: Tensor, *, exponent: float) -> Tensor:
    r"""Logarithm of the summed powers of differences between features that are normalised over the batch.

    .. math:: \log \left( \sum_{b,d} |\hat s_{bd} - \hat t_{bd}|^\alpha + \epsilon \right)

    with features of mean 0 and variance 1, :math:`\hat x = (x - \bar x) / \sqrt{\mathrm{var}(x) + 10^{-4}}`, and
    :math:`\epsilon = 10^{-5}`. A large :math:`\alpha` weakens the small differences that a small student cannot help.

    Args:
        student: ``[B, D]``; gradients flow.
        teacher: ``[B, D]``; a constant.
        exponent: :math:`\alpha \ge 1`.

    Returns:
        A scalar, negative where the two nearly agree: at least :math:`\log \epsilon = -11.5`.

    Raises:
        InputError: the shapes differ or are not ``[B, D]``, or ``exponent`` is below 1 or not finite.

    Source: Miles and Mikolajczyk, AAAI 2024, arXiv:2303.11098, LogSum, as released for ImageNet; :math:`\epsilon` is
    that of the released code for transformers.
    """
    if student.ndim != 2 or student.shape != teacher.shape:
        raise InputError(
            f"student and teacher must have one shape [B, D], got {list(student.shape)} and {list(teacher.shape)}"
        )
    if not exponent >= 1 or not math.isfinite(exponent):
        raise InputError(f"exponent must be at least 1 and finite, got {exponent}")
    difference = _normalized(student) - _normalized(teacher.detach())
    return (difference.abs().pow(exponent).sum() + SUM_EPSILON).log()


def _normalized(features: Tensor) -> Tensor:
    features = at_least_float32(features)
    centred = features - features.mean(dim=0)
    return centred * (centred.square().mean(dim=0) + VARIANCE_EPSILON).rsqrt()


class SRDConfig(FeatureConfig):
    """Settings of :class:`SRD`."""

    default_taps = "pooled"
    exponent: float = Field(default=4.0, ge=1)
    """The power of the differences; see :func:`log_power_distance`."""

    def build(self, task: Task) -> SRD:
        """Return the objective with its projector."""
        return SRD(self, vector_pair(self, task, "srd"))


@final
class SRD(Objective[DistillStep]):
    """Match normalised features behind a linear projector; see :func:`log_power_distance`."""

    name = "srd"

    def __init__(self, config: SRDConfig, pair: TapPair) -> None:
        super().__init__()
        self.config, self.pair = config, pair
        self.features, self.teacher_features = (pair.student,), (pair.teacher,)
        self.projector = nn.Linear(pair.student_shape[0], pair.teacher_shape[0])

    def forward(self, step: DistillStep) -> Tensor:
        """Return the distance over the batch."""
        student, teacher = pair_vectors(step, self.pair)
        with full_precision(student):
            projected: Tensor = self.projector(student)
        return log_power_distance(projected, teacher, exponent=self.config.exponent)


METHOD = Method(
    name="srd",
    role="student",
    title="Normalised features behind a linear projector, with an eye on the largest differences",
    venue="AAAI 2024",
    source="Miles and Mikolajczyk, AAAI 2024, arXiv:2303.11098; weights as released for ImageNet",
    differs="The authors' settings for CIFAR-100 are not released; those of their ImageNet code stand in.",
    terms={
        "cross_entropy": {"weight": 1.0},
        "kd": {"weight": 1.0, "temperature": 1.0},
        "srd": {"weight": 2.0},
    },
)
