"""Multi-level logit distillation (MLKD), the levels of the batch and of the classes: Gram matrices of predictions."""

from __future__ import annotations

from typing import Annotated, ClassVar, final

import torch
from pydantic import Field
from torch import Tensor

from soteacher.objective import Objective, ObjectiveConfig
from soteacher.objectives.student.class_logits import check_logits, check_positive
from soteacher.objectives.student.mlkd import below_median_share
from soteacher.precision import at_least_float32, full_precision
from soteacher.types import DistillStep, Task


def batch_gram_distance(student_logits: Tensor, teacher_logits: Tensor, *, temperature: float) -> Tensor:
    r"""Squared distance of the similarities of a batch's examples, as their softened predictions give them.

    .. math:: \frac{1}{B} \left\| P_t P_t^\top - P_s P_s^\top \right\|_F^2, \qquad P = \sigma(Z / \tau)

    Args:
        student_logits: ``[B, K]``; gradients flow.
        teacher_logits: ``[B, K]``; a constant.
        temperature: :math:`\tau > 0`, dimensionless.

    Returns:
        A scalar, float32 (float64 from float64 logits); 0 where the two agree; the order of the batch does not matter.

    Raises:
        InputError: the shapes differ or are not ``[B, K]``, or the temperature is not positive.

    Source: Jin, Wang and Lin, CVPR 2023, "Multi-Level Logit Distillation", the batch level, as in the authors' code.
    """
    student, teacher = _softened(student_logits, teacher_logits, temperature)
    with full_precision(student):
        return (teacher @ teacher.T - student @ student.T).square().sum() / len(student)


def class_gram_distance(student_logits: Tensor, teacher_logits: Tensor, *, temperature: float) -> Tensor:
    r"""Squared distance of the relations of classes, as the softened predictions of a batch give them.

    .. math:: \frac{1}{K} \left\| P_t^\top P_t - P_s^\top P_s \right\|_F^2, \qquad P = \sigma(Z / \tau)

    Args:
        student_logits: ``[B, K]``; gradients flow.
        teacher_logits: ``[B, K]``; a constant.
        temperature: :math:`\tau > 0`, dimensionless.

    Returns:
        A scalar, float32 (float64 from float64 logits); 0 where the two agree; the order of the batch does not matter.

    Raises:
        InputError: the shapes differ or are not ``[B, K]``, or the temperature is not positive.

    Source: Jin, Wang and Lin, CVPR 2023, "Multi-Level Logit Distillation", the class level, as in the authors' code.
    """
    student, teacher = _softened(student_logits, teacher_logits, temperature)
    with full_precision(student):
        return (teacher.T @ teacher - student.T @ student).square().sum() / student.shape[1]


def _softened(student_logits: Tensor, teacher_logits: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Return both softened predictions ``[B, K]``."""
    check_logits(student_logits, teacher_logits)
    check_positive(temperature=temperature)
    student, teacher = at_least_float32(student_logits), at_least_float32(teacher_logits.detach())
    return (student / temperature).softmax(dim=-1), (teacher / temperature).softmax(dim=-1)


class MLKDRelationsConfig(ObjectiveConfig):
    """Settings of :class:`MLKDRelations`."""

    needs_teacher: ClassVar[bool] = True
    standardizable: ClassVar[bool] = True
    temperatures: tuple[Annotated[float, Field(gt=0)], ...] = Field(default=(2.0, 3.0, 4.0, 5.0, 6.0), min_length=1)
    """Softenings of both distributions, dimensionless; the distances add up."""

    def build(self, task: Task) -> MLKDRelations:
        """Return the objective; it needs nothing from the task."""
        del task
        return MLKDRelations(self)


@final
class MLKDRelations(Objective[DistillStep]):
    """Match how examples and how classes relate; see :func:`batch_gram_distance` and :func:`class_gram_distance`.

    Both count by the share of examples, or of classes, whose confidence in the teacher does not exceed the median,
    about 1/2, as in the authors' code; see :func:`soteacher.functional.below_median_share`. Only the batch's own view
    counts: the authors' code computes the strong view's distances, and leaves them out of the sum.
    """

    name = "mlkd_relations"

    def __init__(self, config: MLKDRelationsConfig) -> None:
        super().__init__()
        self.config = config

    def forward(self, step: DistillStep) -> Tensor:
        """Return the sum of both levels over the temperatures."""
        student, teacher = step.outputs.logits, step.teacher.logits
        temperatures = self.config.temperatures
        batch = [batch_gram_distance(student, teacher, temperature=value) for value in temperatures]
        classes = [class_gram_distance(student, teacher, temperature=value) for value in temperatures]
        predictions = at_least_float32(teacher.detach()).softmax(dim=-1)
        of_examples = below_median_share(predictions.amax(dim=-1))
        of_classes = below_median_share(predictions.sum(dim=0))
        return of_examples * torch.stack(batch).sum() + of_classes * torch.stack(classes).sum()
