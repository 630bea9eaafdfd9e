"""Attention transfer: the student looks where the teacher looks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import final

import torch
from torch import Tensor

from soteacher.objective import Method, Objective
from soteacher.objectives.features import FeatureConfig, TapPair, mismatch, student_maps, teacher_maps, to_smaller
from soteacher.objectives.shapes import check_maps
from soteacher.objectives.squares import mean_square
from soteacher.objectives.unit_vectors import unit_vectors
from soteacher.precision import at_least_float32
from soteacher.types import DistillStep, Task


def attention_map(maps: Tensor) -> Tensor:
    r"""Where a layer is active: the mean of the squared channels, as a vector of length 1 for each example.

    .. math:: Q = \frac{q}{\|q\|_2}, \quad q_p = \frac{1}{C} \sum_c F_{c,p}^2

    Args:
        maps: ``[B, C, H, W]``; gradients flow.

    Returns:
        ``[B, H * W]``, float32 (float64 from float64 maps), not negative; zeros where all maps are 0.

    Source: Zagoruyko and Komodakis, ICLR 2017, arXiv:1612.03928, section 3.1 (from memory of the paper, not
    checked), the sum of squares.
    """
    return unit_vectors(mean_square(at_least_float32(maps), 1).flatten(1))


def attention_distance(student_maps: Tensor, teacher_maps: Tensor) -> Tensor:
    r"""Mean squared distance of the attention maps, one value per example.

    .. math:: \frac{1}{H W} \| Q_s - Q_t \|_2^2

    Args:
        student_maps: ``[B, C_s, H_s, W_s]``; gradients flow.
        teacher_maps: ``[B, C_t, H_t, W_t]``; a constant. The larger maps of the two are averaged to the smaller.

    Returns:
        ``[B]``, float32 (float64 from float64 maps); 0 where the two agree. A factor of either maps changes nothing.

    Raises:
        InputError: the arguments are not maps of the same examples.

    Source: Zagoruyko and Komodakis, ICLR 2017, arXiv:1612.03928; squared and averaged over the pixels as in
    RepDistiller's code, where the larger maps are pooled too.
    """
    check_maps(student_maps, teacher_maps)
    student, teacher = to_smaller(at_least_float32(student_maps), at_least_float32(teacher_maps.detach()))
    return (attention_map(student) - attention_map(teacher)).square().mean(dim=1)


class AttentionConfig(FeatureConfig):
    """Settings of :class:`Attention`."""

    def build(self, task: Task) -> Attention:
        """Return the objective for the task's networks, of any channels and sizes.

        Raises:
            InputError: no pair of maps has more than one place to look at.
        """
        pairs = self.pairs(task)
        if all(1 in (_places(pair.student_shape), _places(pair.teacher_shape)) for pair in pairs):
            advice = "attention is to places in maps, and one of the two has a single one: choose taps of larger maps"
            raise mismatch("attention", task, pairs[0], advice)
        return Attention(pairs)


def _places(shape: tuple[int, ...]) -> int:
    return shape[1] * shape[2]


@final
class Attention(Objective[DistillStep]):
    """Match the teacher's attention in every stage; see :func:`attention_distance`."""

    name = "attention"

    def __init__(self, pairs: Sequence[TapPair]) -> None:
        super().__init__()
        self.pairs = tuple(pairs)
        self.features = tuple(pair.student for pair in pairs)
        self.teacher_features = tuple(pair.teacher for pair in pairs)

    def forward(self, step: DistillStep) -> Tensor:
        """Return the mean distance of the batch, summed over the stages."""
        both = zip(student_maps(step, self.pairs), teacher_maps(step, self.pairs), strict=True)
        return torch.stack([attention_distance(student, teacher).mean() for student, teacher in both]).sum()


METHOD = Method(
    name="attention",
    role="student",
    title="Attention transfer: the student's stages are active where the teacher's are",
    venue="ICLR 2017",
    source="Zagoruyko and Komodakis, ICLR 2017, arXiv:1612.03928; weight of RepDistiller's benchmark",
    terms={"cross_entropy": {"weight": 1.0}, "attention": {"weight": 1000.0}},
)
