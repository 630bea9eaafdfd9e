"""The residual network of bottleneck blocks, ``resnet50``, for small images."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from torch import Tensor, nn
from torch.nn import functional as F

from soteacher.errors import InputError
from soteacher.models.family import Family, FamilyNetwork, Tap, initialize, preactivations_of_blocks, stage_of_blocks

NAMES = ("resnet50", "ResNet50")
"""Our name, and the field's for the same network."""
STEM_CHANNELS = 64
STAGE_CHANNELS = (64, 128, 256, 512)
"""Channels of the 3x3 convolutions."""
STAGE_BLOCKS = (3, 4, 6, 3)
EXPANSION = 4
"""A block puts out that many times the channels of its 3x3 convolution."""


class BottleneckBlock(nn.Module):
    """Convolutions 1x1, 3x3 and 1x1 around a shortcut; ``[B, C, H, W]`` to ``[B, 4D, H / stride, W / stride]``.

    The output is not negative. The 3x3 convolution takes the stride.
    """

    def __init__(self, in_channels: int, channels: int, *, stride: int) -> None:
        super().__init__()
        out_channels = EXPANSION * channels
        self.conv1 = nn.Conv2d(in_channels, channels, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, stride=stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.conv3 = nn.Conv2d(channels, out_channels, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(out_channels)
        self.shortcut = nn.Sequential()
        if stride != 1 or in_channels != out_channels:
            self.shortcut.append(nn.Conv2d(in_channels, out_channels, 1, stride=stride, bias=False))
            self.shortcut.append(nn.BatchNorm2d(out_channels))
        self.relu = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        """Return the rectified sum of the shortcut and the three convolutions."""
        residual = F.relu(self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x))))))
        return self.relu(self.bn3(self.conv3(residual)) + self.shortcut(x))


class BottleneckResNet(FamilyNetwork):
    """A 3x3 stem at full resolution and four stages of bottleneck blocks; each later stage halves the sides.

    Names in ``state_dict`` and the form are those of the field's released checkpoints, whose stem neither strides nor
    pools, unlike the paper's. Images of any size: the last maps are averaged. Convolutions start as by
    :func:`initialize`.

    Args:
        num_classes: K.
        in_channels: channels of the images.

    Source: He et al. 2016, arXiv:1512.03385, table 1 (50 layers), with projection shortcuts (option B).
    """

    feature_modules: ClassVar[Mapping[str, str]] = {
        "stem": "relu", "stage1": "layer1", "stage2": "layer2", "stage3": "layer3", "stage4": "layer4",
    }  # fmt: skip
    classifier_module: ClassVar[str] = "linear"

    def __init__(self, *, num_classes: int, in_channels: int) -> None:
        super().__init__()
        first, second, third, fourth = STAGE_CHANNELS
        self.conv1 = nn.Conv2d(in_channels, STEM_CHANNELS, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(STEM_CHANNELS)
        self.relu = nn.ReLU()
        self.layer1 = stage_of_blocks(
            BottleneckBlock, STEM_CHANNELS, first, STAGE_BLOCKS[0], stride=1, expansion=EXPANSION
        )
        self.layer2 = stage_of_blocks(
            BottleneckBlock, EXPANSION * first, second, STAGE_BLOCKS[1], stride=2, expansion=EXPANSION
        )
        self.layer3 = stage_of_blocks(
            BottleneckBlock, EXPANSION * second, third, STAGE_BLOCKS[2], stride=2, expansion=EXPANSION
        )
        self.layer4 = stage_of_blocks(
            BottleneckBlock, EXPANSION * third, fourth, STAGE_BLOCKS[3], stride=2, expansion=EXPANSION
        )
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.linear = nn.Linear(EXPANSION * fourth, num_classes)
        initialize(self)

    def forward(self, images: Tensor) -> Tensor:
        """Return logits ``[B, K]`` of normalised images ``[B, C, H, W]``."""
        stem = self.relu(self.bn1(self.conv1(images)))
        maps = self.layer4(self.layer3(self.layer2(self.layer1(stem))))
        return self.linear(self.avgpool(maps).flatten(1))

    def preactivations(self) -> dict[str, Tap]:
        """Return where the sums of the stages' last blocks are, before the rectifier."""
        return preactivations_of_blocks(self)


def build_bottleneck_resnet(name: str, *, num_classes: int, in_channels: int) -> BottleneckResNet:
    """Return the network.

    Raises:
        InputError: it is another name.
    """
    if name not in NAMES:
        raise InputError(f"{name!r} is no network of this family; wanted {' or '.join(NAMES)}")
    return BottleneckResNet(num_classes=num_classes, in_channels=in_channels)


FAMILY = Family(names=NAMES[:1], knows=NAMES.__contains__, build=build_bottleneck_resnet)
