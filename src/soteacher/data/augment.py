"""Random changes to training images: drawn for a whole epoch at once, applied to batches on their device."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor

from soteacher.errors import InputError
from soteacher.settings import Settings

_ATTEMPTS = 10
_ASPECT_RANGE = (3 / 4, 4 / 3)
_AreaShare = Annotated[float, Field(gt=0, le=1)]


class AugmentConfig(Settings):
    """Which random changes training images undergo."""

    crop_padding: int = Field(default=4, ge=0)
    """Black pixels added on every side before a crop of the original size is taken somewhere; 0: no such crop."""
    horizontal_flip: bool = True
    """Mirror every second image on average."""
    random_resized_crop: tuple[_AreaShare, _AreaShare] | None = None
    """For photographs: least and greatest share of the area that is cut out, aspect ratio 3/4 to 4/3, and scaled back
    to the original size. Takes the place of the padded crop, so ``crop_padding`` must be 0; None: no such crop."""
    view_bank: int | None = Field(default=None, ge=1)
    """Draw so many views of each image once, for each seed, and take one of them each time, so that a teacher's answers
    to them can be kept; None: views are drawn anew."""

    @model_validator(mode="after")
    def _one_kind_of_crop(self) -> AugmentConfig:
        if self.random_resized_crop is None:
            return self
        if self.crop_padding:
            raise InputError(
                f"crop_padding is {self.crop_padding}; wanted 0, as random_resized_crop takes the place of that crop"
            )
        low, high = self.random_resized_crop
        if low > high:
            raise InputError(f"random_resized_crop is {low}, {high}; wanted the least share of the area first")
        return self


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Views:
    """The random numbers of N views, one for every image; None where a change is not made."""

    offsets: Tensor | None = None
    """``[N, 2]`` int64: top and left edge of the crop in the padded image."""
    boxes: Tensor | None = None
    """``[N, 4]`` int64: top, left, height and width of the part that is scaled to the image's size, in pixels."""
    flips: Tensor | None = None
    """``[N]`` bool."""

    def select(self, rows: Tensor) -> Views:
        """Return the views of the given rows, in their order."""
        return Views(
            offsets=None if self.offsets is None else self.offsets[rows],
            boxes=None if self.boxes is None else self.boxes[rows],
            flips=None if self.flips is None else self.flips[rows],
        )

    def where(self, chosen: Tensor, other: Views) -> Views:
        """Return these views where ``chosen``, ``[N]`` bool, says so, and elsewhere others of the same kind."""

        def pick(own: Tensor | None, others: Tensor | None) -> Tensor | None:
            if own is None or others is None:
                return None
            return torch.where(chosen.view(-1, *[1] * (own.ndim - 1)), own, others)

        return Views(
            offsets=pick(self.offsets, other.offsets),
            boxes=pick(self.boxes, other.boxes),
            flips=pick(self.flips, other.flips),
        )

    def to(self, device: torch.device) -> Views:
        """Return the views on a device."""
        return Views(
            offsets=None if self.offsets is None else self.offsets.to(device),
            boxes=None if self.boxes is None else self.boxes.to(device),
            flips=None if self.flips is None else self.flips.to(device),
        )


def draw_views(config: AugmentConfig, count: int, generator: torch.Generator, image_size: int) -> Views:
    """Draw what happens to each of ``count`` square images.

    Args:
        config: the changes to make.
        count: number of images.
        generator: on the CPU, so that every device sees the same draws.
        image_size: height and width of the images, in pixels.

    Returns:
        The views, on the CPU.
    """
    offsets = boxes = flips = None
    if config.crop_padding:
        offsets = torch.randint(0, 2 * config.crop_padding + 1, (count, 2), generator=generator)
    if config.random_resized_crop is not None:
        boxes = _draw_boxes(config.random_resized_crop, count, generator, image_size)
    if config.horizontal_flip:
        flips = torch.rand(count, generator=generator) < 0.5
    return Views(offsets=offsets, boxes=boxes, flips=flips)


def _draw_boxes(area: tuple[float, float], count: int, generator: torch.Generator, image_size: int) -> Tensor:
    """Draw boxes within square images: the first of ten draws of area and aspect that fits, else the whole image."""
    height = torch.full((count,), image_size)
    width = height.clone()
    undecided = torch.ones(count, dtype=torch.bool)
    log_low, log_high = torch.tensor(_ASPECT_RANGE, dtype=torch.float64).log().tolist()
    for _ in range(_ATTEMPTS):
        shares, aspects = torch.rand(2, count, generator=generator, dtype=torch.float64)
        pixels = image_size**2 * (area[0] + (area[1] - area[0]) * shares)
        aspect = (log_low + (log_high - log_low) * aspects).exp()
        new_width = (pixels * aspect).sqrt().round().long()
        new_height = (pixels / aspect).sqrt().round().long()
        fits = (new_width >= 1) & (new_width <= image_size) & (new_height >= 1) & (new_height <= image_size)
        taken = undecided & fits
        height, width = torch.where(taken, new_height, height), torch.where(taken, new_width, width)
        undecided &= ~fits
    room = image_size + 1 - torch.stack((height, width), 1)
    corners = (torch.rand(count, 2, generator=generator, dtype=torch.float64) * room).long()
    return torch.cat((corners, height[:, None], width[:, None]), 1)


