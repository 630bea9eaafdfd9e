"""Overhaul of feature distillation: a margin for the negative values, and a distance that skips the harmless ones."""

from __future__ import annotations

from typing import final

import torch
from torch import Tensor, nn

from soteacher.errors import InputError
from soteacher.objective import Method, Objective
from soteacher.objectives.connectors import MapConnector
from soteacher.objectives.features import FeatureConfig, TapPair, student_maps, teacher_maps
from soteacher.precision import at_least_float32, full_precision
from soteacher.types import DistillStep, Task

SMALLEST_SHARE = 0.001
"""Below this share of negative values their mean is not computed: three deviations below zero stand for it."""
EPSILON = 1e-12
"""The smallest standard deviation that is divided by."""


def negative_mean(mean: Tensor, deviation: Tensor) -> Tensor:
    r"""Mean of the negative values of a normal distribution: the margin of a channel.

    .. math:: \mathrm{E}[x \mid x < 0] = \mu - \sigma \, \frac{\varphi(\mu / \sigma)}{\Phi(-\mu / \sigma)},
        \quad x \sim \mathcal{N}(\mu, \sigma^2)

    and :math:`-3 \sigma` where less than a thousandth of the values is negative.

    Args:
        mean: :math:`\mu` of each channel, of any shape.
        deviation: :math:`\sigma \ge 0`, of the same shape.

    Returns:
        The same shape, float32 (float64 from float64); never above zero.

    Raises:
        InputError: the shapes differ.

    Source: Heo, Kim, Yun, Park, Kwak and Choi, ICCV 2019, arXiv:1904.01866; the fallback as released.
    """
    if mean.shape != deviation.shape:
        raise InputError(
            f"means and deviations must have one shape, got {list(mean.shape)} and {list(deviation.shape)}"
        )
    mean, deviation = at_least_float32(mean), at_least_float32(deviation)
    ratio = mean / deviation.clamp_min(EPSILON)
    share = torch.special.ndtr(-ratio)
    density = torch.exp(-ratio.square() / 2) / (2 * torch.pi) ** 0.5
    expected = mean - deviation * density / share.clamp_min(SMALLEST_SHARE)
    return expected.where(share > SMALLEST_SHARE, -3 * deviation)


def partial_l2_distance(student_maps: Tensor, teacher_maps: Tensor, *, margins: Tensor) -> Tensor:
    r"""Squared distance from the teacher's margin-rectified maps, one value per example.

    .. math:: \sum_j \begin{cases} 0 & s_j \le t_j \le 0 \\ (s_j - t_j)^2 & \text{otherwise} \end{cases},
        \quad t = \max(x, m_c)

    A rectifier makes the same of all negative values, so that a student below a negative target is right already.

    Args:
        student_maps: ``[B, C, H, W]`` before a rectifier; gradients flow.
        teacher_maps: x of the same shape, before the rectifier; a constant.
        margins: m ``[C]``, not above zero; constants. See :func:`negative_mean`.

    Returns:
        ``[B]``, float32 (float64 from float64 maps); the sum over positions and channels.

    Raises:
        InputError: the shapes differ.

    Source: Heo et al., ICCV 2019, arXiv:1904.01866.
    """
    if student_maps.shape != teacher_maps.shape or margins.shape != student_maps.shape[1:2]:
        raise InputError(
            f"maps must have one shape [B, C, H, W] and margins [C], got {list(student_maps.shape)} (student), "
            f"{list(teacher_maps.shape)} (teacher) and {list(margins.shape)}"
        )
    student = at_least_float32(student_maps)
    target = at_least_float32(teacher_maps.detach()).maximum(margins.detach()[:, None, None])
    counts = (student > target) | (target > 0)
    return ((student - target).square() * counts).flatten(1).sum(dim=1)


class OFDConfig(FeatureConfig):
    """Settings of :class:`OFD`."""

    default_taps = "preactivations"

    def build(self, task: Task) -> OFD:
        """Return the objective with its connectors.

        Raises:
            InputError: there are no such taps.
        """
        return OFD(self.pairs(task))


