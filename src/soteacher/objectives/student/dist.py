"""DIST: the student's predictions correlate with the teacher's, over the classes and over the batch."""

from __future__ import annotations

from typing import ClassVar, final

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from soteacher.objective import Method, Objective, ObjectiveConfig
from soteacher.objectives.student.class_logits import check_logits, check_positive
from soteacher.precision import at_least_float32
from soteacher.types import DistillStep, Task

EPSILON = 1e-8
"""Added to the product of two deviations, as in the authors' code."""
ROUNDINGS = 8
"""A row that deviates from its mean by less than so many roundings of its size is constant."""


def pearson_distance(first: Tensor, second: Tensor) -> Tensor:
    r"""One minus Pearson's correlation of rows.

    .. math::
        1 - \frac{\langle \tilde a, \tilde b \rangle}{\|\tilde a\| \|\tilde b\| + \epsilon}, \qquad
        \tilde a = a - \bar a, \quad \epsilon = 10^{-8}

    Args:
        first: ``[..., N]``; gradients flow.
        second: of the same shape; gradients flow.

    Returns:
        ``[...]`` in [0, 2]; 0, but for :math:`\epsilon`, where one row is a shifted and scaled copy of the other, 1
        with gradient 0 where a row is constant and says nothing.

    Source: Huang et al., NeurIPS 2022, arXiv:2205.10536, section 4. The authors' code has gradients of the size of
    :math:`1 / \epsilon` at constant rows.
    """
    (centred_first, norm_first), (centred_second, norm_second) = _centred(first), _centred(second)
    products = (centred_first * centred_second).sum(dim=-1)
    # Where a row is constant there is no product, whatever the norms are, and no gradient through them.
    constant = _is_constant(first, norm_first) | _is_constant(second, norm_second)
    return 1 - products.masked_fill(constant, 0.0) / (norm_first * norm_second + EPSILON)


def _centred(rows: Tensor) -> tuple[Tensor, Tensor]:
    centred = rows - rows.mean(dim=-1, keepdim=True)
    return centred, torch.linalg.vector_norm(centred, dim=-1)


@torch.no_grad()
def _is_constant(rows: Tensor, centred_norm: Tensor) -> Tensor:
    """Return where nothing but rounding is left of rows less their means."""
    return centred_norm <= ROUNDINGS * torch.finfo(rows.dtype).eps * torch.linalg.vector_norm(rows, dim=-1)


def inter_class_distance(student_logits: Tensor, teacher_logits: Tensor, *, temperature: float) -> Tensor:
    r"""Distance of an example's probabilities in how the classes relate, one value per example.

    .. math:: \tau^2 \left(1 - \rho(p_{s,i\cdot}, p_{t,i\cdot})\right), \qquad p = \sigma(z / \tau)

    Args:
        student_logits: ``[B, K]``; gradients flow.
        teacher_logits: ``[B, K]``; a constant.
        temperature: :math:`\tau > 0`, dimensionless.

    Returns:
        ``[B]`` in :math:`[0, 2 \tau^2]`, float32 (float64 from float64 logits).

    Raises:
        InputError: the shapes differ, or ``temperature`` is not positive and finite.

    Source: Huang et al., NeurIPS 2022, arXiv:2205.10536, section 4.
    """
    return temperature**2 * pearson_distance(*_probabilities(student_logits, teacher_logits, temperature))


def intra_class_distance(student_logits: Tensor, teacher_logits: Tensor, *, temperature: float) -> Tensor:
    r"""Distance of a class's probabilities in how the batch's examples relate, one value per class.

    .. math:: \tau^2 \left(1 - \rho(p_{s,\cdot k}, p_{t,\cdot k})\right), \qquad p = \sigma(z / \tau)

    Args:
        student_logits: ``[B, K]``; gradients flow.
        teacher_logits: ``[B, K]``; a constant.
        temperature: :math:`\tau > 0`, dimensionless.

    Returns:
        ``[K]`` in :math:`[0, 2 \tau^2]`, float32 (float64 from float64 logits); :math:`\tau^2` for a batch of one.

    Raises:
        InputError: the shapes differ, or ``temperature`` is not positive and finite.

    Source: Huang et al., NeurIPS 2022, arXiv:2205.10536, section 4.
    """
    student, teacher = _probabilities(student_logits, teacher_logits, temperature)
    return temperature**2 * pearson_distance(student.transpose(0, 1), teacher.transpose(0, 1))


