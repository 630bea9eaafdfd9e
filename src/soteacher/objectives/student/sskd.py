"""SSKD: the student also matches the teacher on rotated views, and how the teacher relates these to the images."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar, final

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from soteacher.errors import InputError
from soteacher.objective import Method, Objective, ObjectiveConfig
from soteacher.objectives.features import facts_of, vector_shape
from soteacher.objectives.student.sskd_head import SelfSupervisionHead, SSKDHead, own_images
from soteacher.precision import at_least_float32
from soteacher.types import DistillStep, Task, View


def kept_by_rank(scores: Tensor, right: Tensor, *, share: float) -> Tensor:
    r"""Say which rows are kept: those whose right entry is the greatest, and of the others the least wrong ones.

    A row is the more wrong the more entries are above its right one; of the wrong rows, :math:`w` in number,
    :math:`\lfloor \text{share} \cdot w \rfloor` are kept, the earlier ones among equals.

    Args:
        scores: ``[N, K]``.
        right: ``[N]`` int64, the right entry of each row.
        share: of the wrong rows that is kept, in [0, 1].

    Returns:
        ``[N]`` bool.

    Raises:
        InputError: a share outside [0, 1].

    Source: Xu et al., ECCV 2020, arXiv:2006.07114. Of equal scores the authors' code takes any order; here
    an entry counts as above another only where it is greater.
    """
    if not 0 <= share <= 1:
        raise InputError(f"share must be in [0, 1], got {share}")
    scores = scores.detach()
    rank = (scores > scores.gather(1, right[:, None])).sum(dim=1)
    num_wrong = (rank > 0).sum()
    num_kept = (rank == 0).sum() + (num_wrong.double() * share).floor()
    return rank.argsort(stable=True).argsort() < num_kept


def selected_divergence(
    student_logits: Tensor, teacher_logits: Tensor, right: Tensor, *, temperature: float, share: float
) -> Tensor:
    r"""Divergence of the softened student from the softened teacher, over the rows in which to trust the teacher.

    .. math:: \frac{\tau^2}{|S|} \sum_{i \in S} \mathrm{KL}\left(\sigma(t_i / \tau) \,\|\, \sigma(s_i / \tau)\right)

    with :math:`S` the rows that :func:`kept_by_rank` keeps by the teacher's logits.

    Args:
        student_logits: ``[N, K]``; gradients flow.
        teacher_logits: ``[N, K]``; a constant.
        right: ``[N]`` int64, the right entry of each row.
        temperature: :math:`\tau > 0`, dimensionless.
        share: of the rows with a wrong teacher that is kept, in [0, 1].

    Returns:
        Scalar, nats times :math:`\tau^2`; 0 where the two agree, and where no row is kept.

    Raises:
        InputError: the shapes differ, the temperature is not positive and finite, or a share outside [0, 1].

    Source: Xu et al., ECCV 2020, arXiv:2006.07114.
    """
    if student_logits.ndim != 2 or student_logits.shape != teacher_logits.shape:
        raise InputError(
            f"student and teacher logits must have one shape [N, K], got {list(student_logits.shape)} (student) and "
            f"{list(teacher_logits.shape)} (teacher)"
        )
    if not temperature > 0 or not math.isfinite(temperature):
        raise InputError(f"temperature must be positive and finite, got {temperature}")
    teacher_logits = at_least_float32(teacher_logits.detach())
    kept = kept_by_rank(teacher_logits, right, share=share)
    log_student = F.log_softmax(at_least_float32(student_logits) / temperature, dim=1)
    log_teacher = F.log_softmax(teacher_logits / temperature, dim=1)
    divergence = F.kl_div(log_student, log_teacher, reduction="none", log_target=True).sum(dim=1)
    return temperature**2 * (divergence * kept).sum() / kept.sum().clamp(min=1)


class SSKDConfig(ObjectiveConfig):
    """Settings of :class:`SSKD`."""

    takes_over: ClassVar[str | None] = "sskd_head"
    reads: ClassVar[str] = "`pooled` of both networks, also of the turned images"
    needs_teacher: ClassVar[bool] = True
    rotated_weight: float = Field(default=2.7, gt=0)
    """Factor of the divergence on the rotated views."""
    rotated_temperature: float = Field(default=4.0, gt=0)
    """Softening of both networks' predictions of the rotated views, dimensionless."""
    rotated_share: float = Field(default=1.0, ge=0, le=1)
    """Of the views that the teacher does not recognise, the share that is kept, the least wrong ones first."""
    similarity_weight: float = Field(default=10.0, gt=0)
    """Factor of the divergence of the similarities between views and images."""
    similarity_temperature: float = Field(default=0.5, gt=0)
    """Softening of both networks' similarities, dimensionless."""
    similarity_share: float = Field(default=0.75, ge=0, le=1)
    """Of the views whose own image the teacher's head does not find, the share that is kept."""

    def build(self, task: Task) -> SSKD:
        """Return the objective for the widths of both networks' pooled features."""
        student, teacher = facts_of(task)
        return SSKD(self, vector_shape(student, "pooled")[0], vector_shape(teacher, "pooled")[0])


