"""Networks of plain convolutions for small images: ``vgg8``, ``vgg11``, ``vgg13``, ``vgg16`` and ``vgg19``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar

from torch import Tensor, nn

from soteacher.errors import InputError
from soteacher.models.family import Family, FamilyNetwork, Tap, initialize

CHANNELS = (64, 128, 256, 512, 512)
"""Channels of the five blocks."""
DEPTHS: Mapping[str, Sequence[int]] = {
    "vgg8": (1, 1, 1, 1, 1),
    "vgg11": (1, 1, 2, 2, 2),
    "vgg13": (2, 2, 2, 2, 2),
    "vgg16": (2, 2, 3, 3, 3),
    "vgg19": (2, 2, 4, 4, 4),
}
"""Convolutions of the five blocks. A name counts the original's three linear layers, of which one is left."""
SMALLEST_SIDE = 8
"""Three poolings leave one pixel of it."""
LARGE_SIDE = 64
"""From this side on, the fourth block is pooled too."""


class VGG(FamilyNetwork):
    """Five blocks of 3x3 convolutions with batch norm, joined by 2x2 max poolings, and one linear layer.

    Features are taken where a block's last rectifier put them out, before the pooling: the first block's is ``stem``.
    Names in ``state_dict`` and the form are those of the field's released checkpoints, in which small images are not
    pooled after the fourth block. Those do it at a side of exactly 64; here at a shorter side of 64 or more. Images of
    8 pixels a side or more: the last maps are averaged.

    At the start convolutions are drawn as by :func:`initialize`, the linear layer from a normal distribution of
    standard deviation 0.01, and all biases are 0, as in the field's code.

    Args:
        convolutions: of each of the five blocks.
        num_classes: K.
        in_channels: channels of the images.

    Source: Simonyan and Zisserman 2015, arXiv:1409.1556, table 1 (A, B, D, E), with batch norm after each convolution;
    the one with 8 layers is the field's own.
    """

    feature_modules: ClassVar[Mapping[str, str]] = {
        "stem": "relu0", "stage1": "relu1", "stage2": "relu2", "stage3": "relu3", "stage4": "relu4",
    }  # fmt: skip
    classifier_module: ClassVar[str] = "classifier"

    def __init__(self, *, convolutions: Sequence[int], num_classes: int, in_channels: int) -> None:
        super().__init__()
        # The parameter-free modules are what features are taken from; `state_dict` does not know them.
        self.block0 = _block(in_channels, CHANNELS[0], convolutions[0])
        self.relu0 = nn.ReLU()
        self.block1 = _block(CHANNELS[0], CHANNELS[1], convolutions[1])
        self.relu1 = nn.ReLU()
        self.block2 = _block(CHANNELS[1], CHANNELS[2], convolutions[2])
        self.relu2 = nn.ReLU()
        self.block3 = _block(CHANNELS[2], CHANNELS[3], convolutions[3])
        self.relu3 = nn.ReLU()
        self.block4 = _block(CHANNELS[3], CHANNELS[4], convolutions[4])
        self.relu4 = nn.ReLU()
        self.maxpool = nn.MaxPool2d(2)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Linear(CHANNELS[4], num_classes)
        _initialize(self)

    def forward(self, images: Tensor) -> Tensor:
        """Return logits ``[B, K]`` of normalised images ``[B, C, H, W]``.

        Raises:
            InputError: a side is below 8 pixels.
        """
        height, width = images.shape[-2:]
        if min(height, width) < SMALLEST_SIDE:
            raise InputError(f"VGG takes images of {SMALLEST_SIDE} pixels a side or more, got {height}x{width}")
        maps = self.maxpool(self.relu0(self.block0(images)))
        maps = self.maxpool(self.relu1(self.block1(maps)))
        maps = self.maxpool(self.relu2(self.block2(maps)))
        maps = self.relu3(self.block3(maps))
        if min(height, width) >= LARGE_SIDE:
            maps = self.maxpool(maps)
        maps = self.relu4(self.block4(maps))
        return self.classifier(self.avgpool(maps).flatten(1))

    def preactivations(self) -> dict[str, Tap]:
        """Return where the outputs of the blocks' last batch norms are."""
        return {f"preactivation{number}": Tap(f"relu{number}", "input") for number in range(1, 5)}


def _block(in_channels: int, channels: int, convolutions: int) -> nn.Sequential:
    """Return convolutions, each with its batch norm, and rectifiers between them."""
    layers: list[nn.Module] = []
    for number in range(convolutions):
        if number > 0:
            layers.append(nn.ReLU())
        layers.append(nn.Conv2d(channels if number else in_channels, channels, 3, padding=1))
        layers.append(nn.BatchNorm2d(channels))
    return nn.Sequential(*layers)


def _initialize(network: VGG) -> None:
    """Draw the weights as the class says."""
    initialize(network)
    nn.init.normal_(network.classifier.weight, std=0.01)
    for module in network.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)) and module.bias is not None:
            nn.init.zeros_(module.bias)


def build_vgg(name: str, *, num_classes: int, in_channels: int) -> VGG:
    """Return the network of that many layers.

    Raises:
        InputError: it is another name.
    """
    if name not in DEPTHS:
        raise InputError(f"{name!r} is no network of this family; wanted {', '.join(DEPTHS)}")
    return VGG(convolutions=DEPTHS[name], num_classes=num_classes, in_channels=in_channels)


FAMILY = Family(names=tuple(DEPTHS), knows=DEPTHS.__contains__, build=build_vgg)
