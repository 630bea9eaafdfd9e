"""Knowledge review: the student learns each level of the teacher from its own level and all deeper ones."""

from __future__ import annotations

from typing import final

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from soteacher.errors import InputError
from soteacher.objective import Method, Objective
from soteacher.objectives.connectors import BatchNormalization
from soteacher.objectives.example_rows import example_rows
from soteacher.objectives.features import FeatureConfig, TapPair, facts_of, map_shape, student_maps, teacher_maps
from soteacher.objectives.squares import squared_norm
from soteacher.precision import at_least_float32, full_precision
from soteacher.types import DistillStep, Task

LEVELS = (4, 2, 1)
"""Heights of the pooled maps that are compared besides the full ones."""


def hierarchical_context_distance(student_maps: Tensor, teacher_maps: Tensor) -> Tensor:
    r"""Mean squared distance at several resolutions, one value per example.

    .. math:: \sum_l 2^{-l} \, \overline{\left(P_l s - P_l t\right)^2} \Big/ \sum_l 2^{-l}

    :math:`P_0` leaves the maps as they are; :math:`P_1, P_2, \ldots` average them to 4, 2 and 1 pixels a side, as far
    as that is fewer than they have.

    Args:
        student_maps: ``[B, C, H, W]``; gradients flow.
        teacher_maps: of the same shape; a constant.

    Returns:
        ``[B]``, float32 (float64 from float64 maps); 0 where the two agree.

    Raises:
        InputError: the shapes differ or are not ``[B, C, H, W]``.

    Source: Chen, Liu, Zhao and Jia, CVPR 2021, arXiv:2104.09044 (hierarchical context loss); resolutions and weights
    as released.
    """
    if student_maps.ndim != 4 or student_maps.shape != teacher_maps.shape:
        raise InputError(
            f"maps of student and teacher must have one shape [B, C, H, W], got {list(student_maps.shape)} and "
            f"{list(teacher_maps.shape)}"
        )
    # Pooling is linear: the difference is pooled once instead of each side.
    difference = at_least_float32(student_maps) - at_least_float32(teacher_maps.detach())
    resolutions = _resolutions(difference)
    weights = [2.0**-index for index in range(len(resolutions))]
    levels = [
        squared_norm(rows) * (weight / rows.shape[1])
        for weight, rows in zip(weights, map(example_rows, resolutions), strict=True)
    ]
    return sum(levels[1:], levels[0]) / sum(weights)


def _resolutions(maps: Tensor) -> list[Tensor]:
    """Return the maps and what they are averaged to, each from the smallest that gives the same as the whole."""
    found, source = [maps], maps
    for level in LEVELS:
        if level < min(maps.shape[2:]):
            found.append(F.adaptive_avg_pool2d(source, level))
            source = found[-1] if all(side % level == 0 for side in source.shape[2:]) else source
    return found


