"""Transformed teacher matching: only the teacher's distribution is softened."""

from __future__ import annotations

from typing import ClassVar, final

import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from soteacher.objective import Method, Objective, ObjectiveConfig
from soteacher.objectives.student.class_logits import check_logits, check_positive
from soteacher.precision import at_least_float32
from soteacher.types import DistillStep, Task


def ttm_divergence(student_logits: Tensor, teacher_logits: Tensor, *, exponent: float) -> Tensor:
    r"""Divergence of the student from the teacher's power-transformed distribution, one value per example.

    .. math::
        \mathrm{KL}(p_t^{(\gamma)} \,\|\, p_s), \qquad
        p_{t,k}^{(\gamma)} = \frac{p_{t,k}^\gamma}{\sum_j p_{t,j}^\gamma} = \sigma(\gamma z_t)_k

    Args:
        student_logits: ``[B, K]``; gradients flow. The student is not softened.
        teacher_logits: ``[B, K]``; a constant.
        exponent: :math:`\gamma > 0`, the reciprocal of the teacher's temperature.

    Returns:
        ``[B]``, nats, float32 (float64 from float64 logits); 0 where the student's logits are :math:`\gamma` times the
        teacher's, but for a constant.

    Raises:
        InputError: the shapes differ, or ``exponent`` is not positive and finite.

    Source: Zheng and Yang, ICLR 2024, arXiv:2402.11148, section 3.
    """
    check_logits(student_logits, teacher_logits)
    check_positive(exponent=exponent)
    log_student = F.log_softmax(at_least_float32(student_logits), dim=1)
    log_teacher = F.log_softmax(exponent * at_least_float32(teacher_logits.detach()), dim=1)
    return F.kl_div(log_student, log_teacher, reduction="none", log_target=True).sum(dim=1)


class TTMConfig(ObjectiveConfig):
    """Settings of :class:`TTM`."""

    needs_teacher: ClassVar[bool] = True
    standardizable: ClassVar[bool] = True
    exponent: float = Field(default=0.1, gt=0)
    """Power of the teacher's probabilities, dimensionless; 1 leaves them as they are, smaller ones soften."""

    def build(self, task: Task) -> TTM:
        """Return the objective; it needs nothing from the task."""
        del task
        return TTM(self)


@final
class TTM(Objective[DistillStep]):
    """Match the teacher's power-transformed predictions; see :func:`ttm_divergence`."""

    name = "ttm"

    def __init__(self, config: TTMConfig) -> None:
        super().__init__()
        self.config = config

    def forward(self, step: DistillStep) -> Tensor:
        """Return the mean divergence of the batch."""
        return ttm_divergence(step.outputs.logits, step.teacher.logits, exponent=self.config.exponent).mean()


METHOD = Method(
    name="ttm",
    role="student",
    title="Labels and the teacher's softened predictions, matched by the student's unsoftened ones",
    venue="ICLR 2024",
    source="Zheng and Yang, ICLR 2024, arXiv:2402.11148; settings of the authors' example, VGG-13 to VGG-8",
    differs=(
        "Weight and exponent serve all pairs; the paper lists others for each pair in its appendix A.4, which was not "
        "checked."
    ),
    terms={"cross_entropy": {"weight": 1.0}, "ttm": {"weight": 45.0, "exponent": 0.1}},
)
