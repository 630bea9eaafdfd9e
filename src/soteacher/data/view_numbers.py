"""Numbers for augmented views, where each image has finitely many of them: what is known of a view can then be kept."""

from __future__ import annotations

import torch
from torch import Tensor

from soteacher.data.augment import AugmentConfig, Views, draw_views
from soteacher.randomness import generator


def number_of_views(config: AugmentConfig) -> int | None:
    """Return how many views of an image an augmentation has; ``None`` where there is no end of them.

    Crops of an image padded by P pixels have (2P + 1)^2 places, mirrored or not: 162 for CIFAR's usual 4 pixels. Of
    a bank there are as many as it holds, and of randomly resized crops without one any number.
    """
    if config.view_bank is not None:
        return config.view_bank
    if config.random_resized_crop is not None:
        return None
    return (2 * config.crop_padding + 1) ** 2 * (2 if config.horizontal_flip else 1)


def draw_numbered_views(
    config: AugmentConfig, count: int, source: torch.Generator, image_size: int, *, bank_seed: int
) -> tuple[Views, Tensor | None]:
    """Draw one view of each image, with its number.

    Args:
        config: the augmentation.
        count: N, the images.
        source: of the draw, on the CPU.
        image_size: height and width of the images, in pixels.
        bank_seed: of the views in the bank, if the augmentation has one.

    Returns:
        The views, on the CPU, and ``[N]`` int64 numbers from 0, the same for the same view of an image in every epoch;
        ``None`` where the views cannot be numbered.
    """
    if config.view_bank is None:
        views = draw_views(config, count, source, image_size)
        return views, _numbers(views, config, count)
    slots = torch.randint(config.view_bank, (count,), generator=source)
    return _from_bank(config, slots, image_size, bank_seed), slots


def _numbers(views: Views, config: AugmentConfig, count: int) -> Tensor | None:
    """Return the numbers of views with finitely many places."""
    if views.boxes is not None:
        return None
    numbers = torch.zeros(count, dtype=torch.int64)
    if views.offsets is not None:
        numbers = views.offsets[:, 0] * (2 * config.crop_padding + 1) + views.offsets[:, 1]
    return numbers if views.flips is None else 2 * numbers + views.flips


def _from_bank(config: AugmentConfig, slots: Tensor, image_size: int, seed: int) -> Views:
    """Return of each image the view in one slot of its bank, ``[N]``; the bank is drawn anew, and never kept whole."""
    taken: Views | None = None
    for slot in range(config.view_bank or 0):
        views = draw_views(config, len(slots), generator(seed, "slot", slot), image_size)
        taken = views if taken is None else views.where(slots == slot, taken)
    assert taken is not None
    return taken
