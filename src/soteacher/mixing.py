"""Blended images: each image of a batch is mixed with another one, and its label with the other's."""

from __future__ import annotations

import math
from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from scipy.special import betaincinv
from torch import Tensor

from soteacher.errors import InputError
from soteacher.settings import Settings
from soteacher.types import Mixture


class MixingConfig(Settings):
    """How training images are blended."""

    name: Literal["mixup", "cutmix"]
    """``mixup``: a weighted mean of two whole images; ``cutmix``: a rectangle of the other image in its place."""
    alpha: float = Field(default=1.0, gt=0)
    """Both parameters of the Beta distribution of the own image's share: 1 draws it evenly, a small value near 0 or
    1."""
    probability: float = Field(default=1.0, gt=0, le=1)
    """How likely a batch is blended at all; the others stay as they are."""


def mix(images: Tensor, labels: Tensor, config: MixingConfig, generator: torch.Generator) -> tuple[Tensor, Mixture]:
    r"""Blend each image of a batch with another one of it.

    .. math::
        \text{mixup: } \lambda x_i + (1 - \lambda) x_{\pi(i)}, \qquad
        \text{cutmix: } m \odot x_i + (1 - m) \odot x_{\pi(i)}, \qquad \lambda \sim \mathrm{Beta}(\alpha, \alpha)

    with one share :math:`\lambda` and one random permutation :math:`\pi` for the whole batch, which may leave an image
    with itself. The mask :math:`m` is 0 in a rectangle of the image's own aspect ratio and of the share
    :math:`1 - \lambda` of its area, whose centre is drawn evenly from all pixels; what sticks out of the image is cut
    off. The own share that is returned is that of the pixels which are kept, so it is :math:`\lambda` or more, up to
    rounding to whole pixels.

    Args:
        images: ``[B, C, H, W]`` float32. They stay as they are.
        labels: ``[B]`` class ids.
        config: how.
        generator: on the CPU, so that every device sees the same draws.

    Returns:
        The blended images, and what is in them besides each one's own. A batch of one, and one that is not to be
        blended, comes back as it is, its own share 1.

    Raises:
        InputError: the images are not ``[B, C, H, W]`` of floats, or the labels not ``[B]``.

    Source: mixup by Zhang et al. 2018, arXiv:1710.09412, cutmix by Yun et al. 2019, arXiv:1905.04899; one share a batch
    and the cut-off rectangle as in both released codes. That of cutmix makes the sides of the rectangle even numbers;
    here they are the nearest whole ones.
    """
    if images.ndim != 4 or not images.is_floating_point() or labels.shape != images.shape[:1]:
        raise InputError(
            "mixing needs images [B, C, H, W] of floats and labels [B], got "
            f"{list(images.shape)} of {images.dtype} and {list(labels.shape)}"
        )
    if len(images) < 2 or _uniform(generator) >= config.probability:
        return images, Mixture(labels=labels, share=torch.ones(len(images), device=images.device))
    order = torch.randperm(len(images), generator=generator).to(images.device)
    share = draw_own_share(config.alpha, generator)
    if config.name == "mixup":
        blended = share * images + (1 - share) * images[order]
    else:
        blended, share = _pasted(images, order, share, generator)
    shares = torch.full((len(images),), share, dtype=torch.float32, device=images.device)
    return blended, Mixture(labels=labels[order.to(labels.device)], share=shares)


def draw_own_share(alpha: float, generator: torch.Generator) -> float:
    """Draw a number from the Beta distribution whose parameters are both ``alpha``, by its inverse.

    torch draws no Beta variates from a generator, and scipy none from torch's.

    Args:
        alpha: positive.
        generator: on the CPU.
    """
    return float(betaincinv(alpha, alpha, _uniform(generator)))


def mixed_labels(labels: Tensor, mixture: Mixture | None, *, num_classes: int) -> Tensor:
    r"""Return the labels of blended images as distributions over the classes.

    .. math:: \lambda_i e_{y_i} + (1 - \lambda_i) e_{y'_i}

    Args:
        labels: ``[B]`` class ids of the own images.
        mixture: what is in the images besides; ``None``: nothing.
        num_classes: K.

    Returns:
        ``[B, K]`` float32; each row sums to 1.
    """
    own = F.one_hot(labels.long(), num_classes).float()
    if mixture is None:
        return own
    share = mixture.share.unsqueeze(-1)
    return share * own + (1 - share) * F.one_hot(mixture.labels.long(), num_classes).float()


def _pasted(images: Tensor, order: Tensor, share: float, generator: torch.Generator) -> tuple[Tensor, float]:
    """Return images with a rectangle of others in them, and the share of the pixels that are still their own."""
    height, width = images.shape[2:]
    top, bottom = _interval(height, math.sqrt(1 - share), generator)
    left, right = _interval(width, math.sqrt(1 - share), generator)
    pasted = images.clone()
    pasted[:, :, top:bottom, left:right] = images[:, :, top:bottom, left:right][order]
    return pasted, 1 - (bottom - top) * (right - left) / (height * width)


def _interval(size: int, part: float, generator: torch.Generator) -> tuple[int, int]:
    """Draw beginning and end of a part of ``size`` pixels around an even draw of its centre."""
    length = round(size * part)
    begin = int(torch.randint(0, size, (), generator=generator)) - length // 2
    return max(begin, 0), min(begin + length, size)


def _uniform(generator: torch.Generator) -> float:
    return torch.rand((), generator=generator, dtype=torch.float64).item()
