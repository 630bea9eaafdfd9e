r"""Synthetic images whose true label distribution is known exactly: every patch shows one of a few features.

An example of M patches shows features :math:`z_1 \dots z_M`, each drawn uniformly; a feature has a label distribution
of its own, :math:`p_z(y)`, and the example's is their normalised geometric mean:

.. math:: p^*(y \mid x) \propto \Bigl( \prod_{m=1}^{M} p_{z_m}(y) \Bigr)^{1/M}

Source: the mixed-feature distribution of Dong et al. 2024, arXiv:2206.06661, section 3; from memory of the paper, not
checked. The renderings are ours.
"""

from __future__ import annotations

import colorsys
import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from pydantic import Field, field_validator, model_validator
from scipy.special import gammaincinv
from torch import Tensor

from soteacher.data.augment import AugmentConfig
from soteacher.data.dataset import DataSet, ImageSplit
from soteacher.data.download import Progress
from soteacher.data.source import SourceConfig
from soteacher.errors import InputError
from soteacher.randomness import generator

SplitName = Literal["train", "test"]
BLOCK = 256
"""Examples that are drawn at once, from a generator of their own: a larger split begins with a smaller one."""
CODE_RANGE = (0.25, 0.75)
"""Of the codes' values: noise of a standard deviation below about 0.1 is rarely clipped."""
PATTERNS = ("grating", "diagonal", "checker", "blobs", "rings")
FREQUENCIES = (1, 2)
"""Periods of a pattern in a patch."""
HUES = 6
"""Colours of the patterns, evenly around the colour wheel, all on one dark grey."""
NUM_TEXTURES = len(PATTERNS) * len(FREQUENCIES) * HUES
PHASES = (0.0, 0.25, 0.5, 0.75)
"""Shifts of a pattern, in periods."""
BRIGHTNESS = (0.85, 1.0, 1.15)
"""Factors of all channels."""
SMALLEST_TEXTURE = 8
"""Pixels a side that the finer patterns need, or different ones would look the same."""


class MixedFeatureConfig(SourceConfig):
    """Synthetic images of patches that show features, with the exact label distribution of every image.

    All examples are made from ``seed``: test examples are independent of the training ones, and more examples begin
    with the same ones. Settings change no draws that they need not: other noise is the same noise, scaled. Every patch
    is shown under a random transformation that keeps its feature: a code is flipped and rotated by quarter turns, a
    texture moreover shifted in phase and made darker or brighter. Mirroring a whole image is among them, so
    ``augment.horizontal_flip`` keeps the label distribution exactly; a crop cuts patches and is refused.

    Images are float32. Noise is added to the patches and the sum clipped to [0, 1]. Where it is so strong that one
    feature can be taken for another, the label distribution is still that of the features that were shown.
    ``clean_labels`` are the likeliest classes.
    """

    source: Literal["mixed_feature"] = "mixed_feature"
    """Chooses this source."""
    train_examples: int | None = Field(default=1000, gt=0)
    """Number of training images to make."""
    test_examples: int | None = Field(default=1000, gt=0)
    """Number of test images to make."""
    augment: AugmentConfig = AugmentConfig(crop_padding=0)
    """Random changes to training images: mirroring or none."""
    rendering: Literal["vectors", "textures"] = "vectors"
    """How features look: ``vectors``, a random code of each in a grey patch; ``textures``, gratings, checkers, blobs
    and rings in colours."""
    num_patches: int | None = Field(default=None, gt=0)
    """Patches of an image, a square number; null: 4 of vectors, 16 of textures."""
    patch_size: int | None = Field(default=None, gt=0)
    """Height and width of a patch, in pixels; null: 4 of vectors, 8 of textures."""
    num_features: int = Field(default=16, ge=2)
    """Different features; of textures there are at most 60."""
    num_classes: int = Field(default=10, ge=2)
    """Classes."""
    concentration: float = Field(default=0.1, gt=0)
    """Of the symmetric Dirichlet distribution that each feature's label distribution is drawn from: below 1 many
    features are sure of their class, above it most are ambiguous."""
    noise: float = Field(default=0.05, ge=0)
    """Standard deviation of the Gaussian noise of every pixel, whose range is 1; the variance of the theory is its
    square."""
    seed: int = Field(default=0, ge=0)
    """Of the data set: features, their label distributions and all examples. A run's own seed changes none of it."""

    @field_validator("train_examples", "test_examples")
    @classmethod
    def _counted(cls, value: int | None) -> int:
        if value is None:
            raise InputError("wanted a number of examples to make, got null")
        return value

    @field_validator("num_patches")
    @classmethod
    def _square(cls, value: int | None) -> int | None:
        if value is not None and math.isqrt(value) ** 2 != value:
            raise InputError(f"wanted a square number such as 4, 9 or 16, got {value}")
        return value

    @model_validator(mode="after")
    def _fits_together(self) -> MixedFeatureConfig:
        if self.augment.crop_padding:
            raise InputError(f"augment.crop_padding is {self.augment.crop_padding}; wanted 0, as a crop cuts patches")
        if self.augment.random_resized_crop is not None:
            raise InputError("augment.random_resized_crop is set; wanted null, as a crop cuts patches")
        if self.rendering == "textures" and self.num_features > NUM_TEXTURES:
            raise InputError(f"num_features is {self.num_features}; wanted at most {NUM_TEXTURES} of textures")
        if self.rendering == "textures" and self.side < SMALLEST_TEXTURE:
            raise InputError(f"patch_size is {self.side}; wanted at least {SMALLEST_TEXTURE} of textures")
        return self

    @property
    def grid(self) -> int:
        """Rows and columns of patches in an image."""
        return math.isqrt(self.num_patches or (4 if self.rendering == "vectors" else 16))

    @property
    def side(self) -> int:
        """Height and width of a patch, in pixels."""
        return self.patch_size or (4 if self.rendering == "vectors" else 8)

    def load(self, root: Path, *, progress: Progress | None = None) -> DataSet:
        """Make the data; see :meth:`SourceConfig.load`."""
        del root, progress
        features = make_features(self)
        # Of patches without noise: networks see the same numbers whatever the noise and the number of examples.
        by_channel = features.renderings.double().transpose(0, 2).flatten(1)
        return self.finish(
            "mixed_feature",
            train=_make_split(self, features, "train"),
            test=_make_split(self, features, "test"),
            class_names=tuple(map(str, range(self.num_classes))),
            statistics=(tuple(by_channel.mean(1).tolist()), tuple(by_channel.std(1, correction=0).tolist())),
        )