@final
class SSKD(Objective[DistillStep]):
    """Match the teacher's predictions of rotated views, and its similarities between views and images.

    The similarities are those of embeddings behind a head on either network; the student's is trained here, the
    teacher's comes from the preparation by ``sskd_head`` and stays.

    Args:
        config: the settings.
        student_width: of the student's pooled feature.
        teacher_width: of the teacher's.
    """

    name = "sskd"
    features = ("pooled",)
    teacher_features = ("pooled",)
    views: ClassVar[tuple[View, ...]] = ("rotated",)

    def __init__(self, config: SSKDConfig, student_width: int, teacher_width: int) -> None:
        super().__init__()
        self.config = config
        self.head = SelfSupervisionHead(student_width)
        self.teacher_head = SelfSupervisionHead(teacher_width).requires_grad_(False)

    def start(self, prepared: Mapping[str, Objective[Any]]) -> None:
        """Take over the teacher's head.

        Raises:
            InputError: the preparation has made none.
        """
        found = prepared.get("sskd_head")
        if not isinstance(found, SSKDHead):
            raise InputError("sskd takes over a trained head: add the term 'sskd_head: {stage: preparation}'")
        self.teacher_head.load_state_dict(found.head.state_dict())

    def forward(self, step: DistillStep) -> Tensor:
        """Return the weighted sum of the two divergences."""
        config = self.config
        views, teacher_views = step.views["rotated"], step.teacher_views["rotated"]
        rotated = selected_divergence(
            views.logits, teacher_views.logits, step.labels.repeat(len(views.logits) // len(step.labels)),
            temperature=config.rotated_temperature, share=config.rotated_share,
        )  # fmt: skip
        student = self.head(views.features["pooled"], step.outputs.features["pooled"])
        with torch.no_grad():
            teacher = self.teacher_head(teacher_views.features["pooled"], step.teacher.features["pooled"])
        similarity = selected_divergence(
            student, teacher, own_images(teacher),
            temperature=config.similarity_temperature, share=config.similarity_share,
        )  # fmt: skip
        return config.rotated_weight * rotated + config.similarity_weight * similarity


METHOD = Method(
    name="sskd",
    role="student",
    title="Knowledge distillation on images and rotated views, and the teacher's similarities between the two",
    venue="ECCV 2020",
    source="Xu, Liu, Li and Loy, ECCV 2020, arXiv:2006.07114; weights and temperatures as released",
    differs=(
        "Views are turned after the crop, and pass through the network apart from the images, so that batch "
        "normalisation sees the two apart; there each view has a crop of its own, and all pass together. The teacher's "
        "head is trained as long as there (a quarter of the run) but at one learning rate, which there falls after "
        "half and three quarters of that stage."
    ),
    terms={
        "sskd_head": {"stage": "preparation"},
        "cross_entropy": {"weight": 0.1},
        "kd": {"weight": 0.9, "temperature": 4.0},
        "sskd": {"weight": 1.0},
    },
    training={"preparation_epochs": 60 / 240},
)