def apply_views(images: Tensor, views: Views, config: AugmentConfig) -> Tensor:
    """Return a batch of augmented images.

    Args:
        images: ``[B, C, H, W]`` uint8, or float32 in [0, 1].
        views: of these images, on their device.
        config: with which the views were drawn.

    Returns:
        ``[B, C, H, W]`` float32 in [0, 1].
    """
    if views.offsets is not None:
        images = crop(images, views.offsets, padding=config.crop_padding)
    if views.flips is not None and views.boxes is None:
        images = flip(images, views.flips)  # before the conversion: bytes move faster than floats
    images = to_unit_range(images)
    if views.boxes is not None:
        images = resized_crop(images, views.boxes)
        if views.flips is not None:
            images = flip(images, views.flips)
    return images


def to_unit_range(images: Tensor) -> Tensor:
    """Return images as float32 in [0, 1]: uint8 values divided by 255, floats as they are."""
    return images if images.is_floating_point() else images.float().div_(255)


def crop(images: Tensor, offsets: Tensor, *, padding: int) -> Tensor:
    """Pad images with zeros and cut out of each a part of the original size.

    Args:
        images: ``[B, C, H, W]``, of any type.
        offsets: ``[B, 2]`` int64 in 0 .. 2 * padding: top and left edge in the padded image.
        padding: pixels added on every side.

    Returns:
        ``[B, C, H, W]``, of the same type.

    Source: as torchvision's ``RandomCrop(size, padding)`` does at these offsets, one image at a time.
    """
    num_images, channels, height, width = images.shape
    padded = F.pad(images, (padding, padding, padding, padding)).contiguous()
    row, plane = width + 2 * padding, (height + 2 * padding) * (width + 2 * padding)
    image = channels * plane
    # Every place in memory at which a crop could begin, as a view without copying; then one look-up per image.
    last = (num_images - 1) * image + 2 * padding * (row + 1)
    windows = padded.as_strided((last + 1, channels, height, width), (1, plane, row, 1))
    starts = torch.arange(num_images, device=images.device) * image + offsets[:, 0] * row + offsets[:, 1]
    return windows.index_select(0, starts)


def flip(images: Tensor, flips: Tensor) -> Tensor:
    """Mirror some images left to right.

    Args:
        images: ``[B, C, H, W]``, of any type.
        flips: ``[B]`` bool: which.

    Returns:
        ``[B, C, H, W]``, of the same type.
    """
    both = torch.cat((images, images.flip(-1)))
    # A look-up of whole images is faster than a choice per pixel.
    return both.index_select(0, torch.arange(len(images), device=images.device) + len(images) * flips)


def resized_crop(images: Tensor, boxes: Tensor) -> Tensor:
    """Cut a box out of each image and scale it to the image's size, bilinearly.

    Args:
        images: ``[B, C, H, W]`` floating point.
        boxes: ``[B, 4]``: top, left, height and width, in pixels, within the image.

    Returns:
        ``[B, C, H, W]``, as cutting first and then ``F.interpolate(..., mode="bilinear", align_corners=False)`` gives.
    """
    size = images.new_tensor(images.shape[-2:])
    corner, extent = boxes[:, :2].to(images.dtype), boxes[:, 2:].to(images.dtype)

    def sampled(axis: int) -> Tensor:
        """Return where each output row or column lies, from -1 to 1 over the image's edges: ``[B, size]``."""
        steps = torch.arange(images.shape[2 + axis], device=images.device, dtype=images.dtype) + 0.5
        place = steps / size[axis] * extent[:, axis, None] - 0.5
        # Beyond the centres of a box's outermost pixels their values go on: nothing outside the box is seen.
        place = place.clamp(min=0).minimum(extent[:, axis, None] - 1) + corner[:, axis, None]
        return (2 * place + 1) / size[axis] - 1

    down, right = sampled(0), sampled(1)
    shape = (-1, images.shape[2], images.shape[3])
    grid = torch.stack((right[:, None, :].expand(shape), down[:, :, None].expand(shape)), -1)
    return F.grid_sample(images, grid, mode="bilinear", padding_mode="border", align_corners=False)
