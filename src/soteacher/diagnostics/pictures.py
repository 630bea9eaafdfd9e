"""Images as text, so that a card holds those it speaks of."""

from __future__ import annotations

import io
from base64 import b64encode

import torch
from torch import Tensor

from soteacher.data import FolderImages, ImageSplit
from soteacher.data.augment import to_unit_range

LARGEST_SIDE = 96
"""Larger pictures are made smaller, so that a card stays a small file."""


def png_of(split: ImageSplit, row: int) -> str | None:
    """Return an image of a split as a PNG file in base64; ``None`` where its channels are neither grey nor RGB.

    Args:
        split: the images.
        row: which one.
    """
    from PIL import Image  # only cards need it here

    pixels = _pixels(split, row)
    if pixels is None:
        return None
    picture = Image.fromarray(pixels.numpy())
    picture.thumbnail((LARGEST_SIDE, LARGEST_SIDE))
    file = io.BytesIO()
    picture.save(file, format="PNG", optimize=True)
    return b64encode(file.getvalue()).decode("ascii")


def _pixels(split: ImageSplit, row: int) -> Tensor | None:
    """Return an image as uint8, ``[H, W]`` or ``[H, W, 3]``."""
    image = split.images.read(row) if isinstance(split.images, FolderImages) else split.images[row]
    if image.shape[0] not in (1, 3):
        return None
    scaled = to_unit_range(image).clamp(0, 1).mul(255).round().to(torch.uint8)
    return scaled[0].contiguous() if len(scaled) == 1 else scaled.permute(1, 2, 0).contiguous()
