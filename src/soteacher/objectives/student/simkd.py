"""Distillation with the reused teacher classifier: the student's last maps become the teacher's."""

from __future__ import annotations

from typing import ClassVar, final

from pydantic import Field
from torch import Tensor

from soteacher.errors import InputError
from soteacher.objective import Method, Objective, ObjectiveConfig, ReusedClassifier
from soteacher.objectives.features import as_maps, facts_of, to_smaller
from soteacher.types import DistillStep, Task


def projected_distance(projected: Tensor, teacher_feature: Tensor) -> Tensor:
    r"""Mean squared distance of the projected feature from the teacher's, one value per example.

    .. math:: \frac{1}{D H W} \left\| P(F_s) - F_t \right\|^2

    Maps that differ in height and width are compared in the smaller one: the larger are averaged down.

    Args:
        projected: :math:`P(F_s)`, maps ``[B, D, H, W]`` or vectors ``[B, D]``; gradients flow.
        teacher_feature: :math:`F_t`, the same with as many channels; a constant.

    Returns:
        ``[B]``, float32 (float64 from float64 features); 0 where the two agree.

    Raises:
        InputError: one is maps and the other vectors, or examples or channels differ.

    Source: Chen et al., CVPR 2022, arXiv:2203.14001, with the mean over pixels and channels as in the authors' code.
    """
    if projected.ndim != teacher_feature.ndim or projected.shape[:2] != teacher_feature.shape[:2]:
        raise InputError(
            f"wanted two maps [B, D, H, W] or two vectors [B, D] of one B and D, got {list(projected.shape)} "
            f"(projected) and {list(teacher_feature.shape)} (teacher)"
        )
    ours, theirs = to_smaller(as_maps(projected), as_maps(teacher_feature.detach()))
    return (ours - theirs).square().mean(dim=(1, 2, 3))


class SimKDConfig(ObjectiveConfig):
    """Settings of :class:`SimKD`."""

    reads: ClassVar[str] = "the student's `projected` and the teacher's `maps`, or `pooled` where a network has no maps"
    needs_teacher: ClassVar[bool] = True
    reduction: int = Field(default=2, ge=1)
    """The projector's inner channels are the teacher's divided by this."""

    def reuse(self) -> ReusedClassifier:
        """Return that the student ends in a projector and in the teacher's classifier."""
        return ReusedClassifier(reduction=self.reduction)

    def build(self, task: Task) -> SimKD:
        """Return the objective for a student that has its projector.

        Raises:
            InputError: it has none, or the teacher has no feature that the projected one can be compared with.
        """
        student, teacher = facts_of(task)
        if "projected" not in list(student.taps):
            raise InputError(
                f"simkd: {student.name} has no projector; let it take over the teacher's classifier first "
                "(soteacher.models.takeover)"
            )
        shape = student.taps["projected"]
        tap = "maps" if len(shape) == 3 else "pooled"
        if tap not in list(teacher.taps) or teacher.taps[tap][0] != shape[0]:
            raise InputError(
                f"simkd: {student.name} projects to {list(shape)}, and {teacher.name} has no tap {tap!r} with as many "
                "channels; a student fits the teacher whose classifier it has"
            )
        return SimKD(teacher_tap=tap)


@final
class SimKD(Objective[DistillStep]):
    """Match what the teacher's classifier takes in, with a student that ends in it; see :func:`projected_distance`.

    The student takes the classifier over when it is put together: the projector and the frozen classifier are part of
    it, of its parameter count and its file (:mod:`soteacher.models.reused_classifier`).
    """

    name = "simkd"

    def __init__(self, *, teacher_tap: str) -> None:
        """``teacher_tap``: ``maps`` where the student projects maps, ``pooled`` where it projects vectors."""
        super().__init__()
        self.features = ("projected",)
        self.teacher_features = (teacher_tap,)

    def forward(self, step: DistillStep) -> Tensor:
        """Return the mean distance of the batch."""
        teacher_feature = step.teacher.features[self.teacher_features[0]]
        return projected_distance(step.outputs.features["projected"], teacher_feature).mean()


METHOD = Method(
    name="simkd",
    role="student",
    title="The student's last maps become the teacher's, whose classifier it takes over; no labels",
    venue="CVPR 2022",
    source="Chen, Mei, Zhang, Wang, Feng and Chen, CVPR 2022, arXiv:2203.14001",
    differs=(
        "A student's maps that are larger than the teacher's are averaged down behind the projector, in the authors' "
        "code before it. Where one of the networks has no last maps (transformers), the pooled vectors are projected, "
        "by two linear layers without a rectifier at their end: that is ours."
    ),
    terms={"simkd": {}},
)
