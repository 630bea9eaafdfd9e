"""The paraphraser: an autoencoder that learns, before the training, to say the teacher's last maps in fewer channels.

It is the first half of factor transfer; the second, ``factor_transfer``, takes its encoder over.
"""

from __future__ import annotations

from typing import ClassVar, final

import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from soteacher.errors import InputError
from soteacher.objective import Objective, ObjectiveConfig, Stage
from soteacher.objectives.connectors import BatchNormalization
from soteacher.objectives.features import as_maps, map_shape, stages
from soteacher.precision import at_least_float32, full_precision
from soteacher.types import DistillStep, NetworkFacts, Task

SLOPE = 0.1
"""Of the leaky rectifiers below zero, as released."""


def reconstruction_distance(reconstruction: Tensor, maps: Tensor) -> Tensor:
    r"""Mean squared distance of rebuilt maps from the original ones, one value per example.

    .. math:: \frac{1}{C H W} \sum_j (\hat x_j - x_j)^2

    Args:
        reconstruction: ``[B, C, H, W]``; gradients flow.
        maps: of the same shape; a constant.

    Returns:
        ``[B]``, float32 (float64 from float64 maps); 0 where the two agree.

    Raises:
        InputError: the shapes differ.

    Source: Kim, Park and Kwak, NeurIPS 2018, arXiv:1802.04977. The benchmark of Tian et al. 2020,
    arXiv:1910.10699, takes this mean of squares; the authors' own code takes absolute distances.
    """
    if reconstruction.shape != maps.shape:
        raise InputError(
            f"rebuilt and original maps must have one shape, got {list(reconstruction.shape)} and {list(maps.shape)}"
        )
    difference = at_least_float32(reconstruction) - at_least_float32(maps.detach())
    return difference.square().flatten(1).mean(dim=1)


@final
class FactorEncoder(nn.Module):
    """Maps ``[B, C, H, W]`` to factors ``[B, F, H, W]``: three 3x3 convolutions, each with a leaky rectifier.

    Args:
        in_channels: C.
        channels: F.
        normalize: whether each convolution's result is normalised over the batch.
    """

    def __init__(self, in_channels: int, channels: int, *, normalize: bool) -> None:
        super().__init__()
        sizes = [(in_channels, in_channels), (in_channels, channels), (channels, channels)]
        self.convolutions = nn.ModuleList(nn.Conv2d(before, after, 3, padding=1) for before, after in sizes)
        self.normalizations = nn.ModuleList(
            BatchNormalization(after) if normalize else nn.Identity() for _, after in sizes
        )

    def forward(self, maps: Tensor) -> Tensor:
        """Return the factors."""
        for convolution, normalization in zip(self.convolutions, self.normalizations, strict=True):
            maps = F.leaky_relu(normalization(convolution(maps)), SLOPE)
        return maps


@final
class FactorDecoder(nn.Module):
    """Factors ``[B, F, H, W]`` back to maps ``[B, C, H, W]``: the encoder's mirror image, of transposed convolutions.

    Args:
        channels: F.
        out_channels: C.
    """

    def __init__(self, channels: int, out_channels: int) -> None:
        super().__init__()
        sizes = [(channels, channels), (channels, out_channels), (out_channels, out_channels)]
        self.convolutions = nn.ModuleList(nn.ConvTranspose2d(before, after, 3, padding=1) for before, after in sizes)

    def forward(self, factors: Tensor) -> Tensor:
        """Return the rebuilt maps."""
        for convolution in self.convolutions:
            factors = F.leaky_relu(convolution(factors), SLOPE)
        return factors


class ParaphraserConfig(ObjectiveConfig):
    """Settings of :class:`Paraphraser`."""

    is_taken_over: ClassVar[bool] = True
    reads: ClassVar[str] = "the teacher's last stage, or `teacher_tap`"
    needs_teacher: ClassVar[bool] = True
    stage: Stage = "preparation"
    """When the term counts: in the ``preparation``, so that ``factor_transfer`` finds it trained."""
    factor_rate: float = Field(default=0.5, gt=0)
    """Channels of the factors as a share of the teacher's channels; the same as that of ``factor_transfer``."""
    teacher_tap: str | None = None
    """The teacher's tap that is rebuilt; null: its last stage."""

    def build(self, task: Task) -> Paraphraser:
        """Return the objective for the teacher's maps.

        Raises:
            InputError: the task does not say what the teacher's features are, or there is no such tap.
        """
        if task.teacher is None:
            raise InputError("paraphraser rebuilds maps of the teacher: give Task(teacher=...)")
        tap = self.teacher_tap if self.teacher_tap is not None else _last_stage(task.teacher)
        return Paraphraser(self, tap, map_shape(task.teacher, tap)[0])


def _last_stage(teacher: NetworkFacts) -> str:
    known = stages(teacher)
    if not known:
        raise InputError(f"{teacher.name} names no stages; set teacher_tap to the path of a module")
    return known[-1]


@final
class Paraphraser(Objective[DistillStep]):
    """Rebuild the teacher's maps from factors of fewer channels; see :func:`reconstruction_distance`.

    It has no batch normalisation: the factors of an image must not depend on the rest of the batch.
    """

    name = "paraphraser"
    trains_network = False

    def __init__(self, config: ParaphraserConfig, tap: str, channels: int) -> None:
        super().__init__()
        self.config = config
        self.teacher_features = (tap,)
        factors = max(1, int(channels * config.factor_rate))
        self.encoder = FactorEncoder(channels, factors, normalize=False)
        self.decoder = FactorDecoder(factors, channels)

    def forward(self, step: DistillStep) -> Tensor:
        """Return the mean distance of the batch."""
        maps = as_maps(step.teacher.features[self.teacher_features[0]].detach())
        with full_precision(maps):
            return reconstruction_distance(self.decoder(self.encoder(maps)), maps).mean()
