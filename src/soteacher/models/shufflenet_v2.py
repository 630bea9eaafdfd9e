"""The field's ShuffleNetV2 for small images, ``shufflenet_v2``: 116, 232 and 464 channels."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from soteacher.errors import InputError
from soteacher.models.family import Family, FamilyNetwork, Tap, preactivations_of_blocks

NAMES = ("shufflenet_v2", "ShuffleV2", "ShuffleNetV2")
"""Our name, and the field's for the same network."""
STEM_CHANNELS = 24
STAGE_CHANNELS = (116, 232, 464)
STAGE_BLOCKS = (4, 8, 4)
LAST_CHANNELS = 1024


class BasicUnit(nn.Module):
    """Half of the channels pass, the other half is convolved, and both are shuffled; ``[B, C, H, W]`` to the same.

    Input and output are not negative. The last rectifier is applied to all channels, which changes nothing in the half
    that passes: so what it takes in is the whole of the block's preactivation, in the order of its output.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        half = channels // 2
        self.conv1 = nn.Conv2d(half, half, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(half)
        self.conv2 = nn.Conv2d(half, half, 3, padding=1, groups=half, bias=False)
        self.bn2 = nn.BatchNorm2d(half)
        self.conv3 = nn.Conv2d(half, half, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(half)
        self.shuffle = nn.ChannelShuffle(2)
        self.relu = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        """Return the rectified channels of both halves."""
        passed, convolved = x.chunk(2, 1)
        convolved = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(convolved)))))
        convolved = self.bn3(self.conv3(convolved))
        return self.relu(self.shuffle(torch.cat((passed, convolved), 1)))


class DownsamplingUnit(nn.Module):
    """Two convolved paths, each to half of the channels at half the sides, shuffled.

    ``[B, C, H, W]`` to ``[B, D, H / 2, W / 2]``, not negative.
    """

    def __init__(self, in_channels: int, channels: int) -> None:
        super().__init__()
        half = channels // 2
        self.conv1 = nn.Conv2d(in_channels, in_channels, 3, stride=2, padding=1, groups=in_channels, bias=False)
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.conv2 = nn.Conv2d(in_channels, half, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(half)
        self.conv3 = nn.Conv2d(in_channels, half, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(half)
        self.conv4 = nn.Conv2d(half, half, 3, stride=2, padding=1, groups=half, bias=False)
        self.bn4 = nn.BatchNorm2d(half)
        self.conv5 = nn.Conv2d(half, half, 1, bias=False)
        self.bn5 = nn.BatchNorm2d(half)
        self.shuffle = nn.ChannelShuffle(2)
        self.relu = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        """Return the rectified channels of both paths."""
        short = self.bn2(self.conv2(self.bn1(self.conv1(x))))
        long = self.bn4(self.conv4(F.relu(self.bn3(self.conv3(x)))))
        long = self.bn5(self.conv5(long))
        return self.relu(self.shuffle(torch.cat((short, long), 1)))


class ShuffleNetV2(FamilyNetwork):
    """A 1x1 stem at full resolution, three stages that halve the sides, and a 1x1 convolution to 1024 channels.

    ``maps`` is the rectified output of the last convolution. Names in ``state_dict`` and the form are those of the
    field's released checkpoints, whose stem neither strides nor pools, unlike the paper's. Images of any size: the last
    maps are averaged. The weights start as PyTorch starts them, as in the field's code.

    Args:
        num_classes: K.
        in_channels: channels of the images.

    Source: Ma et al. 2018, arXiv:1807.11164, section 3 (figure 3 c, d) and table 5 (1x).
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
        self.layer1 = _stage(STEM_CHANNELS, first, STAGE_BLOCKS[0])
        self.layer2 = _stage(first, second, STAGE_BLOCKS[1])
        self.layer3 = _stage(second, third, STAGE_BLOCKS[2])
        self.conv2 = nn.Conv2d(third, LAST_CHANNELS, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(LAST_CHANNELS)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.linear = nn.Linear(LAST_CHANNELS, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        """Return logits ``[B, K]`` of normalised images ``[B, C, H, W]``."""
        stem = self.relu(self.bn1(self.conv1(images)))
        maps = self.layer3(self.layer2(self.layer1(stem)))
        maps = F.relu(self.bn2(self.conv2(maps)))
        return self.linear(self.avgpool(maps).flatten(1))

    def preactivations(self) -> dict[str, Tap]:
        """Return where the channels of the stages' last blocks are, before the rectifier.

        The half that a block lets pass was rectified earlier: there they are the output itself, as in the field's code,
        which has these channels unshuffled.
        """
        return preactivations_of_blocks(self)


def _stage(in_channels: int, channels: int, num_blocks: int) -> nn.Sequential:
    """Return a stage whose first block changes channels and sides."""
    return nn.Sequential(DownsamplingUnit(in_channels, channels), *(BasicUnit(channels) for _ in range(num_blocks - 1)))


def build_shufflenet_v2(name: str, *, num_classes: int, in_channels: int) -> ShuffleNetV2:
    """Return the network.

    Raises:
        InputError: it is another name.
    """
    if name not in NAMES:
        raise InputError(f"{name!r} is no network of this family; wanted {' or '.join(NAMES)}")
    return ShuffleNetV2(num_classes=num_classes, in_channels=in_channels)


FAMILY = Family(names=NAMES[:1], knows=NAMES.__contains__, build=build_shufflenet_v2)
