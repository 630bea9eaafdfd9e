"""Wide residual networks for small images: ``wrn_D_W``, depth D = 6n + 4 and W times the channels."""

from __future__ import annotations

import re
from collections import OrderedDict
from collections.abc import Mapping
from typing import ClassVar

from torch import Tensor, nn
from torch.nn import functional as F

from soteacher.errors import InputError
from soteacher.models.family import Family, FamilyNetwork, Tap, initialize, stage_of_blocks


class WideBlock(nn.Module):
    """Normalisation and rectifier before each 3x3 convolution; ``[B, C, H, W]`` to ``[B, D, H / stride, W / stride]``.

    Where the channels change, the shortcut is a convolution of the *activated* input; elsewhere it is the input itself.
    """

    def __init__(self, in_channels: int, channels: int, *, stride: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride=stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.convShortcut: nn.Conv2d | None = None  # the name that released checkpoints carry
        if in_channels != channels:
            self.convShortcut = nn.Conv2d(in_channels, channels, 1, stride=stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Return the sum of the shortcut and the two convolutions, not rectified."""
        activated = F.relu(self.bn1(x))
        shortcut = x if self.convShortcut is None else self.convShortcut(activated)
        return shortcut + self.conv2(F.relu(self.bn2(self.conv1(activated))))


class WideResNet(FamilyNetwork):
    """A convolution and three groups of equally many wide blocks, then one normalisation and rectifier.

    Names in ``state_dict`` are those of the field's released checkpoints. ``stem`` and the stages are the raw outputs
    of convolution and groups, before the next normalisation. Images of any size: the last maps are averaged.

    Args:
        blocks_per_group: n, for depth 6n + 4.
        width: factor of the channels 16, 32, 64.
        num_classes: K.
        in_channels: channels of the images.

    Source: Zagoruyko and Komodakis 2016, arXiv:1605.07146, table 1, without dropout.
    """

    feature_modules: ClassVar[Mapping[str, str]] = {
        "stem": "conv1", "stage1": "block1", "stage2": "block2", "stage3": "block3",
    }  # fmt: skip
    classifier_module: ClassVar[str] = "fc"

    def __init__(self, *, blocks_per_group: int, width: int, num_classes: int, in_channels: int) -> None:
        super().__init__()
        first, second, third = 16 * width, 32 * width, 64 * width
        self.conv1 = nn.Conv2d(in_channels, 16, 3, padding=1, bias=False)
        self.block1 = _group(16, first, blocks_per_group, stride=1)
        self.block2 = _group(first, second, blocks_per_group, stride=2)
        self.block3 = _group(second, third, blocks_per_group, stride=2)
        self.bn1 = nn.BatchNorm2d(third)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(third, num_classes)
        initialize(self)
        nn.init.zeros_(self.fc.bias)  # as in the authors' code

    def forward(self, images: Tensor) -> Tensor:
        """Return logits ``[B, K]`` of normalised images ``[B, C, H, W]``."""
        maps = self.block3(self.block2(self.block1(self.conv1(images))))
        return self.fc(self.avgpool(F.relu(self.bn1(maps))).flatten(1))

    def preactivations(self) -> dict[str, Tap]:
        """Return where the next normalisation's outputs are, before its rectifier: a group itself ends with a sum."""
        return {
            "preactivation1": Tap("block2.layer.0.bn1"),
            "preactivation2": Tap("block3.layer.0.bn1"),
            "preactivation3": Tap("bn1"),
        }


def _group(in_channels: int, channels: int, num_blocks: int, *, stride: int) -> nn.Sequential:
    """Return a group whose first block changes channels and sides."""
    return nn.Sequential(
        OrderedDict(layer=stage_of_blocks(WideBlock, in_channels, channels, num_blocks, stride=stride))
    )


def _numbers(name: str) -> tuple[int, int] | None:
    """Return depth and width of a name; ``None`` for one that is not of the family."""
    match = re.fullmatch(r"wrn_(\d+)_(\d+)", name)
    if match is None:
        return None
    depth, width = int(match[1]), int(match[2])
    if depth < 10 or (depth - 4) % 6:
        raise InputError(f"{name}: depth must be 6n + 4 (10, 16, 22, 28, 34, 40, ...), got {depth}")
    if width < 1:
        raise InputError(f"{name}: width must be at least 1, got {width}")
    return depth, width


def build_wrn(name: str, *, num_classes: int, in_channels: int) -> WideResNet:
    """Return ``wrn_D_W``.

    Raises:
        InputError: it is another name, the depth is not 6n + 4, or the width is 0.
    """
    numbers = _numbers(name)
    if numbers is None:
        raise InputError(f"{name!r} is no network of this family; wanted wrn_D_W")
    depth, width = numbers
    return WideResNet(blocks_per_group=(depth - 4) // 6, width=width, num_classes=num_classes, in_channels=in_channels)


FAMILY = Family(
    names=("wrn_16_1", "wrn_16_2", "wrn_40_1", "wrn_40_2"),
    knows=lambda name: _numbers(name) is not None,
    build=build_wrn,
)
