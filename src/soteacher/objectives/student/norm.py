"""NORM: many linear views of the student's maps each match the teacher's maps."""

from __future__ import annotations

from collections.abc import Sequence
from typing import final

import torch
from pydantic import Field
from torch import Tensor, nn

from soteacher.errors import InputError
from soteacher.objective import Method, Objective
from soteacher.objectives.connectors import MapConnector
from soteacher.objectives.features import FeatureConfig, TapPair, resize, student_maps, teacher_maps
from soteacher.precision import at_least_float32, full_precision
from soteacher.types import DistillStep, Task


def segment_distance(expanded: Tensor, teacher_maps: Tensor) -> Tensor:
    r"""Mean squared distance of maps from the teacher's, summed over segments of channels, one value per example.

    .. math:: \sum_{n=1}^{N} \frac{1}{C H W} \lVert F_n - F_t \rVert^2

    Args:
        expanded: ``[B, N C, H, W]``, segment after segment; gradients flow.
        teacher_maps: ``[B, C, H, W]``; a constant.

    Returns:
        ``[B]``; 0 where each segment equals the teacher's maps.

    Raises:
        InputError: the shapes do not fit.

    Source: Liu et al., ICLR 2023, arXiv:2305.13803, as released.
    """
    batch, channels = teacher_maps.shape[:2]
    fits = expanded.ndim == teacher_maps.ndim == 4 and expanded.shape[2:] == teacher_maps.shape[2:]
    if not fits or len(expanded) != batch or expanded.shape[1] % channels:
        raise InputError(
            "segments need expanded maps [B, N C, H, W] and the teacher's [B, C, H, W], got "
            f"{list(expanded.shape)} and {list(teacher_maps.shape)}"
        )
    segments = at_least_float32(expanded).unflatten(1, (-1, channels))
    distance = (segments - at_least_float32(teacher_maps.detach()).unsqueeze(1)).square()
    return distance.mean(dim=(2, 3, 4)).sum(dim=1)


class NORMConfig(FeatureConfig):
    """Settings of :class:`NORM`."""

    default_taps = "last_stage"
    num_segments: int = Field(default=8, gt=0)
    """N, the views of the student's maps: the transform has N times as many channels as the teacher."""

    def build(self, task: Task) -> NORM:
        """Return the objective with its feature transforms."""
        return NORM(self, self.pairs(task))


@final
class NORM(Objective[DistillStep]):
    """Match linear views of the student's maps with the teacher's; see :func:`segment_distance`."""

    name = "norm"

    def __init__(self, config: NORMConfig, pairs: Sequence[TapPair]) -> None:
        super().__init__()
        self.config, self.pairs = config, tuple(pairs)
        self.features = tuple(pair.student for pair in pairs)
        self.teacher_features = tuple(pair.teacher for pair in pairs)
        self.transforms = nn.ModuleList(_transform(pair, config.num_segments) for pair in pairs)

    def forward(self, step: DistillStep) -> Tensor:
        """Return the mean over the batch of the distance, summed over pairs."""
        students, teachers = student_maps(step, self.pairs), teacher_maps(step, self.pairs)
        distances: list[Tensor] = []
        for transform, student, teacher in zip(self.transforms, students, teachers, strict=True):
            with full_precision(student):
                expanded: Tensor = transform(student)
            distances.append(segment_distance(expanded, resize(teacher, (expanded.shape[2], expanded.shape[3]))))
        return torch.stack(distances).sum(dim=0).mean()


def _transform(pair: TapPair, num_segments: int) -> MapConnector:
    """Return the linear layer that makes N segments, of the smaller height and width of both."""
    (channels, *own), (teacher_channels, *other) = pair.student_shape, pair.teacher_shape
    height, width = (min(sizes) for sizes in zip(own, other, strict=True))
    return MapConnector(channels, num_segments * teacher_channels, (height, width))


DIFFERS = (
    "The transform stands beside the student. In the released code it is a part of it: a second linear layer contracts "
    "the views and adds them to the maps, and both are merged into the classifier in the end; the logits are "
    "normalised and multiplied by 2.5, also in evaluation. Maps of different sizes are averaged, not max-pooled; the "
    "weight rises over the first 20 of 240 epochs in a line, not in steps of 0.1, 0.5 and 1, and does not fall in the "
    "last 60."
)

METHOD = Method(
    name="norm",
    role="student",
    title="NORM: eight linear views of the student's maps, each like the teacher's",
    venue="ICLR 2023",
    source="Liu, Li, Li and Yao, ICLR 2023, arXiv:2305.13803; weights of the released example for CIFAR-100",
    differs=DIFFERS,
    terms={"cross_entropy": {"weight": 0.1}, "norm": {"weight": 1.0, "ramp": "warmup"}},
)
