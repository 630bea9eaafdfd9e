"""Cross-view consistency (CRLD): the student matches the teacher within each view and across the views."""

from __future__ import annotations

from typing import ClassVar, final

from pydantic import Field
from torch import Tensor

from soteacher.errors import InputError
from soteacher.objective import Method, Objective, ObjectiveConfig
from soteacher.objectives.student.kd import kd_divergence
from soteacher.objectives.views import student_view, teacher_view
from soteacher.precision import at_least_float32
from soteacher.types import DistillStep, Task, View


def cross_view_divergence(
    student_logits: Tensor,
    student_strong_logits: Tensor,
    teacher_logits: Tensor,
    teacher_strong_logits: Tensor,
    *,
    temperature: float,
    within_weight: float,
    cross_weight: float,
    weak_threshold: float,
    strong_threshold: float,
) -> Tensor:
    r"""Divergence of two views from the teacher's two views, where the teacher is confident; one value per example.

    With the softened divergence :math:`D(s, t)` of :func:`soteacher.functional.kd_divergence`, the weak view
    :math:`w`, the strong one :math:`v` and the teacher's confidences :math:`c = \max_k \sigma(z_t)_k`:

    .. math:: a [c_w \ge \theta_w] \big( D(s_w, t_w) + D(s_v, t_v) \big)
        + b [c_v \ge \theta_v] \big( D(s_v, t_w) + D(s_w, t_v) \big)

    Args:
        student_logits: ``[B, K]`` for the batch's own, weakly augmented view; gradients flow.
        student_strong_logits: ``[B, K]`` for the strong view; gradients flow.
        teacher_logits: ``[B, K]`` for the weak view; a constant.
        teacher_strong_logits: ``[B, K]`` for the strong view; a constant.
        temperature: of the divergences, positive, dimensionless. Confidences are those at temperature 1.
        within_weight: :math:`a \ge 0`, of the divergences within a view.
        cross_weight: :math:`b \ge 0`, of the divergences across views.
        weak_threshold: :math:`\theta_w` in [0, 1].
        strong_threshold: :math:`\theta_v` in [0, 1].

    Returns:
        ``[B]``, float32 (float64 from float64 logits); 0 where all four agree, and where the teacher is confident in
        no view.

    Raises:
        InputError: the shapes differ or are not ``[B, K]``, or a number is out of its range.

    Source: Zhang, Liu, Cai and Ma, ACM MM 2024, arXiv:2412.16493; formula, and which confidence goes with which part,
    as in the authors' code, read in a public copy of it.
    """
    if within_weight < 0 or cross_weight < 0:
        raise InputError(f"weights must be at least 0, got {within_weight} (within) and {cross_weight} (cross)")
    if not (0 <= weak_threshold <= 1 and 0 <= strong_threshold <= 1):
        raise InputError(f"thresholds must be in [0, 1], got {weak_threshold} (weak) and {strong_threshold} (strong)")
    within = kd_divergence(student_logits, teacher_logits, temperature=temperature) + kd_divergence(
        student_strong_logits, teacher_strong_logits, temperature=temperature
    )
    cross = kd_divergence(student_strong_logits, teacher_logits, temperature=temperature) + kd_divergence(
        student_logits, teacher_strong_logits, temperature=temperature
    )
    sure, sure_strong = _confidence(teacher_logits) >= weak_threshold, _confidence(teacher_strong_logits)
    return within_weight * within * sure + cross_weight * cross * (sure_strong >= strong_threshold)


def _confidence(logits: Tensor) -> Tensor:
    """Return the largest probability of each example, ``[B]``."""
    return at_least_float32(logits.detach()).softmax(dim=-1).amax(dim=-1)


class CRLDConfig(ObjectiveConfig):
    """Settings of :class:`CRLD`. Standardised logits would have lost the confidences, so they are not offered."""

    needs_teacher: ClassVar[bool] = True
    temperature: float = Field(default=4.0, gt=0)
    """Softening of both distributions, dimensionless."""
    within_weight: float = Field(default=2.0, gt=0)
    """Factor of the divergences within each view."""
    cross_weight: float = Field(default=0.5, gt=0)
    """Factor of the divergences across the views."""
    weak_threshold: float = Field(default=0.9, ge=0, le=1)
    """The teacher's confidence in the own view from which an example counts within the views."""
    strong_threshold: float = Field(default=0.2, ge=0, le=1)
    """The teacher's confidence in the strong view from which an example counts across the views."""

    def build(self, task: Task) -> CRLD:
        """Return the objective; it needs nothing from the task."""
        del task
        return CRLD(self)


@final
class CRLD(Objective[DistillStep]):
    """Match the teacher within and across two views; see :func:`cross_view_divergence`."""

    name = "crld"
    views: ClassVar[tuple[View, ...]] = ("strong",)

    def __init__(self, config: CRLDConfig) -> None:
        super().__init__()
        self.config = config

    def forward(self, step: DistillStep) -> Tensor:
        """Return the mean divergence of the batch."""
        return cross_view_divergence(
            step.outputs.logits,
            student_view(step, "strong").logits,
            step.teacher.logits,
            teacher_view(step, "strong").logits,
            temperature=self.config.temperature,
            within_weight=self.config.within_weight,
            cross_weight=self.config.cross_weight,
            weak_threshold=self.config.weak_threshold,
            strong_threshold=self.config.strong_threshold,
        ).mean()


METHOD = Method(
    name="crld",
    role="student",
    title="Cross-view consistency: softened predictions within and across a weak and a strong view",
    venue="ACM MM 2024",
    source="Zhang, Liu, Cai and Ma, ACM MM 2024, arXiv:2412.16493; weights and thresholds as released",
    differs="Each step sees two views of each image, so that it costs about twice a step of kd.",
    terms={"cross_entropy": {"weight": 1.0}, "view_cross_entropy": {"weight": 1.0}, "crld": {"weight": 1.0}},
)
