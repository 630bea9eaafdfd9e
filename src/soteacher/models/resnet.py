"""Residual networks of basic blocks for small images: ``resnetD`` and the wider ``resnetDxW``, depth D = 6n + 2.

``resnet50`` is not among them: by that name the field means the network of bottleneck blocks.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import ClassVar

from torch import Tensor, nn
from torch.nn import functional as F

from soteacher.errors import InputError
from soteacher.models.family import Family, FamilyNetwork, Tap, initialize, preactivations_of_blocks, stage_of_blocks


class BasicBlock(nn.Module):
    """Two 3x3 convolutions around a shortcut; ``[B, C, H, W]`` to ``[B, D, H / stride, W / stride]``, not negative."""

    def __init__(self, in_channels: int, channels: int, *, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.downsample: nn.Sequential | None = None
        if stride != 1 or in_channels != channels:
            projection = nn.Conv2d(in_channels, channels, 1, stride=stride, bias=False)
            self.downsample = nn.Sequential(projection, nn.BatchNorm2d(channels))
        self.relu = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        """Return the rectified sum of the shortcut and the two convolutions."""
        shortcut = x if self.downsample is None else self.downsample(x)
        residual = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return self.relu(residual + shortcut)


class ResNet(FamilyNetwork):
    """A stem and three stages of equally many basic blocks; each later stage halves the sides.

    Names in ``state_dict`` are those of the field's released checkpoints. Images of any size: the last maps are
    averaged.

    Args:
        blocks_per_stage: n, for depth 6n + 2.
        stem_channels: channels of the first convolution.
        stage_channels: channels of the three stages.
        num_classes: K.
        in_channels: channels of the images.

    Source: He et al. 2016, arXiv:1512.03385, section 4.2, with projection shortcuts (option B).
    """

    feature_modules: ClassVar[Mapping[str, str]] = {
        "stem": "relu", "stage1": "layer1", "stage2": "layer2", "stage3": "layer3",
    }  # fmt: skip
    classifier_module: ClassVar[str] = "fc"

    def __init__(
        self,
        *,
        blocks_per_stage: int,
        stem_channels: int,
        stage_channels: Sequence[int],
        num_classes: int,
        in_channels: int,
    ) -> None:
        super().__init__()
        first, second, third = stage_channels
        self.conv1 = nn.Conv2d(in_channels, stem_channels, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(stem_channels)
        self.relu = nn.ReLU()
        self.layer1 = stage_of_blocks(BasicBlock, stem_channels, first, blocks_per_stage, stride=1)
        self.layer2 = stage_of_blocks(BasicBlock, first, second, blocks_per_stage, stride=2)
        self.layer3 = stage_of_blocks(BasicBlock, second, third, blocks_per_stage, stride=2)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(third, num_classes)
        initialize(self)

    def forward(self, images: Tensor) -> Tensor:
        """Return logits ``[B, K]`` of normalised images ``[B, C, H, W]``."""
        stem = self.relu(self.bn1(self.conv1(images)))
        maps = self.layer3(self.layer2(self.layer1(stem)))
        return self.fc(self.avgpool(maps).flatten(1))

    def preactivations(self) -> dict[str, Tap]:
        """Return where the sums of the stages' last blocks are, before the rectifier."""
        return preactivations_of_blocks(self)


def _numbers(name: str) -> tuple[int, int] | None:
    """Return depth and width of a name; ``None`` for one that is not of the family."""
    match = re.fullmatch(r"resnet(\d+)(?:x(\d+))?", name)
    if match is None or name == "resnet50":
        return None
    depth, width = int(match[1]), int(match[2] or 1)
    if depth < 8 or (depth - 2) % 6:
        raise InputError(f"{name}: depth must be 6n + 2 (8, 14, 20, 26, 32, ...), got {depth}")
    if match[2] is not None and width < 2:
        raise InputError(f"{name}: width must be at least 2, got {width}")
    return depth, width


def build_resnet(name: str, *, num_classes: int, in_channels: int) -> ResNet:
    """Return ``resnetD`` (16, 16, 32, 64 channels) or ``resnetDxW`` (32, 16W, 32W, 64W).

    Raises:
        InputError: it is another name, the depth is not 6n + 2, or the width is 1.
    """
    numbers = _numbers(name)
    if numbers is None:
        raise InputError(f"{name!r} is no network of this family; wanted resnetD or resnetDxW, not resnet50")
    depth, width = numbers
    return ResNet(
        blocks_per_stage=(depth - 2) // 6,
        stem_channels=16 if width == 1 else 32,
        stage_channels=(16 * width, 32 * width, 64 * width),
        num_classes=num_classes,
        in_channels=in_channels,
    )


FAMILY = Family(
    names=(
        "resnet8", "resnet14", "resnet20", "resnet32", "resnet44", "resnet56", "resnet110", "resnet8x4", "resnet32x4",
    ),
    knows=lambda name: _numbers(name) is not None,
    build=build_resnet,
)  # fmt: skip
