"""Networks that look at each patch of an image alone: ``patchwise_P_W``, patches of P pixels a side and width W."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import ClassVar

from torch import Tensor, nn

from soteacher.errors import InputError
from soteacher.models.family import Family, FamilyNetwork, Tap


class Patchwise(FamilyNetwork):
    r"""Two rectified layers on every patch, the average of the patches' features, and a linear classifier.

    .. math:: z = \frac1M \sum_{m=1}^{M} \bigl( V \phi(x_m) + b \bigr), \qquad
        \phi(x_m) = \mathrm{relu}(W_2 \, \mathrm{relu}(W_1 x_m + b_1) + b_2)

    The logits are the mean of the patches' own logits, so that the prediction :math:`\sigma(z)` is the normalised
    geometric mean of the patches' predictions :math:`\sigma(V \phi(x_m) + b)`: the form that the true label
    distribution of :class:`~soteacher.data.MixedFeatureConfig` has. There is no batch normalisation, so norms of the
    weights bound the slope of the function itself.

    Weights are drawn from :math:`\mathcal N(0, 2 / \text{fan\_in})`, the classifier as PyTorch draws it; the biases of
    the two layers start at 0.

    Args:
        patch_size: height and width of a patch, P, in pixels; images are cut into patches from the top left corner.
        width: values of both layers, W.
        num_classes: K.
        in_channels: channels of the images.

    Source: the network of the theory of Dong et al. 2024, arXiv:2206.06661, a feature extractor shared by all patches
    and a softmax of the mean of linear maps of its features; from memory of the paper, not checked. The paper leaves
    the extractor open: the two layers are ours.
    """

    feature_modules: ClassVar[Mapping[str, str]] = {"stem": "relu1", "stage1": "relu2"}
    classifier_module: ClassVar[str] = "fc"

    def __init__(self, *, patch_size: int, width: int, num_classes: int, in_channels: int) -> None:
        super().__init__()
        self._patch_size = patch_size
        self.conv1 = nn.Conv2d(in_channels, width, patch_size, stride=patch_size)
        self.relu1 = nn.ReLU()
        self.conv2 = nn.Conv2d(width, width, 1)
        self.relu2 = nn.ReLU()
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(width, num_classes)
        # By fan-in: strides as large as the kernel let every pixel reach one place only, which the fan-out overcounts.
        for layer in (self.conv1, self.conv2):
            nn.init.kaiming_normal_(layer.weight, mode="fan_in", nonlinearity="relu")
            assert layer.bias is not None, "the layer is built with one"
            nn.init.zeros_(layer.bias)

    def forward(self, images: Tensor) -> Tensor:
        """Return logits ``[B, K]`` of normalised images ``[B, C, H, W]``.

        Raises:
            InputError: the sides are no multiples of the patches'.
        """
        height, width = images.shape[-2:]
        side = self._patch_size
        if height % side or width % side or not height or not width:
            raise InputError(
                f"a patchwise network of {side}x{side} patches takes images whose sides are multiples of {side}, got "
                f"{height}x{width}"
            )
        maps = self.relu2(self.conv2(self.relu1(self.conv1(images))))
        return self.fc(self.avgpool(maps).flatten(1))

    def preactivations(self) -> dict[str, Tap]:
        """Return where the second layer's sums are, before the rectifier."""
        return {"preactivation1": Tap("relu2", "input")}


def _numbers(name: str) -> tuple[int, int] | None:
    """Return patch size and width of a name; ``None`` for one that is not of the family."""
    match = re.fullmatch(r"patchwise_(\d+)_(\d+)", name)
    if match is None:
        return None
    patch_size, width = int(match[1]), int(match[2])
    for what, number in (("patch size", patch_size), ("width", width)):
        if number < 1:
            raise InputError(f"{name}: {what} must be at least 1, got {number}")
    return patch_size, width


def build_patchwise(name: str, *, num_classes: int, in_channels: int) -> Patchwise:
    """Return ``patchwise_P_W``.

    Raises:
        InputError: it is another name, or the patch size or the width is 0.
    """
    numbers = _numbers(name)
    if numbers is None:
        raise InputError(f"{name!r} is no network of this family; wanted patchwise_P_W")
    patch_size, width = numbers
    return Patchwise(patch_size=patch_size, width=width, num_classes=num_classes, in_channels=in_channels)


FAMILY = Family(
    names=("patchwise_4_16", "patchwise_4_64", "patchwise_4_256", "patchwise_8_64"),
    knows=lambda name: _numbers(name) is not None,
    build=build_patchwise,
)