@dataclass(frozen=True, slots=True, eq=False)
class Features:
    """What the features of a data set are."""

    log_distributions: Tensor
    """``[F, K]`` float64: logarithm of each feature's label distribution."""
    renderings: Tensor
    """``[F, G, C, P, P]`` float32 in [0, 1]: each feature under each of its transformations, without noise."""


def make_features(config: MixedFeatureConfig) -> Features:
    """Return the features of a data set; they do not depend on noise, number of patches or examples."""
    if config.rendering == "vectors":
        low, high = CODE_RANGE
        shape = (config.num_features, 1, 1, config.side, config.side)
        upright = low + (high - low) * torch.rand(shape, generator=generator(config.seed, "mixed_feature", "codes"))
    else:
        kinds = list(itertools.product(PATTERNS, FREQUENCIES, range(HUES)))
        order = torch.randperm(NUM_TEXTURES, generator=generator(config.seed, "mixed_feature", "textures")).tolist()
        chosen = [kinds[number] for number in order[: config.num_features]]
        upright = torch.stack([_texture(*kind, side=config.side) for kind in chosen])
    turned = [upright.rot90(turns, (-2, -1)) for turns in range(4)]
    return Features(
        log_distributions=_log_dirichlet(
            (config.num_features, config.num_classes),
            concentration=config.concentration,
            source=generator(config.seed, "mixed_feature", "label distributions"),
        ),
        renderings=torch.cat([*turned, *(patch.flip(-1) for patch in turned)], 1),
    )


def draw_features(config: MixedFeatureConfig, split: SplitName) -> Tensor:
    """Return which feature each patch of a split's examples shows: ``[N, M]`` int64 in 0 .. F - 1, row by row."""
    shape = (BLOCK, config.grid**2)
    drawn = [torch.randint(config.num_features, shape, generator=source) for source in _blocks(config, split, "z")]
    return torch.cat(drawn)[: _count(config, split)]


def normalized_geometric_mean(distributions: Tensor) -> Tensor:
    r"""Geometric mean of distributions, divided by its sum.

    .. math:: q_k = \frac{\prod_m p_{mk}^{1/M}}{\sum_j \prod_m p_{mj}^{1/M}}

    It is computed in log space: small probabilities do not underflow in the product.

    Args:
        distributions: ``[..., M, K]``, each ``[K]`` not negative with sum 1.

    Returns:
        ``[..., K]``, with sum 1.

    Raises:
        InputError: something is no distribution, or every class has probability 0 in one of them.
    """
    if distributions.ndim < 2 or not distributions.is_floating_point() or 0 in distributions.shape[-2:]:
        came = f"{distributions.dtype} {list(distributions.shape)}"
        raise InputError(f"wanted distributions [..., M, K] in floating point, got {came}")
    off = (distributions.sum(-1) - 1).abs()
    if not (distributions >= 0).all() or not (off <= 1e-3).all():
        raise InputError("wanted distributions that are not negative and have sum 1, got others")
    mean = distributions.log().mean(-2)
    if mean.isneginf().all(-1).any():
        raise InputError("the geometric mean is 0: every class has probability 0 in one of the distributions")
    return mean.softmax(-1)


