"""A network that ends in a projector and in another network's linear classifier, as students of SimKD do."""

from __future__ import annotations

from typing import final

from pydantic import Field
from torch import Tensor, nn

from soteacher.errors import InputError
from soteacher.settings import Settings


class ReusedSpec(Settings):
    """What builds the end of such a network again; see :func:`reuse_classifier`."""

    classifier: str
    """Path of the network's own classifier layer, which is replaced."""
    pooling: str | None = None
    """Path of the layer that averages the last maps, where they are projected; none: the pooled vectors are."""
    in_features: int = Field(ge=1)
    """Channels of the maps, or length of the vectors, that are projected."""
    features: int = Field(ge=1)
    """D: the numbers that the reused classifier takes in."""
    bias: bool = True
    """Whether the reused classifier has one."""
    reduction: int = Field(default=2, ge=1)
    """The projector's inner channels are D divided by this, rounded down."""


@final
class ProjectedPooling(nn.Module):
    """A projector of maps ``[B, C, H, W]`` to ``[B, D, H, W]``, and the network's own pooling of them.

    Three convolutions, 1x1, 3x3 and 1x1, each with batch normalisation and a rectifier: the classifier of a
    convolutional network has learned from rectified maps.
    """

    def __init__(self, spec: ReusedSpec, pooling: nn.Module) -> None:
        super().__init__()
        inner = _inner_channels(spec)
        self.projector = nn.Sequential(
            nn.Conv2d(spec.in_features, inner, 1, bias=False), nn.BatchNorm2d(inner), nn.ReLU(),
            nn.Conv2d(inner, inner, 3, padding=1, bias=False), nn.BatchNorm2d(inner), nn.ReLU(),
            nn.Conv2d(inner, spec.features, 1, bias=False), nn.BatchNorm2d(spec.features), nn.ReLU(),
        )  # fmt: skip
        self.pooling = pooling

    def forward(self, maps: Tensor) -> Tensor:
        """Return what the pooling makes of the projected maps."""
        return self.pooling(self.projector(maps))


@final
class ProjectedClassifier(nn.Module):
    """A projector of vectors ``[B, C]`` to ``[B, D]``, two linear layers, and the reused classifier of them."""

    def __init__(self, spec: ReusedSpec, classifier: nn.Linear) -> None:
        super().__init__()
        inner = _inner_channels(spec)
        self.projector = nn.Sequential(nn.Linear(spec.in_features, inner), nn.ReLU(), nn.Linear(inner, spec.features))
        self.classifier = classifier

    def forward(self, vectors: Tensor) -> Tensor:
        """Return logits ``[B, K]``."""
        return self.classifier(self.projector(vectors))


def reuse_classifier(network: nn.Module, spec: ReusedSpec, *, num_classes: int) -> None:
    r"""Put a projector and a frozen linear layer of K logits at the end of a network, in place.

    Where the spec names a pooling, it is replaced by a :class:`ProjectedPooling` and the classifier by the linear
    layer; else the classifier by a :class:`ProjectedClassifier`. What they replace is gone, and the new weights are
    drawn from PyTorch's global generator: the frozen ones are to be copied from the other network, or loaded.

    Args:
        network: has modules at the spec's paths.
        spec: the sizes.
        num_classes: K.

    Raises:
        InputError: the network has no module at a path, or D is smaller than the reduction.

    Source: Chen et al., CVPR 2022, arXiv:2203.14001, and the authors' code: the projector of maps. The one of vectors
    is ours.
    """
    parts = [spec.classifier] if spec.pooling is None else [spec.classifier, spec.pooling]
    for path in parts:
        if path not in dict(network.named_modules(remove_duplicate=False)) or not path:
            raise InputError(f"{type(network).__name__} has no module {path!r} to put another network's classifier at")
    linear = nn.Linear(spec.features, num_classes, bias=spec.bias).requires_grad_(False)
    if spec.pooling is None:
        _replace(network, spec.classifier, ProjectedClassifier(spec, linear))
    else:
        _replace(network, spec.pooling, ProjectedPooling(spec, network.get_submodule(spec.pooling)))
        _replace(network, spec.classifier, linear)


def projected_end(network: nn.Module) -> tuple[str, ProjectedPooling | ProjectedClassifier] | None:
    """Return the path and the module that hold a network's projector; ``None`` where it has none."""
    ends = (ProjectedPooling, ProjectedClassifier)
    return next(((path, module) for path, module in network.named_modules() if isinstance(module, ends)), None)


def _inner_channels(spec: ReusedSpec) -> int:
    inner = spec.features // spec.reduction
    if inner < 1:
        raise InputError(f"reduction must be at most the {spec.features} features to project to, got {spec.reduction}")
    return inner


def _replace(network: nn.Module, path: str, module: nn.Module) -> None:
    parent, _, name = path.rpartition(".")
    setattr(network.get_submodule(parent), name, module.train(network.training))
