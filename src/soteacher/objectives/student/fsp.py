"""Flow of the solution procedure: the student goes from stage to stage as the teacher does."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import ClassVar, final

import torch
from torch import Tensor

from soteacher.errors import InputError
from soteacher.objective import Method, Objective
from soteacher.objectives.features import (
    FeatureConfig,
    TapPair,
    facts_of,
    map_shape,
    mismatch,
    student_maps,
    teacher_maps,
    to_smaller,
)
from soteacher.precision import at_least_float32, full_precision
from soteacher.types import DistillStep, Task


def flow_matrix(lower_maps: Tensor, upper_maps: Tensor) -> Tensor:
    r"""How the channels of one layer go with those of a later one, for each example.

    .. math:: G_{ij} = \frac{1}{H W} \sum_p F_{i,p} \, F'_{j,p}

    Args:
        lower_maps: :math:`F`, ``[B, C, H, W]``; gradients flow.
        upper_maps: :math:`F'`, ``[B, D, H', W']``; gradients flow. The larger maps of the two are averaged to the
            smaller.

    Returns:
        ``[B, C, D]``, float32 (float64 from float64 maps).

    Raises:
        InputError: the arguments are not maps of the same examples.

    Source: Yim et al., CVPR 2017, equation 1 (numbers of equations in this file are from memory of the paper, not
    checked).
    """
    if lower_maps.ndim != 4 or upper_maps.ndim != 4 or len(lower_maps) != len(upper_maps):
        raise InputError(
            f"maps of two layers must be [B, C, H, W] with one B, got {list(lower_maps.shape)} and "
            f"{list(upper_maps.shape)}"
        )
    lower, upper = to_smaller(at_least_float32(lower_maps), at_least_float32(upper_maps))
    lower, upper = lower.flatten(2), upper.flatten(2)
    with full_precision(lower):
        return lower @ upper.mT / lower.shape[-1]


def flow_distance(student_maps: Sequence[Tensor], teacher_maps: Sequence[Tensor]) -> Tensor:
    r"""Mean squared distance of the flow matrices of neighbouring layers, summed over these, one value per example.

    .. math:: \sum_l \frac{1}{C_l C_{l+1}} \| G_s^l - G_t^l \|_F^2

    Args:
        student_maps: two or more layers from shallow to deep, each ``[B, C_l, H, W]``; gradients flow.
        teacher_maps: as many layers with the same channels, of any heights and widths; constants.

    Returns:
        ``[B]``, float32 (float64 from float64 maps); 0 where the two agree.

    Raises:
        InputError: other numbers of layers or channels.

    Source: Yim et al., CVPR 2017, equation 2; a mean over the matrix, as RepDistiller has it, for the paper's sum.
    """
    students, teachers = [maps.shape[:2] for maps in student_maps], [maps.shape[:2] for maps in teacher_maps]
    if len(students) < 2 or students != teachers:
        raise InputError(
            f"two or more layers with the same [B, C] are wanted, got {[list(shape) for shape in students]} (student) "
            f"and {[list(shape) for shape in teachers]} (teacher)"
        )
    layers = zip(pairwise(student_maps), pairwise([maps.detach() for maps in teacher_maps]), strict=True)
    distances = [
        (flow_matrix(*student) - flow_matrix(*teacher)).square().mean(dim=(1, 2)) for student, teacher in layers
    ]
    return torch.stack(distances).sum(dim=0)


class FSPConfig(FeatureConfig):
    """Settings of :class:`FSP`: the taps are the stages, and the stem before them where both networks have one."""

    prepares_alone: ClassVar[bool] = True

    def build(self, task: Task) -> FSP:
        """Return the objective.

        Raises:
            InputError: a layer of the student has other channels than the teacher's, or there is one layer only.
        """
        pairs = self.pairs(task)
        if self.student_taps is None and self.teacher_taps is None:
            pairs = (*_stems(task), *pairs)
        for pair in pairs:
            if len(pairs) < 2 or pair.student_shape[0] != pair.teacher_shape[0]:
                raise mismatch(
                    "fsp",
                    task,
                    pair,
                    "two or more taps of equal channels are wanted, as of wrn_40_2 and wrn_16_2: set student_taps and "
                    "teacher_taps or take another method",
                )
        return FSP(pairs)


def _stems(task: Task) -> tuple[TapPair, ...]:
    """Return the pair of the stems; nothing where a network has none."""
    student, teacher = facts_of(task)
    if "stem" not in list(student.taps) or "stem" not in list(teacher.taps):
        return ()
    shapes = map_shape(student, "stem"), map_shape(teacher, "stem")
    return (TapPair(student="stem", teacher="stem", student_shape=shapes[0], teacher_shape=shapes[1]),)


@final
class FSP(Objective[DistillStep]):
    """Match the teacher's flow matrices of neighbouring layers; see :func:`flow_distance`."""

    name = "fsp"

    def __init__(self, pairs: Sequence[TapPair]) -> None:
        super().__init__()
        self.pairs = tuple(pairs)
        self.features = tuple(pair.student for pair in pairs)
        self.teacher_features = tuple(pair.teacher for pair in pairs)

    def forward(self, step: DistillStep) -> Tensor:
        """Return the mean distance of the batch."""
        return flow_distance(student_maps(step, self.pairs), teacher_maps(step, self.pairs)).mean()


METHOD = Method(
    name="fsp",
    role="student",
    title="Flow of the solution procedure: prepared by the teacher's flow matrices, then trained on the labels",
    venue="CVPR 2017",
    source="Yim, Joo, Bae and Kim, CVPR 2017; weight as RepDistiller's released code uses it",
    differs="RepDistiller's script names a weight of 50, which its code leaves out of the preparation, the only "
    "place of the loss; and its preparation leaves the classifier out.",
    terms={"cross_entropy": {"weight": 1.0}, "fsp": {"weight": 1.0, "stage": "preparation"}},
)
