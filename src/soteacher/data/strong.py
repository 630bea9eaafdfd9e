"""Strong random changes to images (RandAugment): drawn for an epoch at once, applied to batches on their device."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from soteacher.torchvision_operators import define_missing_operators

CHANGES_PER_IMAGE = 2
STRENGTH = 9 / 30
"""Share of the greatest strength of each change."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Changes:
    """Which changes N images undergo, one after the other."""

    kinds: Tensor
    """``[N, 2]`` int64: places in the table of changes."""
    backwards: Tensor
    """``[N, 2]`` bool: whether a change with a direction goes the other way: left, darker, flatter."""

    def select(self, rows: Tensor) -> Changes:
        """Return the changes of the given rows, in their order."""
        return Changes(kinds=self.kinds[rows], backwards=self.backwards[rows])

    def to(self, device: torch.device) -> Changes:
        """Return the changes on a device."""
        return Changes(kinds=self.kinds.to(device), backwards=self.backwards.to(device))


def draw_changes(count: int, generator: torch.Generator) -> Changes:
    """Draw two of the fourteen changes for each of ``count`` images, each with its direction.

    Args:
        count: number of images.
        generator: on the CPU, so that every device sees the same draws.
    """
    kinds = torch.randint(0, len(_TABLE), (count, CHANGES_PER_IMAGE), generator=generator)
    backwards = torch.rand(count, CHANGES_PER_IMAGE, generator=generator) < 0.5
    return Changes(kinds=kinds, backwards=backwards)


def apply_changes(images: Tensor, changes: Changes) -> Tensor:
    """Return the changed images: all images of a batch with the same change at once.

    Args:
        images: ``[B, C, H, W]`` floating point in [0, 1]; those that are neither grey nor RGB change channel by
            channel, and a change of saturation leaves all but RGB as they are.
        changes: of these images.

    Returns:
        ``[B, C, H, W]`` in [0, 1].

    Source: Cubuk et al. 2020, arXiv:1909.13719: two changes at strength 9 of 30, with torchvision's changes and ranges;
    what a change uncovers is black.
    """
    result = images.clone()
    for turn in range(CHANGES_PER_IMAGE):
        key = changes.kinds[:, turn] * 2 + changes.backwards[:, turn].long()
        for value in key.unique().tolist():
            change, strength = _TABLE[value // 2]
            rows = (key == value).nonzero().squeeze(1)
            result[rows] = change(_functional(), result[rows], -strength if value % 2 else strength).clamp_(0, 1)
    return result


@cache
def _functional() -> ModuleType:
    """Import torchvision's functions when they are needed."""
    define_missing_operators()
    from torchvision.transforms.v2 import functional

    return functional


def _as_it_is(library: Any, images: Tensor, strength: float) -> Tensor:
    del library, strength
    return images.clone()


def _shear(axis: int, library: Any, images: Tensor, strength: float) -> Tensor:
    degrees = torch.tensor(strength).atan().rad2deg().item()
    shear = [degrees, 0.0] if axis == 0 else [0.0, degrees]
    return library.affine(images, angle=0.0, translate=[0, 0], scale=1.0, shear=shear, center=[0, 0])


def _translate(axis: int, library: Any, images: Tensor, strength: float) -> Tensor:
    pixels = int(strength * images.shape[-1 if axis == 0 else -2])
    translate = [pixels, 0] if axis == 0 else [0, pixels]
    return library.affine(images, angle=0.0, translate=translate, scale=1.0, shear=[0.0, 0.0])


def _rotate(library: Any, images: Tensor, strength: float) -> Tensor:
    return library.rotate(images, strength)


def _enhance(name: str, library: Any, images: Tensor, strength: float) -> Tensor:
    if name == "saturation" and images.shape[1] != 3:
        return images.clone()
    return _by_channel(partial(getattr(library, f"adjust_{name}"), **{f"{name}_factor": 1 + strength}), images)


def _posterize(library: Any, images: Tensor, strength: float) -> Tensor:
    return library.posterize(images, 8 - round(4 * abs(strength)))


def _solarize(library: Any, images: Tensor, strength: float) -> Tensor:
    return library.solarize(images, 1 - abs(strength))


def _alone(name: str, library: Any, images: Tensor, strength: float) -> Tensor:
    del strength
    return _by_channel(getattr(library, name), images)


def _by_channel(change: Callable[[Tensor], Tensor], images: Tensor) -> Tensor:
    """Change images of a number of channels that torchvision does not know as so many grey ones."""
    if images.shape[1] in (1, 3):
        return change(images)
    return change(images.flatten(0, 1)[:, None]).view_as(images)


_Change = Callable[[Any, Tensor, float], Tensor]
_TABLE: tuple[tuple[_Change, float], ...] = (
    (_as_it_is, 0.0),
    (partial(_shear, 0), 0.3 * STRENGTH),
    (partial(_shear, 1), 0.3 * STRENGTH),
    (partial(_translate, 0), 150 / 331 * STRENGTH),
    (partial(_translate, 1), 150 / 331 * STRENGTH),
    (_rotate, 30 * STRENGTH),
    (partial(_enhance, "brightness"), 0.9 * STRENGTH),
    (partial(_enhance, "saturation"), 0.9 * STRENGTH),
    (partial(_enhance, "contrast"), 0.9 * STRENGTH),
    (partial(_enhance, "sharpness"), 0.9 * STRENGTH),
    (_posterize, STRENGTH),
    (_solarize, STRENGTH),
    (partial(_alone, "autocontrast"), 0.0),
    (partial(_alone, "equalize"), 0.0),
)
"""The changes, each with its strength in its own unit: slope, share of the side, degrees, share of the effect."""