def draw_labels(distributions: Tensor, source: torch.Generator) -> Tensor:
    """Draw one label from each distribution, by inverting its distribution function.

    Args:
        distributions: ``[N, K]`` floating point, not negative, with positive sums.
        source: where the N uniform numbers come from, on the CPU.

    Returns:
        ``[N]`` int64; classes of probability 0 are never drawn.
    """
    below = distributions.double().cumsum(1)
    uniform = torch.rand(len(distributions), 1, generator=source, dtype=torch.float64)
    return torch.searchsorted(below / below[:, -1:], uniform, right=True).squeeze(1)


def _make_split(config: MixedFeatureConfig, features: Features, split: SplitName) -> ImageSplit:
    """Make the examples of a split."""
    shown = draw_features(config, split)
    count, channels, side = len(shown), features.renderings.shape[2], config.grid * config.side
    images = torch.empty(count, channels, side, side)
    distributions = features.log_distributions[shown].mean(1).softmax(1)
    labels: list[Tensor] = []
    draws = zip(*(_blocks(config, split, purpose) for purpose in ("transformation", "noise", "label")), strict=True)
    for number, (transformation, noise, label) in enumerate(draws):
        rows = slice(number * BLOCK, min((number + 1) * BLOCK, count))
        here = len(shown[rows])
        # Whole blocks are drawn and cut: a shorter draw would not begin with the same numbers.
        turns = torch.randint(features.renderings.shape[1], (BLOCK, config.grid**2), generator=transformation)[:here]
        patches = features.renderings[shown[rows], turns].unflatten(1, (config.grid, config.grid))
        clean = patches.permute(0, 3, 1, 4, 2, 5).reshape(here, channels, side, side)
        normal = torch.randn(BLOCK, channels, side, side, generator=noise)[:here]
        images[rows] = (clean + config.noise * normal).clamp_(0, 1)
        labels.append(draw_labels(distributions[rows], label))
    return ImageSplit(
        images=images,
        labels=torch.cat(labels),
        label_distribution=distributions.float(),
        clean_labels=distributions.argmax(1),
    )


def _count(config: MixedFeatureConfig, split: SplitName) -> int:
    count = config.train_examples if split == "train" else config.test_examples
    assert count is not None, "the settings refuse it"
    return count


def _blocks(config: MixedFeatureConfig, split: SplitName, purpose: str) -> Iterator[torch.Generator]:
    """Yield a generator for each block of a split's examples."""
    for block in range(-(-_count(config, split) // BLOCK)):
        yield generator(config.seed, "mixed_feature", split, purpose, block)


def _log_dirichlet(shape: tuple[int, int], *, concentration: float, source: torch.Generator) -> Tensor:
    r"""Return logarithms of draws from a symmetric Dirichlet distribution, ``[F, K]`` float64.

    They are normalised gamma draws, and :math:`\log G_a = \log G_{a + 1} + \log(U) / a` does not underflow where the
    concentration a is small.

    Source: Marsaglia and Tsang 2000, doi:10.1145/358407.358414, section 6; the draws of :math:`G_{a+1}` themselves
    by inverting the distribution function.
    """
    first, second = torch.rand(2, *shape, generator=source, dtype=torch.float64).clamp_(min=2.0**-53)
    gamma = torch.from_numpy(gammaincinv(concentration + 1, first.numpy()))
    return (gamma.log() + second.log() / concentration).log_softmax(1)


def _texture(pattern: str, frequency: int, hue: int, *, side: int) -> Tensor:
    """Return a texture in all phases and brightnesses, ``[12, 3, P, P]`` in [0, 1]."""
    colour = torch.tensor(colorsys.hsv_to_rgb(hue / HUES, 0.55, 0.75))[:, None, None]
    ground = torch.full((3, 1, 1), CODE_RANGE[0])
    strengths = [_pattern(pattern, frequency, phase, side=side) for phase in PHASES]
    return torch.stack(
        [factor * (ground + (colour - ground) * strength) for strength in strengths for factor in BRIGHTNESS]
    )


def _pattern(pattern: str, frequency: int, phase: float, *, side: int) -> Tensor:
    """Return how much of its colour each pixel of a texture has, ``[P, P]`` in [0, 1]."""
    place = (torch.arange(side) + 0.5) / side
    down, right = torch.meshgrid(place, place, indexing="ij")

    def wave(distance: Tensor) -> Tensor:
        return (2 * math.pi * (frequency * distance + phase)).sin()

    if pattern == "blobs":
        return (1 + wave(down)) * (1 + wave(right)) / 4
    waves = {
        "grating": lambda: wave(right),
        "diagonal": lambda: wave(down + right),
        "checker": lambda: (4 * wave(down) * wave(right)).tanh(),
        "rings": lambda: wave(1.5 * torch.hypot(down - 0.5, right - 0.5)),
    }
    return (1 + waves[pattern]()) / 2
