"""Normalised knowledge distillation: what the teacher says of the target, and of the others among themselves."""

from __future__ import annotations

from typing import ClassVar, final

import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from soteacher.objective import Method, Objective, ObjectiveConfig
from soteacher.objectives.student.class_logits import check_logits, check_positive, other_logits, target_logits
from soteacher.precision import at_least_float32
from soteacher.types import DistillStep, Task


def nkd_cross_entropy(
    student_logits: Tensor, teacher_logits: Tensor, labels: Tensor, *, temperature: float, non_target_weight: float
) -> Tensor:
    r"""Cross-entropy with the teacher's target share and with its normalised other shares, one value per example.

    .. math::
        -p_{t,y} \log p_{s,y} - \gamma \tau^2 \sum_{k \ne y} q_{t,k} \log q_{s,k}, \qquad
        p = \sigma(z), \quad q = \sigma(z_{k \ne y} / \tau)

    Args:
        student_logits: ``[B, K]``, K at least 2; gradients flow.
        teacher_logits: ``[B, K]``; a constant.
        labels: ``[B]`` int64 class ids in [0, K).
        temperature: :math:`\tau > 0` of the second part, dimensionless; the first part is not softened.
        non_target_weight: :math:`\gamma > 0`.

    Returns:
        ``[B]``, nats, float32 (float64 from float64 logits). A cross-entropy: positive where the two agree.

    Raises:
        InputError: the shapes do not fit, or a number is not positive and finite.

    Source: Yang et al., ICCV 2023, arXiv:2303.13005; the formula is that of the authors' code.
    """
    check_logits(student_logits, teacher_logits, labels)
    check_positive(temperature=temperature, non_target_weight=non_target_weight)
    student, teacher = at_least_float32(student_logits), at_least_float32(teacher_logits.detach())
    share = target_logits(F.softmax(teacher, dim=1), labels)
    target = -share * target_logits(F.log_softmax(student, dim=1), labels)
    log_student = F.log_softmax(other_logits(student, labels) / temperature, dim=1)
    others = -(F.softmax(other_logits(teacher, labels) / temperature, dim=1) * log_student).sum(dim=1)
    return target + non_target_weight * temperature**2 * others


class NKDConfig(ObjectiveConfig):
    """Settings of :class:`NKD`."""

    needs_teacher: ClassVar[bool] = True
    standardizable: ClassVar[bool] = True
    temperature: float = Field(default=1.0, gt=0)
    """Softening of the other classes' distributions, dimensionless."""
    non_target_weight: float = Field(default=1.5, gt=0)
    """Factor of the part of the other classes; gamma in the paper."""

    def build(self, task: Task) -> NKD:
        """Return the objective; it needs nothing from the task."""
        del task
        return NKD(self)


@final
class NKD(Objective[DistillStep]):
    """Fit the label as far as the teacher does, and its view of the others; see :func:`nkd_cross_entropy`."""

    name = "nkd"

    def __init__(self, config: NKDConfig) -> None:
        super().__init__()
        self.config = config

    def forward(self, step: DistillStep) -> Tensor:
        """Return the mean cross-entropy of the batch."""
        return nkd_cross_entropy(
            step.outputs.logits,
            step.teacher.logits,
            step.labels,
            temperature=self.config.temperature,
            non_target_weight=self.config.non_target_weight,
        ).mean()


METHOD = Method(
    name="nkd",
    role="student",
    title="Labels, the teacher's share of the target, and its normalised shares of the other classes",
    venue="ICCV 2023",
    source="Yang, Zeng, Li, Zhang, Yuan and Li, ICCV 2023, arXiv:2303.13005; settings of the authors' ImageNet recipe",
    differs=(
        "The settings are those that the authors' code has by default and for ImageNet, non_target_weight 1.5 at "
        "temperature 1; its CIFAR-100 recipe, ResNet-34 to ResNet-18, has 3.5 at temperature 3."
    ),
    terms={"cross_entropy": {"weight": 1.0}, "nkd": {"weight": 1.0, "temperature": 1.0, "non_target_weight": 1.5}},
)
