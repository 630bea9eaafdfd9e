"""Decoupled knowledge distillation: the target's share of the divergence and the others' have weights of their own."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, final

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from soteacher.objective import Method, Objective, ObjectiveConfig
from soteacher.objectives.student.class_logits import check_logits, check_positive, other_logits, target_logits
from soteacher.precision import at_least_float32
from soteacher.types import DistillStep, Task


def target_class_divergence(
    student_logits: Tensor, teacher_logits: Tensor, labels: Tensor, *, temperature: float
) -> Tensor:
    r"""Divergence in whether it is the target class, one value per example.

    .. math:: \tau^2 \, \mathrm{KL}(b_t \,\|\, b_s), \qquad b = (p_y, 1 - p_y), \quad p = \sigma(z / \tau)

    Args:
        student_logits: ``[B, K]``, K at least 2; gradients flow.
        teacher_logits: ``[B, K]``; a constant.
        labels: ``[B]`` int64 class ids in [0, K).
        temperature: :math:`\tau > 0`, dimensionless.

    Returns:
        ``[B]``, nats times :math:`\tau^2`, float32 (float64 from float64 logits); 0 where both are equally sure.

    Raises:
        InputError: the shapes do not fit, or ``temperature`` is not positive and finite.

    Source: Zhao et al., CVPR 2022, arXiv:2203.08679, section 3, where it is called TCKD.
    """
    student, teacher = _split(student_logits, teacher_logits, labels, temperature)
    return temperature**2 * _target_divergence(student.margin, teacher.margin)


@dataclass(frozen=True, slots=True)
class _Split:
    """Softened predictions, the target's apart from the others'."""

    margin: Tensor
    r""":math:`\log p_y - \log(1 - p_y)`, ``[B]``."""
    log_others: Tensor
    r""":math:`\log q`, ``[B, K - 1]``."""


def _split(student_logits: Tensor, teacher_logits: Tensor, labels: Tensor, temperature: float) -> tuple[_Split, _Split]:
    check_logits(student_logits, teacher_logits, labels)
    check_positive(temperature=temperature)
    return _split_one(student_logits, labels, temperature), _split_one(teacher_logits.detach(), labels, temperature)


def _split_one(logits: Tensor, labels: Tensor, temperature: float) -> _Split:
    softened = at_least_float32(logits) / temperature
    others = other_logits(softened, labels)
    return _Split(target_logits(softened, labels) - others.logsumexp(dim=1), F.log_softmax(others, dim=1))


def _target_divergence(student_margin: Tensor, teacher_margin: Tensor) -> Tensor:
    """Return the divergence of two shares each, ``[B]``; no share is computed as 1 minus the other one."""
    student, teacher = (torch.stack([margin, -margin]) for margin in (student_margin, teacher_margin))
    return F.kl_div(F.logsigmoid(student), F.logsigmoid(teacher), reduction="none", log_target=True).sum(dim=0)


def non_target_class_divergence(
    student_logits: Tensor, teacher_logits: Tensor, labels: Tensor, *, temperature: float
) -> Tensor:
    r"""Divergence among the classes other than the target, one value per example.

    .. math:: \tau^2 \, \mathrm{KL}(q_t \,\|\, q_s), \qquad q_k = p_k / (1 - p_y), \quad k \ne y

    Args:
        student_logits: ``[B, K]``, K at least 2; gradients flow, none to the target's logit.
        teacher_logits: ``[B, K]``; a constant.
        labels: ``[B]`` int64 class ids in [0, K).
        temperature: :math:`\tau > 0`, dimensionless.

    Returns:
        ``[B]``, nats times :math:`\tau^2`, float32 (float64 from float64 logits); 0 where the others stand alike.

    Raises:
        InputError: the shapes do not fit, or ``temperature`` is not positive and finite.

    Source: Zhao et al., CVPR 2022, arXiv:2203.08679, section 3, where it is called NCKD.
    """
    student, teacher = _split(student_logits, teacher_logits, labels, temperature)
    others = F.kl_div(student.log_others, teacher.log_others, reduction="none", log_target=True)
    return temperature**2 * others.sum(dim=1)


def dkd_divergence(
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor,
    *,
    temperature: float,
    target_weight: float,
    non_target_weight: float,
) -> Tensor:
    r"""Weighted sum of the two parts of the divergence, one value per example.

    .. math:: \tau^2 \left[\alpha \, \mathrm{KL}(b_t \,\|\, b_s) + \beta \, \mathrm{KL}(q_t \,\|\, q_s)\right]

    With :math:`\alpha = 1` and :math:`\beta = 1 - p_{t,y}` it is the divergence of knowledge distillation: there the
    surer the teacher is, the less counts what it says of the other classes.

    Args:
        student_logits: ``[B, K]``, K at least 2; gradients flow.
        teacher_logits: ``[B, K]``; a constant.
        labels: ``[B]`` int64 class ids in [0, K).
        temperature: :math:`\tau > 0`, dimensionless.
        target_weight: :math:`\alpha > 0`; see :func:`target_class_divergence`.
        non_target_weight: :math:`\beta > 0`; see :func:`non_target_class_divergence`.

    Returns:
        ``[B]``, nats times :math:`\tau^2`, float32 (float64 from float64 logits); 0 where the two agree.

    Raises:
        InputError: the shapes do not fit, or a number is not positive and finite.

    Source: Zhao et al., CVPR 2022, arXiv:2203.08679, section 3. The authors' code subtracts 1000 from the target's
    logit where we leave it out, and takes logarithms of probabilities where we stay in log space.
    """
    check_positive(target_weight=target_weight, non_target_weight=non_target_weight)
    student, teacher = _split(student_logits, teacher_logits, labels, temperature)
    target = _target_divergence(student.margin, teacher.margin)
    others = F.kl_div(student.log_others, teacher.log_others, reduction="none", log_target=True).sum(dim=1)
    return temperature**2 * (target_weight * target + non_target_weight * others)


class DKDConfig(ObjectiveConfig):
    """Settings of :class:`DKD`."""

    needs_teacher: ClassVar[bool] = True
    standardizable: ClassVar[bool] = True
    temperature: float = Field(default=4.0, gt=0)
    """Softening of both distributions, dimensionless."""
    target_weight: float = Field(default=1.0, gt=0)
    """Factor of the divergence in whether it is the target class; alpha in the paper."""
    non_target_weight: float = Field(default=8.0, gt=0)
    """Factor of the divergence among the other classes; beta in the paper."""

    def build(self, task: Task) -> DKD:
        """Return the objective; it needs nothing from the task."""
        del task
        return DKD(self)


@final
class DKD(Objective[DistillStep]):
    """Match the teacher's sureness and its order of the other classes, each by itself; see :func:`dkd_divergence`."""

    name = "dkd"

    def __init__(self, config: DKDConfig) -> None:
        super().__init__()
        self.config = config

    def forward(self, step: DistillStep) -> Tensor:
        """Return the mean divergence of the batch."""
        return dkd_divergence(
            step.outputs.logits,
            step.teacher.logits,
            step.labels,
            temperature=self.config.temperature,
            target_weight=self.config.target_weight,
            non_target_weight=self.config.non_target_weight,
        ).mean()


METHOD = Method(
    name="dkd",
    role="student",
    title="Decoupled distillation: the target class and the other classes have weights of their own",
    venue="CVPR 2022",
    source="Zhao, Cui, Song, Qiu and Liang, CVPR 2022, arXiv:2203.08679; default weights of the authors' code",
    differs=(
        "The default weight of the other classes is 8; the authors' code has others for some pairs, 6 for WRN-40-2 to "
        "WRN-16-2. The warm-up of 20 epochs of 240 scales with the length of the run."
    ),
    terms={
        "cross_entropy": {"weight": 1.0},
        "dkd": {
            "weight": 1.0, "ramp": "warmup", "temperature": 4.0, "target_weight": 1.0, "non_target_weight": 8.0,
        },
    },
)  # fmt: skip
