"""Information theoretic representation distillation: correlated features, and the batch's geometry kept."""

from __future__ import annotations

import math
from typing import final

import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from soteacher.errors import InputError
from soteacher.objective import Method, Objective
from soteacher.objectives.features import FeatureConfig, TapPair
from soteacher.objectives.pooled import pair_vectors, vector_pair
from soteacher.precision import at_least_float32, full_precision
from soteacher.types import DistillStep, Task

EPSILON = 1e-8
"""Added to variances, whose root has no gradient at 0."""


def correlation_gap(student: Tensor, teacher: Tensor, *, order: float) -> Tensor:
    r"""How far the features of two networks are from being correlated one by one.

    With :math:`c_d = \frac{1}{B} \sum_b \hat s_{bd} \hat t_{bd}` of features that have mean 0 and sample standard
    deviation 1 over the batch:

    .. math:: \log_2 \sum_d |c_d - 1|^{2 \alpha}

    Args:
        student: ``[B, D]``; gradients flow.
        teacher: ``[B, D]``; a constant.
        order: Rényi's :math:`\alpha > 0`.

    Returns:
        A scalar in bits: :math:`\log_2 D` without correlation. It is finite: with sample deviations :math:`c_d` is at
        most :math:`(B - 1) / B`.

    Raises:
        InputError: the shapes differ or are not ``[B, D]``, or ``order`` is not positive and finite.

    Source: Miles, Lopez-Rodriguez and Mikolajczyk, BMVC 2022, arXiv:2112.00459, the correlation loss, as released.
    """
    _check_vectors(student, teacher)
    if not order > 0 or not math.isfinite(order):
        raise InputError(f"order must be positive and finite, got {order}")
    correlation = (_standardized(student) * _standardized(teacher.detach())).mean(dim=0)
    return (correlation - 1).abs().pow(2 * order).sum().log2()


def mutual_information_gap(student: Tensor, teacher: Tensor) -> Tensor:
    r"""How much of the student's geometry within the batch is not the teacher's too.

    With the matrices of cosines :math:`G_s` and :math:`G_t`, and their elementwise product :math:`G_{st}`:

    .. math:: \frac{1}{B^2} \left( \lVert G_s \rVert_F^2 - \lVert G_{st} \rVert_F^2 \right)

    Args:
        student: ``[B, D]``; gradients flow.
        teacher: ``[B, E]``; a constant.

    Returns:
        A scalar, at least 0; 0 where any two examples are orthogonal in the student or parallel in the teacher.

    Raises:
        InputError: not ``[B, D]`` and ``[B, E]``.

    Source: Miles, Lopez-Rodriguez and Mikolajczyk, BMVC 2022, arXiv:2112.00459, the mutual information loss of order
    2, as released: without logarithms. The traces by which the matrices are divided there are both :math:`B`.
    """
    if student.ndim != 2 or teacher.ndim != 2 or len(student) != len(teacher):
        raise InputError(f"wanted features [B, D] and [B, E], got {list(student.shape)} and {list(teacher.shape)}")
    with full_precision(student):
        own, other = _cosines(student), _cosines(teacher.detach())
    return (own.square() - (own * other).square()).mean()


def _check_vectors(student: Tensor, teacher: Tensor) -> None:
    if student.ndim != 2 or student.shape != teacher.shape:
        raise InputError(
            f"student and teacher must have one shape [B, D], got {list(student.shape)} and {list(teacher.shape)}"
        )


def _standardized(features: Tensor) -> Tensor:
    """Return features of mean 0 and sample deviation 1 over the batch; 0 where they are constant."""
    centred = at_least_float32(features) - at_least_float32(features).mean(dim=0)
    variance = centred.square().sum(dim=0) / max(len(features) - 1, 1)
    return centred * (variance + EPSILON).rsqrt()


def _cosines(features: Tensor) -> Tensor:
    directions = F.normalize(at_least_float32(features), dim=1)
    return directions @ directions.T


class ITRDConfig(FeatureConfig):
    """Settings of :class:`ITRD`."""

    default_taps = "pooled"
    correlation_weight: float = Field(default=2.0, ge=0)
    """Factor of the correlation gap."""
    information_weight: float = Field(default=1.0, ge=0)
    """Factor of the mutual information gap."""
    order: float = Field(default=1.01, gt=0)
    """Rényi's order in the correlation gap."""

    def build(self, task: Task) -> ITRD:
        """Return the objective with its embedding of the student's features."""
        return ITRD(self, vector_pair(self, task, "itrd"))


@final
class ITRD(Objective[DistillStep]):
    """Correlate features, and keep the batch's geometry; :func:`correlation_gap`, :func:`mutual_information_gap`."""

    name = "itrd"

    def __init__(self, config: ITRDConfig, pair: TapPair) -> None:
        super().__init__()
        self.config, self.pair = config, pair
        self.features, self.teacher_features = (pair.student,), (pair.teacher,)
        self.embedding = nn.Linear(pair.student_shape[0], pair.teacher_shape[0])

    def forward(self, step: DistillStep) -> Tensor:
        """Return the weighted sum of both gaps."""
        student, teacher = pair_vectors(step, self.pair)
        with full_precision(student):
            embedded: Tensor = self.embedding(student)
        # As released: the geometry is that of the student's own features where they have the teacher's size.
        placed = student if self.pair.student_shape == self.pair.teacher_shape else embedded
        return self.config.correlation_weight * correlation_gap(
            embedded, teacher, order=self.config.order
        ) + self.config.information_weight * mutual_information_gap(placed, teacher)


METHOD = Method(
    name="itrd",
    role="student",
    title="Information theoretic distillation: correlated features, and the batch's geometry kept",
    venue="BMVC 2022",
    source="Miles, Lopez-Rodriguez and Mikolajczyk, BMVC 2022, arXiv:2112.00459; settings as released",
    terms={"cross_entropy": {"weight": 1.0}, "itrd": {"weight": 1.0}},
)
