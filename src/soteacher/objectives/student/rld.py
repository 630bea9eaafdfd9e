"""Refined logit distillation (RLD): the teacher's confidence, and its relations of the classes below the label's."""

from __future__ import annotations

from typing import ClassVar, final

import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from soteacher.objective import Method, Objective, ObjectiveConfig, Ramp
from soteacher.objectives.student.class_logits import check_logits, check_positive, other_logits, target_logits
from soteacher.precision import at_least_float32
from soteacher.types import DistillStep, Task

_NO_LOGIT = -1e9
"""Stands for a class that is left out. It is finite, so that an example without any class left has loss 0, not NaN."""


def sample_confidence_divergence(
    student_logits: Tensor, teacher_logits: Tensor, labels: Tensor, *, temperature: float
) -> Tensor:
    r"""Divergence of the student's confidence in the label from the teacher's in its first choice, for each example.

    .. math:: \tau^2 \, \mathrm{KL}(b_t \,\|\, b_s), \qquad b_t = (\max_k p_{t,k}, 1 - \max_k p_{t,k}),
        \quad b_s = (p_{s,y}, 1 - p_{s,y})

    The student becomes as sure of the label as the teacher is of its choice, which may be wrong.

    Args:
        student_logits: ``[B, K]``, K at least 2; gradients flow.
        teacher_logits: ``[B, K]``; a constant.
        labels: ``[B]`` int64 class ids.
        temperature: :math:`\tau > 0` of both predictions :math:`p`, dimensionless.

    Returns:
        ``[B]``, nats times :math:`\tau^2`, float32 (float64 from float64 logits); at least 0.

    Raises:
        InputError: the shapes do not fit, or the temperature is not positive and finite.

    Source: Sun et al., ICCV 2025, arXiv:2408.07703, sample confidence; formula as in the authors' code.
    """
    check_logits(student_logits, teacher_logits, labels)
    check_positive(temperature=temperature)
    student, teacher = at_least_float32(student_logits), at_least_float32(teacher_logits.detach())
    of_label = _margin(student / temperature, labels)
    of_choice = _margin(teacher / temperature, teacher.argmax(dim=1))
    # b = (sigmoid(margin), sigmoid(-margin)): no share is computed as 1 minus the other one.
    chosen = of_choice.sigmoid() * (F.logsigmoid(of_choice) - F.logsigmoid(of_label))
    rest = (-of_choice).sigmoid() * (F.logsigmoid(-of_choice) - F.logsigmoid(-of_label))
    return temperature**2 * (chosen + rest)


def _margin(logits: Tensor, classes: Tensor) -> Tensor:
    r"""Return :math:`\log p_k - \log(1 - p_k)` of one class of each example, ``[B]``."""
    return target_logits(logits, classes) - other_logits(logits, classes).logsumexp(dim=1)


def masked_correlation_divergence(
    student_logits: Tensor, teacher_logits: Tensor, labels: Tensor, *, temperature: float
) -> Tensor:
    r"""Divergence over the classes that the teacher finds less likely than the label, one value per example.

    .. math:: \tau^2 \, \mathrm{KL}(q_t \,\|\, q_s), \qquad
        q_k \propto [z_{t,k} < z_{t,y}] \, e^{z_k / \tau}

    The label's class and those that the teacher wrongly prefers to it, or finds as likely, are left out of both
    predictions.

    Args:
        student_logits: ``[B, K]``; gradients flow.
        teacher_logits: ``[B, K]``; a constant.
        labels: ``[B]`` int64 class ids.
        temperature: :math:`\tau > 0`, dimensionless.

    Returns:
        ``[B]``, nats times :math:`\tau^2`, float32 (float64 from float64 logits); 0 where the two agree, and where no
        class is left.

    Raises:
        InputError: the shapes do not fit, or the temperature is not positive and finite.

    Source: Sun et al., ICCV 2025, arXiv:2408.07703, masked correlation; formula as in the authors' code.
    """
    check_logits(student_logits, teacher_logits, labels)
    check_positive(temperature=temperature)
    student, teacher = at_least_float32(student_logits), at_least_float32(teacher_logits.detach())
    left_out = teacher >= target_logits(teacher, labels)[:, None]
    log_student = F.log_softmax((student / temperature).masked_fill(left_out, _NO_LOGIT), dim=1)
    log_teacher = F.log_softmax((teacher / temperature).masked_fill(left_out, _NO_LOGIT), dim=1)
    return temperature**2 * F.kl_div(log_student, log_teacher, reduction="none", log_target=True).sum(dim=1)


class RLDConfig(ObjectiveConfig):
    """Settings of :class:`RLD`."""

    needs_teacher: ClassVar[bool] = True
    standardizable: ClassVar[bool] = True
    ramp: Ramp = "warmup"
    """How the weight grows over the run; see ``ramp_factor``."""
    temperature: float = Field(default=4.0, gt=0)
    """Softening of both distributions in both parts, dimensionless."""
    confidence_weight: float = Field(default=1.0, gt=0)
    """Factor of the sample confidence."""
    correlation_weight: float = Field(default=8.0, gt=0)
    """Factor of the masked correlation."""

    def build(self, task: Task) -> RLD:
        """Return the objective; it needs nothing from the task."""
        del task
        return RLD(self)


@final
class RLD(Objective[DistillStep]):
    """Match the teacher's confidence, and its relations of the classes that it finds less likely than the label.

    See :func:`sample_confidence_divergence` and :func:`masked_correlation_divergence`.
    """

    name = "rld"

    def __init__(self, config: RLDConfig) -> None:
        super().__init__()
        self.config = config

    def forward(self, step: DistillStep) -> Tensor:
        """Return the weighted sum of both parts, the mean of the batch."""
        student, teacher, temperature = step.outputs.logits, step.teacher.logits, self.config.temperature
        confidence = sample_confidence_divergence(student, teacher, step.labels, temperature=temperature)
        correlation = masked_correlation_divergence(student, teacher, step.labels, temperature=temperature)
        return self.config.confidence_weight * confidence.mean() + self.config.correlation_weight * correlation.mean()


METHOD = Method(
    name="rld",
    role="student",
    title="Refined logits: the teacher's confidence, and its relations of the classes below the label's",
    venue="ICCV 2025",
    source=(
        "Sun, Chen, Lyu, Chen, Chen and Wang, ICCV 2025, Knowledge Distillation with Refined Logits, arXiv:2408.07703"
    ),
    differs=(
        "Weights and temperature are those of the command that the authors' repository shows, which takes one "
        "temperature for both parts; its bare default is temperature 1 for the confidence."
    ),
    terms={"cross_entropy": {"weight": 1.0}, "rld": {"weight": 1.0, "ramp": "warmup"}},
)
