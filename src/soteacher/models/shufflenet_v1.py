"""The field's ShuffleNet for small images, ``shufflenet_v1``: three groups, 240, 480 and 960 channels."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from soteacher.errors import InputError
from soteacher.models.family import Family, FamilyNetwork, Tap, preactivations_of_blocks, stage_of_blocks

NAMES = ("shufflenet_v1", "ShuffleV1", "ShuffleNetV1")
"""Our name, and the field's for the same network."""
STEM_CHANNELS = 24
STAGE_CHANNELS = (240, 480, 960)
STAGE_BLOCKS = (4, 8, 4)
GROUPS = 3


class ShuffleUnit(nn.Module):
    """Grouped 1x1 convolution, channel shuffle, 3x3 convolution of each channel by itself, grouped 1x1 convolution.

    ``[B, C, H, W]`` to ``[B, D, H / stride, W / stride]``, not negative. At stride 1 the input is added; at stride 2
    its 3x3 averages are appended, so that the convolutions make only the missing D - C channels.
    """

    def __init__(self, in_channels: int, channels: int, *, stride: int) -> None:
        super().__init__()
        # The stem has too few channels to be grouped.
        groups = 1 if in_channels == STEM_CHANNELS else GROUPS
        appended = in_channels if stride == 2 else 0
        made = channels - appended
        narrow = made // 4
        self.conv1 = nn.Conv2d(in_channels, narrow, 1, groups=groups, bias=False)
        self.bn1 = nn.BatchNorm2d(narrow)
        self.shuffle = nn.ChannelShuffle(groups)
        self.conv2 = nn.Conv2d(narrow, narrow, 3, stride=stride, padding=1, groups=narrow, bias=False)
        self.bn2 = nn.BatchNorm2d(narrow)
        self.conv3 = nn.Conv2d(narrow, made, 1, groups=GROUPS, bias=False)
        self.bn3 = nn.BatchNorm2d(made)
        self.pool = nn.AvgPool2d(3, stride=2, padding=1) if stride == 2 else None
        self.relu = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        """Return the rectified sum, or the rectified channels of both paths."""
        maps = self.shuffle(F.relu(self.bn1(self.conv1(x))))
        maps = self.bn3(self.conv3(F.relu(self.bn2(self.conv2(maps)))))
        return self.relu(maps + x if self.pool is None else torch.cat((maps, self.pool(x)), 1))


class ShuffleNetV1(FamilyNetwork):
    """A 1x1 stem at full resolution and three stages of shuffled units; each stage halves the sides.

    Names in ``state_dict`` and the form are those of the field's released checkpoints, which part from the paper: the
    stem neither strides nor pools, and there is a rectifier after the 3x3 convolution. Images of any size: the last
    maps are averaged. The weights start as PyTorch starts them, as in the field's code.

    Args:
        num_classes: K.
        in_channels: channels of the images.

    Source: Zhang et al. 2018, arXiv:1707.01083, section 3.2 and table 1 (g = 3).
    """

    feature_modules: ClassVar[Mapping[str, str]] = {
        "stem": "relu", "stage1": "layer1", "stage2": "layer2", "stage3": "layer3",
    }  # fmt: skip
    classifier_module: ClassVar[str] = "linear"

    def __init__(self, *, num_classes: int, in_channels: int) -> None:
        super().__init__()
        first, second, third = STAGE_CHANNELS
        self.conv1 = nn.Conv2d(in_channels, STEM_CHANNELS, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(STEM_CHANNELS)
        self.relu = nn.ReLU()
        self.layer1 = stage_of_blocks(ShuffleUnit, STEM_CHANNELS, first, STAGE_BLOCKS[0], stride=2)
        self.layer2 = stage_of_blocks(ShuffleUnit, first, second, STAGE_BLOCKS[1], stride=2)
        self.layer3 = stage_of_blocks(ShuffleUnit, second, third, STAGE_BLOCKS[2], stride=2)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.linear = nn.Linear(third, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        """Return logits ``[B, K]`` of normalised images ``[B, C, H, W]``."""
        stem = self.relu(self.bn1(self.conv1(images)))
        maps = self.layer3(self.layer2(self.layer1(stem)))
        return self.linear(self.avgpool(maps).flatten(1))

    def preactivations(self) -> dict[str, Tap]:
        """Return where the sums of the stages' last blocks are, before the rectifier."""
        return preactivations_of_blocks(self)


def build_shufflenet_v1(name: str, *, num_classes: int, in_channels: int) -> ShuffleNetV1:
    """Return the network.

    Raises:
        InputError: it is another name.
    """
    if name not in NAMES:
        raise InputError(f"{name!r} is no network of this family; wanted {' or '.join(NAMES)}")
    return ShuffleNetV1(num_classes=num_classes, in_channels=in_channels)


FAMILY = Family(names=NAMES[:1], knows=NAMES.__contains__, build=build_shufflenet_v1)
