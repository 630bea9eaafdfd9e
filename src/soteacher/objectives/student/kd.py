"""Knowledge distillation: the student matches the teacher's softened predictions."""

from __future__ import annotations

import math
from typing import ClassVar, final

import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from soteacher.errors import InputError
from soteacher.objective import Method, Objective, ObjectiveConfig
from soteacher.precision import at_least_float32
from soteacher.types import DistillStep, Task


def kd_divergence(student_logits: Tensor, teacher_logits: Tensor, *, temperature: float) -> Tensor:
    r"""Divergence of the softened student from the softened teacher, one value per example.

    .. math:: \tau^2 \, \mathrm{KL}\left(\sigma(z_t / \tau) \,\|\, \sigma(z_s / \tau)\right)

    Args:
        student_logits: ``[B, K]``; gradients flow.
        teacher_logits: ``[B, K]``; a constant.
        temperature: :math:`\tau > 0`, dimensionless.

    Returns:
        ``[B]``, nats times :math:`\tau^2`, float32 (float64 from float64 logits); 0 where the two agree.

    Raises:
        InputError: the shapes differ or are not ``[B, K]``, or ``temperature`` is not positive and finite.

    Source: Hinton, Vinyals and Dean 2015, arXiv:1503.02531, section 2; the factor :math:`\tau^2` keeps the size of the
    gradient when the temperature changes.
    """
    if student_logits.ndim != 2 or student_logits.shape != teacher_logits.shape:
        raise InputError(
            f"student and teacher logits must have one shape [B, K], got {list(student_logits.shape)} (student) and "
            f"{list(teacher_logits.shape)} (teacher)"
        )
    if not temperature > 0 or not math.isfinite(temperature):
        raise InputError(f"temperature must be positive and finite, got {temperature}")
    log_student = F.log_softmax(at_least_float32(student_logits) / temperature, dim=-1)
    log_teacher = F.log_softmax(at_least_float32(teacher_logits.detach()) / temperature, dim=-1)
    return temperature**2 * F.kl_div(log_student, log_teacher, reduction="none", log_target=True).sum(dim=-1)


class KDConfig(ObjectiveConfig):
    """Settings of :class:`KD`."""

    needs_teacher: ClassVar[bool] = True
    standardizable: ClassVar[bool] = True
    takes_mixtures: ClassVar[bool] = True
    temperature: float = Field(default=4.0, gt=0)
    """Softening of both distributions, dimensionless."""

    def build(self, task: Task) -> KD:
        """Return the objective; it needs nothing from the task."""
        del task
        return KD(self)


@final
class KD(Objective[DistillStep]):
    """Match the teacher's softened predictions; see :func:`kd_divergence`."""

    name = "kd"

    def __init__(self, config: KDConfig) -> None:
        super().__init__()
        self.config = config

    def forward(self, step: DistillStep) -> Tensor:
        """Return the mean divergence of the batch."""
        return kd_divergence(step.outputs.logits, step.teacher.logits, temperature=self.config.temperature).mean()


# SoTeacher's weights. RepDistiller, whose tables most papers compare with, takes 0.1 and 0.9.
METHOD = Method(
    name="kd",
    role="student",
    title="Knowledge distillation: half the labels, half the teacher's softened predictions",
    venue="NIPS 2014 workshop",
    source="Hinton, Vinyals and Dean 2015, arXiv:1503.02531; weights of Dong et al., ICLR 2024, arXiv:2206.06661",
    terms={"cross_entropy": {"weight": 0.5}, "kd": {"weight": 0.5, "temperature": 4.0}},
)
