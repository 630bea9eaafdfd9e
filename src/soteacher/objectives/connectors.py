"""Trainable bridges from a student's feature to a teacher's: they belong to the objective and are gone at the end."""

from __future__ import annotations

from typing import final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from soteacher.objectives.features import resize


@final
class BatchNormalization(nn.Module):
    """Normalisation of maps ``[B, C, H, W]`` or vectors ``[B, C]`` by the batch's own statistics, scaled and shifted.

    A bridge is used in training only, so that no running statistics are kept: a forward pass changes nothing. A single
    value for each channel becomes 0 before the shift.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, feature: Tensor) -> Tensor:
        """Return the normalised feature, of the same shape."""
        if feature.numel() == feature.shape[1]:
            return feature * 0 + self.bias.view(-1, *(1,) * (feature.ndim - 2))
        return F.batch_norm(feature, None, None, self.weight, self.bias, training=True)


@final
class MapConnector(nn.Module):
    """Maps ``[B, C, H, W]`` to maps of other channels, height and width: resized, 1x1 convolution, normalised.

    Args:
        in_channels: C.
        channels: of the result.
        size: height and width of the result, in pixels.
        rectify: whether a rectifier follows.
    """

    def __init__(self, in_channels: int, channels: int, size: tuple[int, int], *, rectify: bool = False) -> None:
        super().__init__()
        self.size = size
        self.convolution = nn.Conv2d(in_channels, channels, 1, bias=False)
        self.normalization = BatchNormalization(channels)
        self.rectify = rectify
        nn.init.kaiming_normal_(self.convolution.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, maps: Tensor) -> Tensor:
        """Return the maps at the other end."""
        # The cheaper order: the 1x1 convolution and the change of size can be exchanged.
        if maps.shape[-2] * maps.shape[-1] > self.size[0] * self.size[1]:
            maps = resize(maps, self.size)
        bridged = self.normalization(resize(self.convolution(maps), self.size))
        return F.relu(bridged) if self.rectify else bridged