def _probabilities(student_logits: Tensor, teacher_logits: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    check_logits(student_logits, teacher_logits)
    check_positive(temperature=temperature)
    student, teacher = at_least_float32(student_logits), at_least_float32(teacher_logits.detach())
    return F.softmax(student / temperature, dim=1), F.softmax(teacher / temperature, dim=1)


def dist_distance(
    student_logits: Tensor,
    teacher_logits: Tensor,
    *,
    temperature: float,
    inter_class_weight: float,
    intra_class_weight: float,
) -> Tensor:
    r"""Weighted sum of the mean distances over the examples and over the classes.

    .. math::
        \tau^2 \left[\frac{\beta}{B} \sum_i (1 - \rho(p_{s,i\cdot}, p_{t,i\cdot}))
        + \frac{\gamma}{K} \sum_k (1 - \rho(p_{s,\cdot k}, p_{t,\cdot k}))\right]

    Args:
        student_logits: ``[B, K]``; gradients flow.
        teacher_logits: ``[B, K]``; a constant.
        temperature: :math:`\tau > 0`, dimensionless.
        inter_class_weight: :math:`\beta > 0`; see :func:`inter_class_distance`.
        intra_class_weight: :math:`\gamma > 0`; see :func:`intra_class_distance`.

    Returns:
        A scalar, float32 (float64 from float64 logits).

    Raises:
        InputError: the shapes differ, or a number is not positive and finite.

    Source: Huang et al., NeurIPS 2022, arXiv:2205.10536, section 4.
    """
    check_positive(inter_class_weight=inter_class_weight, intra_class_weight=intra_class_weight)
    student, teacher = _probabilities(student_logits, teacher_logits, temperature)
    examples = pearson_distance(student, teacher).mean()
    classes = pearson_distance(student.transpose(0, 1), teacher.transpose(0, 1)).mean()
    return temperature**2 * (inter_class_weight * examples + intra_class_weight * classes)


class DISTConfig(ObjectiveConfig):
    """Settings of :class:`DIST`."""

    needs_teacher: ClassVar[bool] = True
    standardizable: ClassVar[bool] = True
    temperature: float = Field(default=4.0, gt=0)
    """Softening of both distributions, dimensionless."""
    inter_class_weight: float = Field(default=2.0, gt=0)
    """Factor of the distance over the classes of each example; beta in the paper."""
    intra_class_weight: float = Field(default=2.0, gt=0)
    """Factor of the distance over the batch for each class; gamma in the paper."""

    def build(self, task: Task) -> DIST:
        """Return the objective; it needs nothing from the task."""
        del task
        return DIST(self)


@final
class DIST(Objective[DistillStep]):
    """Let the student's predictions correlate with the teacher's; see :func:`dist_distance`."""

    name = "dist"

    def __init__(self, config: DISTConfig) -> None:
        super().__init__()
        self.config = config

    def forward(self, step: DistillStep) -> Tensor:
        """Return the distance of the batch."""
        return dist_distance(
            step.outputs.logits,
            step.teacher.logits,
            temperature=self.config.temperature,
            inter_class_weight=self.config.inter_class_weight,
            intra_class_weight=self.config.intra_class_weight,
        )


METHOD = Method(
    name="dist",
    role="student",
    title="Predictions that correlate with the teacher's, over the classes and over the batch",
    venue="NeurIPS 2022",
    source=(
        "Huang, You, Wang, Qian and Xu, NeurIPS 2022, arXiv:2205.10536; weights and the temperature for CIFAR from "
        "memory of the paper, not checked"
    ),
    differs=(
        "A constant row of probabilities has no gradient; in the authors' code it has a very large one. Their code for "
        "ImageNet has no temperature."
    ),
    terms={
        "cross_entropy": {"weight": 1.0},
        "dist": {"weight": 1.0, "temperature": 4.0, "inter_class_weight": 2.0, "intra_class_weight": 2.0},
    },
)
