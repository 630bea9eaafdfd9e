"""Activation boundaries: the student's neurons learn on which side of zero the teacher's are."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import ClassVar, final

from pydantic import Field
from torch import Tensor, nn

from soteacher.errors import InputError
from soteacher.objective import Method, Objective
from soteacher.objectives.connectors import MapConnector
from soteacher.objectives.features import FeatureConfig, TapPair, student_maps, teacher_maps
from soteacher.precision import at_least_float32, full_precision
from soteacher.types import DistillStep, Task

SCALE = 3 / 1000
"""Factor of the sum over all neurons, as released."""


def activation_boundary_distance(
    student_maps: Sequence[Tensor], teacher_maps: Sequence[Tensor], *, margin: float
) -> Tensor:
    r"""How far the student's neurons lie on the wrong side of the teacher's boundaries, one value per example.

    .. math:: \frac{3}{1000} \sum_{i=1}^{n} 2^{i-n} \sum_j
        \left[ t_{ij} \le 0 \right] \max(0, s_{ij} + m)^2 + \left[ t_{ij} > 0 \right] \max(0, m - s_{ij})^2

    over the stages :math:`i` and all their neurons :math:`j`, which are positions and channels.

    Args:
        student_maps: per stage, from shallow to deep, ``[B, C, H, W]`` before a rectifier; gradients flow.
        teacher_maps: of the same shapes, before the rectifier; constants, of which only the sign is read.
        margin: m, how far from zero a neuron must be to count as decided; positive.

    Returns:
        ``[B]``, float32 (float64 from float64 maps); 0 where every neuron is on the teacher's side by the margin.

    Raises:
        InputError: no stage, numbers of stages or shapes that differ, or a margin that is not positive and finite.

    Source: Heo, Lee, Yun and Choi, AAAI 2019, arXiv:1811.03233; weights of the stages and the factor 3/1000
    as released.
    """
    if len(student_maps) != len(teacher_maps) or not student_maps:
        raise InputError(
            f"as many maps of the student as of the teacher are wanted, at least one: got {len(student_maps)} and "
            f"{len(teacher_maps)}"
        )
    if not margin > 0 or not math.isfinite(margin):
        raise InputError(f"margin must be positive and finite, got {margin}")
    deepest = len(student_maps) - 1
    stages = [
        2.0 ** (index - deepest) * _boundary_distance(student, teacher, margin)
        for index, (student, teacher) in enumerate(zip(student_maps, teacher_maps, strict=True))
    ]
    return SCALE * sum(stages[1:], stages[0])


def _boundary_distance(student: Tensor, teacher: Tensor, margin: float) -> Tensor:
    if student.shape != teacher.shape:
        raise InputError(
            f"maps of student and teacher must have one shape, got {list(student.shape)} and {list(teacher.shape)}"
        )
    student = at_least_float32(student)
    # Turned so that the wrong side is the positive one: -s where the teacher's neuron is active, s elsewhere.
    wrong = student.where(teacher.detach() <= 0, -student)
    return (wrong + margin).clamp_min(0).square().flatten(1).sum(dim=1)


class ActivationBoundaryConfig(FeatureConfig):
    """Settings of :class:`ActivationBoundary`."""

    default_taps = "preactivations"
    prepares_alone: ClassVar[bool] = True
    margin: float = Field(default=1.0, gt=0)
    """How far from zero a student's neuron must be to count as decided."""

    def build(self, task: Task) -> ActivationBoundary:
        """Return the objective with its connectors.

        Raises:
            InputError: there are no such taps.
        """
        return ActivationBoundary(self, self.pairs(task))


@final
class ActivationBoundary(Objective[DistillStep]):
    """Put the student's neurons on the teacher's side of zero; see :func:`activation_boundary_distance`.

    Where shapes differ, the student's pre-activations go through a 1x1 convolution and normalisation to the teacher's
    channels and size; where they are equal, they are compared as they are, as the authors do.
    """

    name = "activation_boundary"

    def __init__(self, config: ActivationBoundaryConfig, pairs: tuple[TapPair, ...]) -> None:
        super().__init__()
        self.config = config
        self.pairs = pairs
        self.features = tuple(pair.student for pair in pairs)
        self.teacher_features = tuple(pair.teacher for pair in pairs)
        self.connectors = nn.ModuleList(_connector(pair) for pair in pairs)

    def forward(self, step: DistillStep) -> Tensor:
        """Return the mean distance of the batch."""
        own, wanted = student_maps(step, self.pairs), teacher_maps(step, self.pairs)
        with full_precision(own[0]):
            bridged = [connector(maps) for connector, maps in zip(self.connectors, own, strict=True)]
            return activation_boundary_distance(bridged, wanted, margin=self.config.margin).mean()


def _connector(pair: TapPair) -> nn.Module:
    if pair.student_shape == pair.teacher_shape:
        return nn.Identity()
    channels, height, width = pair.teacher_shape
    return MapConnector(pair.student_shape[0], channels, (height, width))


METHOD = Method(
    name="activation_boundary",
    role="student",
    title="Activation boundaries: the student begins from the teacher's neurons' signs, then learns the labels",
    venue="AAAI 2019",
    source="Heo, Lee, Yun and Choi, AAAI 2019, arXiv:1811.03233; setting of Tian et al., ICLR 2020, arXiv:1910.10699",
    differs="Connectors are 1x1 convolutions, as in the authors' code; maps of other sizes are averaged or "
    "interpolated, where the benchmark has strided or transposed convolutions. The authors train with softened "
    "predictions afterwards, the benchmark with labels alone, as here. Stages without preactivations are as they are.",
    terms={"cross_entropy": {}, "activation_boundary": {"weight": 1.0, "stage": "preparation"}},
)
