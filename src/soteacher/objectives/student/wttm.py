"""Weighted transformed teacher matching: examples on which the teacher is less sure count more."""

from __future__ import annotations

from typing import ClassVar, final

import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from soteacher.objective import Method, Objective, ObjectiveConfig
from soteacher.objectives.student.ttm import ttm_divergence
from soteacher.precision import at_least_float32
from soteacher.types import DistillStep, Task


def wttm_divergence(student_logits: Tensor, teacher_logits: Tensor, *, exponent: float) -> Tensor:
    r"""Divergence from the teacher's power-transformed distribution times its power sum, one value per example.

    .. math::
        \left(\sum_j p_{t,j}^\gamma\right) \mathrm{KL}(p_t^{(\gamma)} \,\|\, p_s), \qquad
        p_{t,k}^{(\gamma)} = \frac{p_{t,k}^\gamma}{\sum_j p_{t,j}^\gamma}

    Args:
        student_logits: ``[B, K]``; gradients flow.
        teacher_logits: ``[B, K]``; a constant.
        exponent: :math:`\gamma > 0`; below 1 the power sum is the larger, the smoother the teacher's distribution is:
            from 1 up to :math:`K^{1 - \gamma}`.

    Returns:
        ``[B]``, nats, float32 (float64 from float64 logits); 0 where the student's logits are :math:`\gamma` times the
        teacher's, but for a constant.

    Raises:
        InputError: the shapes differ, or ``exponent`` is not positive and finite.

    Source: Zheng and Yang, ICLR 2024, arXiv:2402.11148, section 4.
    """
    divergence = ttm_divergence(student_logits, teacher_logits, exponent=exponent)
    log_teacher = F.log_softmax(at_least_float32(teacher_logits.detach()), dim=1)
    return (exponent * log_teacher).logsumexp(dim=1).exp() * divergence


class WTTMConfig(ObjectiveConfig):
    """Settings of :class:`WTTM`."""

    needs_teacher: ClassVar[bool] = True
    standardizable: ClassVar[bool] = True
    exponent: float = Field(default=0.2, gt=0)
    """Power of the teacher's probabilities, dimensionless; 1 leaves them as they are, smaller ones soften."""

    def build(self, task: Task) -> WTTM:
        """Return the objective; it needs nothing from the task."""
        del task
        return WTTM(self)


@final
class WTTM(Objective[DistillStep]):
    """Match the teacher's power-transformed predictions, the smooth ones most; see :func:`wttm_divergence`."""

    name = "wttm"

    def __init__(self, config: WTTMConfig) -> None:
        super().__init__()
        self.config = config

    def forward(self, step: DistillStep) -> Tensor:
        """Return the mean divergence of the batch."""
        return wttm_divergence(step.outputs.logits, step.teacher.logits, exponent=self.config.exponent).mean()


METHOD = Method(
    name="wttm",
    role="student",
    title="Labels and the teacher's softened predictions, the smoother ones with more weight",
    venue="ICLR 2024",
    source=(
        "Zheng and Yang, ICLR 2024, arXiv:2402.11148; weight and exponent of the authors' example, VGG-13 to VGG-8, "
        "where the term is added to CRD"
    ),
    differs=(
        "Weight and exponent serve all pairs, without CRD; the paper lists those of each pair in its appendix A.4, "
        "which was not checked."
    ),
    terms={"cross_entropy": {"weight": 1.0}, "wttm": {"weight": 4.0, "exponent": 0.2}},
)