@final
class ChannelStatistics(nn.Module):
    """Mean and variance of each channel over all examples seen so far; state only, nothing is trained.

    Args:
        channels: C.
    """

    mean: Tensor
    variance: Tensor
    num_examples: Tensor

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(channels))
        self.register_buffer("variance", torch.zeros(channels))
        self.register_buffer("num_examples", torch.zeros((), dtype=torch.int64))

    def with_batch(self, maps: Tensor) -> tuple[Tensor, Tensor]:
        """Return mean and variance ``[C]`` with another batch ``[B, C, H, W]`` counted in; changes nothing."""
        variance, mean = torch.var_mean(maps, dim=(0, 2, 3), correction=0)
        share = len(maps) / (self.num_examples + len(maps))
        apart = mean - self.mean
        joint = self.variance.lerp(variance, share) + share * (1 - share) * apart.square()
        return self.mean + share * apart, joint

    def take_in(self, maps: Tensor) -> None:
        """Count another batch in for good."""
        mean, variance = self.with_batch(maps)
        self.mean.copy_(mean)
        self.variance.copy_(variance)
        self.num_examples.add_(len(maps))


@final
class OFD(Objective[DistillStep]):
    """Match the teacher's pre-activations as far as its rectifier lets them through; see :func:`partial_l2_distance`.

    The student's go through a 1x1 convolution and normalisation to the teacher's channels and size. Stage i of n counts
    :math:`2^{i - n}`. The margins come from the teacher's pre-activations in all steps so far, this one included.
    """

    name = "ofd"

    def __init__(self, pairs: tuple[TapPair, ...]) -> None:
        super().__init__()
        self.pairs = pairs
        self.features = tuple(pair.student for pair in pairs)
        self.teacher_features = tuple(pair.teacher for pair in pairs)
        self.connectors = nn.ModuleList(
            MapConnector(pair.student_shape[0], pair.teacher_shape[0], (pair.teacher_shape[1], pair.teacher_shape[2]))
            for pair in pairs
        )
        self.statistics = nn.ModuleList(ChannelStatistics(pair.teacher_shape[0]) for pair in pairs)

    def forward(self, step: DistillStep) -> Tensor:
        """Return the mean distance of the batch."""
        own, wanted = student_maps(step, self.pairs), teacher_maps(step, self.pairs)
        with full_precision(own[0]):
            stages = [
                2.0 ** (index + 1 - len(self.pairs)) * self._distance(index, own[index], wanted[index])
                for index in range(len(self.pairs))
            ]
        return torch.stack(stages).sum(dim=0).mean()

    @torch.no_grad()
    def update(self, step: DistillStep) -> None:
        """Count the teacher's pre-activations into what the margins come from."""
        for index, maps in enumerate(teacher_maps(step, self.pairs)):
            self._statistics(index).take_in(maps)

    def _distance(self, index: int, own: Tensor, wanted: Tensor) -> Tensor:
        mean, variance = self._statistics(index).with_batch(wanted)
        margins = negative_mean(mean, variance.sqrt())
        return partial_l2_distance(self.connectors[index](own), wanted, margins=margins)

    def _statistics(self, index: int) -> ChannelStatistics:
        found = self.statistics[index]
        assert isinstance(found, ChannelStatistics)
        return found


METHOD = Method(
    name="ofd",
    role="student",
    title="Overhaul of feature distillation: pre-activations with margins, and a partial distance",
    venue="ICCV 2019",
    source="Heo, Kim, Yun, Park, Kwak and Choi, ICCV 2019, arXiv:1904.01866; weight of the authors' code",
    differs="The margins come from the teacher's pre-activations in the training so far, where the authors take scale "
    "and shift of the batch normalisation before the rectifier: not every network has one there. The teacher is in "
    "evaluation mode, in the authors' code for CIFAR it normalises by the batch. Where sizes differ the student's maps "
    "are resized. The authors train 200 epochs with batches of 128.",
    terms={"cross_entropy": {}, "ofd": {"weight": 0.001}},
)
