"""The field's MobileNetV2 for small images, ``mobilenet_v2``: half the channels, expansion 6."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from torch import Tensor, nn

from soteacher.errors import InputError
from soteacher.models.family import Family, FamilyNetwork, Tap, initialize

NAMES = ("mobilenet_v2", "MobileNetV2")
"""Our name, and the field's for the same network."""
STEM_CHANNELS = 16
LAST_CHANNELS = 1280
"""Not halved: as the paper has it for widths below 1."""
SEQUENCES = (
    # expansion, channels, blocks, stride of the first one
    (1, 8, 1, 1),
    (6, 12, 2, 1),
    (6, 16, 3, 2),
    (6, 32, 4, 2),
    (6, 48, 3, 1),
    (6, 80, 3, 2),
    (6, 160, 1, 1),
)
"""The sequences of equal blocks, at half the paper's channels."""


class InvertedResidual(nn.Module):
    """Widen, convolve each channel by itself, narrow; the narrow output is linear.

    ``[B, C, H, W]`` to ``[B, D, H / stride, W / stride]``; the input is added where the shapes are equal.
    """

    def __init__(self, in_channels: int, channels: int, *, expansion: int, stride: int) -> None:
        super().__init__()
        wide = in_channels * expansion
        self.conv = nn.Sequential(
            nn.Conv2d(in_channels, wide, 1, bias=False), nn.BatchNorm2d(wide), nn.ReLU(),
            nn.Conv2d(wide, wide, 3, stride=stride, padding=1, groups=wide, bias=False), nn.BatchNorm2d(wide),
            nn.ReLU(), nn.Conv2d(wide, channels, 1, bias=False), nn.BatchNorm2d(channels),
        )  # fmt: skip
        self.adds_input = stride == 1 and in_channels == channels

    def forward(self, x: Tensor) -> Tensor:
        """Return the block's output, not rectified."""
        return x + self.conv(x) if self.adds_input else self.conv(x)


class MobileNetV2(FamilyNetwork):
    """A strided stem, seven sequences of inverted residuals, and a 1x1 convolution to 1280 channels.

    ``stage1`` to ``stage4`` are the linear outputs of the second, third, fifth and seventh sequence, ``maps`` the
    rectified output of the last convolution. Names in ``state_dict`` and the form are those of the field's released
    checkpoints, which part from the paper: the second sequence does not stride, and plain rectifiers stand for those
    capped at 6. Images of any size: the last maps, 2x2 of images of 32x32, are averaged.

    At the start convolutions are drawn as by :func:`initialize`, the linear layer from a normal distribution of
    standard deviation 0.01 with bias 0, as in the field's code.

    Args:
        num_classes: K.
        in_channels: channels of the images.

    Source: Sandler et al. 2018, arXiv:1801.04381, table 2, with width 0.5.
    """

    feature_modules: ClassVar[Mapping[str, str]] = {
        "stem": "conv1", "stage1": "blocks.1", "stage2": "blocks.2", "stage3": "blocks.4", "stage4": "blocks.6",
    }  # fmt: skip
    classifier_module: ClassVar[str] = "classifier.0"

    def __init__(self, *, num_classes: int, in_channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Sequential(
            nn.Conv2d(in_channels, STEM_CHANNELS, 3, stride=2, padding=1, bias=False),
            nn.BatchNorm2d(STEM_CHANNELS), nn.ReLU(),
        )  # fmt: skip
        self.blocks = nn.Sequential()
        channels = STEM_CHANNELS
        for expansion, wanted, num_blocks, stride in SEQUENCES:
            self.blocks.append(_sequence(channels, wanted, num_blocks, expansion=expansion, stride=stride))
            channels = wanted
        self.conv2 = nn.Sequential(
            nn.Conv2d(channels, LAST_CHANNELS, 1, bias=False), nn.BatchNorm2d(LAST_CHANNELS), nn.ReLU()
        )
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        classifier = nn.Linear(LAST_CHANNELS, num_classes)
        self.classifier = nn.Sequential(classifier)
        initialize(self)
        nn.init.normal_(classifier.weight, std=0.01)
        nn.init.zeros_(classifier.bias)

    def forward(self, images: Tensor) -> Tensor:
        """Return logits ``[B, K]`` of normalised images ``[B, C, H, W]``."""
        maps = self.conv2(self.blocks(self.conv1(images)))
        return self.classifier(self.avgpool(maps).flatten(1))

    def preactivations(self) -> dict[str, Tap]:
        """Return nothing: the stages end linearly, so that their outputs serve."""
        return {}


def _sequence(in_channels: int, channels: int, num_blocks: int, *, expansion: int, stride: int) -> nn.Sequential:
    """Return blocks of which the first changes channels and sides."""
    first = InvertedResidual(in_channels, channels, expansion=expansion, stride=stride)
    others = (InvertedResidual(channels, channels, expansion=expansion, stride=1) for _ in range(num_blocks - 1))
    return nn.Sequential(first, *others)


def build_mobilenet_v2(name: str, *, num_classes: int, in_channels: int) -> MobileNetV2:
    """Return the network.

    Raises:
        InputError: it is another name.
    """
    if name not in NAMES:
        raise InputError(f"{name!r} is no network of this family; wanted {' or '.join(NAMES)}")
    return MobileNetV2(num_classes=num_classes, in_channels=in_channels)


FAMILY = Family(names=NAMES[:1], knows=NAMES.__contains__, build=build_mobilenet_v2)