@final
class AttentionFusion(nn.Module):
    """The student's maps of one level, fused with what comes up from the deeper ones.

    Both are weighed by two attention maps computed from them. The result goes on to the next shallower level, and, by a
    3x3 convolution, to the comparison with the teacher's maps.

    Args:
        in_channels: of the student's maps.
        channels: of what goes from level to level.
        out_channels: of the teacher's maps.
        size: height and width of the teacher's maps.
        fuses: whether there is a deeper level.
    """

    def __init__(
        self, in_channels: int, channels: int, out_channels: int, size: tuple[int, int], *, fuses: bool
    ) -> None:
        super().__init__()
        self.size = size
        self.entry = nn.Conv2d(in_channels, channels, 1, bias=False)
        self.entry_normalization = BatchNormalization(channels)
        self.attention = nn.Conv2d(2 * channels, 2, 1) if fuses else None
        self.exit = nn.Conv2d(channels, out_channels, 3, padding=1, bias=False)
        self.exit_normalization = BatchNormalization(out_channels)
        nn.init.kaiming_uniform_(self.entry.weight, a=1)
        nn.init.kaiming_uniform_(self.exit.weight, a=1)

    def forward(self, maps: Tensor, deeper: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return what is compared with the teacher, and what goes on to the next level, both of the teacher's size."""
        fused = self.entry_normalization(self.entry(maps))
        if self.attention is not None and deeper is not None:
            deeper = F.interpolate(deeper, fused.shape[-2:], mode="nearest")
            own_share, deeper_share = self.attention(torch.cat([fused, deeper], dim=1)).sigmoid().split(1, dim=1)
            fused = fused * own_share + deeper * deeper_share
        fused = F.interpolate(fused, self.size, mode="nearest") if fused.shape[-2:] != self.size else fused
        return self.exit_normalization(self.exit(fused)), fused


class ReviewConfig(FeatureConfig):
    """Settings of :class:`Review`. The pooled features are the deepest pair, after those of the taps."""

    default_taps = "preactivations"
    most_channels: int = Field(default=512, ge=1)
    """Most channels of what goes from level to level; it has those of the student's pooled feature up to this."""

    def build(self, task: Task) -> Review:
        """Return the objective with its fusion modules.

        Raises:
            InputError: there are no such taps.
        """
        pairs = self.pairs(task)
        if self.student_taps is None:  # the authors compare the teacher before its rectifiers, the student after them
            stages = tuple(pair.student.replace("preactivation", "stage") for pair in pairs)
            pairs = self.model_copy(update={"student_taps": stages}).pairs(task)
        student, teacher = facts_of(task)
        pooled = TapPair(
            student="pooled", teacher="pooled",
            student_shape=map_shape(student, "pooled"), teacher_shape=map_shape(teacher, "pooled"),
        )  # fmt: skip
        return Review(self, (*pairs, pooled))


@final
class Review(Objective[DistillStep]):
    """Match the teacher at every level with the student's fused levels; see :func:`hierarchical_context_distance`."""

    name = "review"

    def __init__(self, config: ReviewConfig, pairs: tuple[TapPair, ...]) -> None:
        super().__init__()
        self.config = config
        self.pairs = pairs
        self.features = tuple(pair.student for pair in pairs)
        self.teacher_features = tuple(pair.teacher for pair in pairs)
        channels = min(config.most_channels, pairs[-1].student_shape[0])
        self.fusions = nn.ModuleList(
            AttentionFusion(
                pair.student_shape[0], channels, pair.teacher_shape[0],
                (pair.teacher_shape[1], pair.teacher_shape[2]), fuses=pair is not pairs[-1],
            )
            for pair in pairs
        )  # fmt: skip

    def forward(self, step: DistillStep) -> Tensor:
        """Return the mean of the batch, summed over the levels."""
        own, wanted = student_maps(step, self.pairs), teacher_maps(step, self.pairs)
        distances: list[Tensor] = []
        deeper: Tensor | None = None
        with full_precision(own[0]):
            for index in reversed(range(len(self.pairs))):
                compared, deeper = self.fusions[index](own[index], deeper)
                distances.append(hierarchical_context_distance(compared, wanted[index]))
        return torch.stack(distances).sum(dim=0).mean()


# The authors' scripts for CIFAR-100 weigh the review with 5 for WRN-40-2 -> WRN-16-2, WRN-40-1 and ShuffleNetV1 and
# for ResNet32x4 -> ResNet8x4 and ShuffleNetV1; with 8 for ResNet32x4 -> ShuffleNetV2, with 0.6 for ResNet56 ->
# ResNet20, and with 1 for ResNet110 -> ResNet32.
METHOD = Method(
    name="review",
    role="student",
    title="Knowledge review: fused levels of the student match each level of the teacher",
    venue="CVPR 2021",
    source="Chen, Liu, Zhao and Jia, CVPR 2021, arXiv:2104.09044; the weight that most of the authors' scripts have",
    differs="The default weight is 5; the authors' is 0.6 to 8, by the pair. It grows from a twentieth in the "
    "first of 20 (of 240) epochs, theirs from zero. Their batches hold 128 examples and their momentum is Nesterov's.",
    terms={"cross_entropy": {}, "review": {"weight": 5.0, "ramp": "warmup"}},
)
