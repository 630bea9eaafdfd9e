"""A classifier takes images in [0, 1]: it resizes and normalises them for the network that it holds."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn import functional as F

from soteacher.errors import InputError
from soteacher.models.reused_classifier import ReusedSpec, reuse_classifier
from soteacher.models.zoo import build_network, timm_config
from soteacher.settings import Settings


class NetworkSpec(Settings):
    """All that is needed to build a classifier again; kept beside its weights."""

    model: str
    """A name of the zoo."""
    num_classes: int = Field(ge=1)
    """K."""
    in_channels: int = Field(default=3, ge=1)
    """Channels of the images."""
    mean: tuple[float, ...]
    """Mean of each channel, for images in [0, 1]."""
    std: tuple[float, ...]
    """Standard deviation of each channel."""
    input_size: int | None = Field(default=None, ge=1)
    """Side in pixels of the square that images are resized to; none takes them as they come."""
    class_names: tuple[str, ...] = ()
    """The classes in the order of their ids; empty where they have no names."""
    reused: ReusedSpec | None = None
    """The projector and the teacher's classifier that the network ends in; null where it has its own end."""

    @model_validator(mode="after")
    def _fits_together(self) -> NetworkSpec:
        _check_normalization(self.mean, self.std)
        if len(self.mean) != self.in_channels:
            raise InputError(f"mean must have one number for each of {self.in_channels} channels, got {len(self.mean)}")
        if self.class_names and len(self.class_names) != self.num_classes:
            raise InputError(f"class_names must be {self.num_classes}, or none, got {len(self.class_names)}")
        return self


class Classifier(nn.Module):
    """A network behind its input normalisation. Only the network has weights: mean and std are not in ``state_dict``.

    Args:
        network: normalised images ``[B, C, H, W]`` to logits ``[B, K]``.
        mean: one number for each channel, for images in [0, 1].
        std: likewise, positive.
        input_size: side in pixels; images of another size are resized to this square (bilinear, antialiased).

    Raises:
        InputError: mean and std do not match, or a number is out of its range.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self, network: nn.Module, *, mean: Sequence[float], std: Sequence[float], input_size: int | None = None
    ) -> None:
        super().__init__()
        _check_normalization(mean, std)
        if input_size is not None and input_size < 1:
            raise InputError(f"input_size must be at least 1 pixel, got {input_size}")
        self.network = network
        self.input_size = input_size
        self.register_buffer("mean", torch.tensor(mean, dtype=torch.float32).view(-1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std, dtype=torch.float32).view(-1, 1, 1), persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        """Return logits ``[B, K]`` of images ``[B, C, H, W]``, floating point in [0, 1].

        Raises:
            InputError: the images are not of this shape or type, or the network does not return logits ``[B, K]``.
        """
        channels = self.mean.shape[0]
        if images.ndim != 4 or images.shape[1] != channels:
            raise InputError(f"wanted images [B, {channels}, H, W], got shape {list(images.shape)}")
        if not images.is_floating_point():
            raise InputError(f"wanted floating point images in [0, 1], got {images.dtype}")
        size = self.input_size
        if size is not None and images.shape[-2:] != (size, size):
            images = F.interpolate(images, size=(size, size), mode="bilinear", antialias=True)
        logits = self.network((images - self.mean) / self.std)
        if not isinstance(logits, Tensor) or logits.ndim != 2:
            came = list(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
            raise InputError(f"wanted logits [B, K] from {type(self.network).__name__}, got {came}")
        return logits


def build_classifier(spec: NetworkSpec, *, pretrained: bool = False) -> Classifier:
    """Return the classifier with random, or timm's published, weights; see :func:`~soteacher.models.zoo.build_network`.

    Raises:
        InputError: there is no such network, or no published weights of it.
    """
    network = build_network(
        spec.model, num_classes=spec.num_classes, in_channels=spec.in_channels, pretrained=pretrained
    )
    return classifier_of(network, spec)


def classifier_of(network: nn.Module, spec: NetworkSpec) -> Classifier:
    """Return a network behind the spec's normalisation, with the end that the spec says; it is changed in place.

    Raises:
        InputError: the network cannot have that end.
    """
    if spec.reused is not None:
        reuse_classifier(network, spec.reused, num_classes=spec.num_classes)
    return Classifier(network, mean=spec.mean, std=spec.std, input_size=spec.input_size)


def network_spec(
    model: str,
    *,
    num_classes: int,
    in_channels: int,
    mean: Sequence[float],
    std: Sequence[float],
    image_size: int,
    class_names: Sequence[str] = (),
    pretrained: bool = False,
) -> NetworkSpec:
    """Return the spec of a network for a data set.

    The normalisation is the data's, but that of its published weights for a pretrained network (where the channels are
    as many as theirs). ``input_size`` is set where a network of timm takes only one size and the data have another.

    Args:
        model: a name of the zoo.
        num_classes: classes of the data.
        in_channels: channels of the data.
        mean: the data's mean of each channel, in [0, 1].
        std: the data's standard deviation of each channel.
        image_size: side of the data's images in pixels.
        class_names: the data's classes in the order of their ids.
        pretrained: whether the network is going to start from published weights.

    Raises:
        InputError: there is no such network in timm.
        ValidationError: the numbers do not fit together.
    """
    published = timm_config(model)
    input_size = None
    if published is not None:
        if pretrained and len(published.mean) == in_channels:
            mean, std = published.mean, published.std
        wanted_size = published.input_size[-1]
        if published.fixed_input_size and wanted_size != image_size:
            input_size = wanted_size
    return NetworkSpec(
        model=model,
        num_classes=num_classes,
        in_channels=in_channels,
        mean=tuple(mean),
        std=tuple(std),
        input_size=input_size,
        class_names=tuple(class_names),
    )


def _check_normalization(mean: Sequence[float], std: Sequence[float]) -> None:
    """Raise an InputError unless there are equally many means and positive standard deviations."""
    if not mean or len(mean) != len(std):
        raise InputError(f"mean and std must have one number for each channel, got {len(mean)} and {len(std)}")
    if min(std) <= 0:
        raise InputError(f"std must be positive, got {tuple(std)}")
