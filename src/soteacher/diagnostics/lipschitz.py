"""How steep a network is: norms of its layers, and slopes of the whole around examples."""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Iterable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from soteacher.diagnostics.spectral_norm import spectral_norm
from soteacher.errors import InputError
from soteacher.models.classifier import Classifier
from soteacher.models.composition import Composition
from soteacher.models.parts import evaluating
from soteacher.objectives.teacher.joint_lipschitz import Operator, network_operators
from soteacher.precision import at_least_float32
from soteacher.randomness import generator

CHUNK = 64
"""Examples that are looked at together; the figures do not depend on it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerNorm:
    """Norms of one linear operator of a network: a layer, with the batch norm that belongs to it."""

    layer: str
    """The layer's path in the bare network."""
    batch_norm: str | None
    """Path of the batch norm that takes in what a convolution puts out, and nothing else; counted with it."""
    norm_1: float
    """Operator norm induced by the 1-norm; see ``Operator.norm``."""
    norm_2: float
    """Spectral norm, the largest singular value, on features of the size that the layer takes in."""


def layer_norms(classifier: nn.Module, images: Tensor) -> list[LayerNorm]:
    r"""Return the norms of each linear operator of a network that takes part in its forward pass, in running order.

    Operators are convolutions and linear layers with the batch norm that belongs to them, and batch norms by
    themselves, each once however often it runs, as they act in evaluation mode.

    ``norm_1`` is exact inside the image; ``norm_2`` is exact for batch norms and all but large linear layers, and a
    little less where it comes from an iteration, see :func:`~soteacher.diagnostics.spectral_norm.spectral_norm`.

    Cost: two forward passes over two images, and at most 50 passes forward and back of one image through each
    convolution, to the image alone: some 100 forward passes of one image in all.

    Args:
        classifier: images in [0, 1] to logits.
        images: ``[B, C, H, W]`` on its device; only the first two are run.

    Raises:
        InputError: the network has no such layer, or a batch norm keeps no running variance.
    """
    bare = classifier.network if isinstance(classifier, Classifier) else classifier
    operators = {operator.layer: operator for operator in network_operators(bare, Composition(classifier, images[:2]))}
    with _still(classifier):
        sizes = _input_sizes(classifier, list(operators), images[:2])
        return [_layer_norm(operators[layer], size) for layer, size in sizes.items()]


def log10_products(layers: Sequence[LayerNorm]) -> dict[str, float | None]:
    """Return the logarithms to base 10 of the products of the layers' norms, ``log10_product_1`` and ``_2``.

    In a chain of these layers and rectifiers the product bounds the Lipschitz constant. Where paths are added (residual
    networks) or joined it bounds nothing: the sum of paths can be steeper than their product, or less steep. It is a
    figure to compare networks of one architecture by.

    Returns:
        The two figures; ``None`` where a norm is 0, or there are no layers.
    """
    norms = {"1": [layer.norm_1 for layer in layers], "2": [layer.norm_2 for layer in layers]}
    return {
        f"log10_product_{order}": math.fsum(map(math.log10, values)) if values and min(values) > 0 else None
        for order, values in norms.items()
    }


def input_gradient_norms(classifier: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    r"""Return how fast the log-probability of each example's class changes with its image.

    .. math:: \lVert \nabla_x \log p_y(x) \rVert_2

    Cost: one pass forward and back over each example, counted as 3 forward passes.

    Args:
        classifier: images in [0, 1] to logits.
        images: ``[N, C, H, W]`` in [0, 1], on its device.
        labels: ``[N]`` class ids.

    Returns:
        ``[N]`` on the CPU; nats for each unit of distance between images whose values are in [0, 1].

    Raises:
        InputError: the shapes do not fit.
    """
    if labels.shape != images.shape[:1]:
        raise InputError(
            f"wanted images [N, C, H, W] and labels [N], got {list(images.shape)} and {list(labels.shape)}"
        )

    def norms(part: slice) -> Tensor:
        x = images[part].detach().requires_grad_()
        log_probabilities = at_least_float32(classifier(x)).log_softmax(dim=1)
        chosen = log_probabilities.gather(1, labels[part, None].to(x.device)).sum()
        return _lengths(_gradient(chosen, x))

    return _by_chunks(classifier, images, norms)


def largest_slope(classifier: nn.Module, images: Tensor, *, radius: float, steps: int, seed: int) -> Tensor:
    r"""Return the steepest slope of the logits that a search finds near each image.

    .. math:: \max_{x'} \frac{\lVert z(x') - z(x) \rVert_2}{\lVert x' - x \rVert_2}, \qquad
        \lVert x' - x \rVert_2 \le \epsilon, \quad x' \in [0, 1]

    The search starts at a random place on the sphere of this radius. Each step goes from where it is, by twice the
    radius, along the normalised gradient of the distance between logits, then back to the ball and to images in [0, 1];
    on a linear map this is a shifted power iteration. The steepest slope of all the places that were visited counts: a
    lower bound of the local Lipschitz constant, which more steps can only raise.

    Cost: ``3 steps + 2`` forward passes over each example, a pass forward and back counted as 3.

    Args:
        classifier: images in [0, 1] to logits.
        images: ``[N, C, H, W]`` in [0, 1], on its device.
        radius: :math:`\epsilon > 0` in units of images in [0, 1]: all pixels by 0.01 is 0.55 for 3x32x32.
        steps: of the search, at least 1.
        seed: of the starting places, which depend on the examples' order too.

    Returns:
        ``[N]`` on the CPU, logits for each unit of distance; 0 where no other place was found.

    Raises:
        InputError: ``radius`` or ``steps`` is out of its range.
    """
    if not 0 < radius < math.inf:
        raise InputError(f"radius must be positive and finite, got {radius}")
    if steps < 1:
        raise InputError(f"steps must be at least 1, got {steps}")
    random = generator(seed, "largest_slope")
    starts = torch.randn(images.shape, generator=random).to(images.device, images.dtype)

    def search(part: slice) -> Tensor:
        return _steepest(classifier, images[part].detach(), starts[part], radius=radius, steps=steps)

    return _by_chunks(classifier, images, search)


def _steepest(classifier: nn.Module, images: Tensor, starts: Tensor, *, radius: float, steps: int) -> Tensor:
    """Search from one place; return the steepest slope ``[B]`` on the way."""
    with torch.no_grad():
        origin = at_least_float32(classifier(images))
    place = _back(images + _scaled(starts, radius), images, radius)
    best = torch.zeros(len(images), dtype=origin.dtype, device=origin.device)
    for _ in range(steps):
        x = place.detach().requires_grad_()
        difference = at_least_float32(classifier(x)) - origin
        best = torch.maximum(best, _slope(difference.detach(), place - images))
        uphill = _gradient(difference.square().sum(), x)
        place = _back(place + _scaled(uphill, 2 * radius), images, radius)
    with torch.no_grad():
        return torch.maximum(best, _slope(at_least_float32(classifier(place)) - origin, place - images))


def _back(places: Tensor, images: Tensor, radius: float) -> Tensor:
    """Return the nearest places in the ball, put back among images; that leads no place out of the ball again."""
    offsets = places - images
    shrink = (radius / _lengths(offsets).clamp(min=radius)).view(-1, *[1] * (images.ndim - 1))
    return (images + offsets * shrink).clamp(0, 1)


def _scaled(directions: Tensor, length: float) -> Tensor:
    """Return the directions with this length; those of length 0 as they are."""
    lengths = _lengths(directions).view(-1, *[1] * (directions.ndim - 1))
    return torch.where(lengths > 0, directions / lengths * length, directions)


def _slope(rises: Tensor, offsets: Tensor) -> Tensor:
    """Return rise by distance, ``[B]``; 0 where there is no distance."""
    distances = _lengths(offsets)
    return torch.where(distances > 0, _lengths(rises) / distances, 0.0)


def _lengths(values: Tensor) -> Tensor:
    return torch.linalg.vector_norm(at_least_float32(values).flatten(1), dim=1)


def _gradient(value: Tensor, x: Tensor) -> Tensor:
    """Return the gradient; of what does not depend on ``x`` at all it is 0."""
    found = torch.autograd.grad(value, x, allow_unused=True)[0] if value.requires_grad else None
    return torch.zeros_like(x) if found is None else found


def _by_chunks(classifier: nn.Module, images: Tensor, figure: Callable[[slice], Tensor]) -> Tensor:
    """Return a figure of each example, from a few examples at a time."""
    with _still(classifier):
        parts = [figure(slice(start, start + CHUNK)).cpu() for start in range(0, len(images), CHUNK)]
    return torch.cat(parts) if parts else torch.zeros(0)


@contextmanager
def _still(network: nn.Module) -> Generator[None, None, None]:
    """Hold a network in evaluation mode, its parameters without gradients; gradients of images can be had."""
    trainable = [parameter for parameter in network.parameters() if parameter.requires_grad]
    for parameter in trainable:
        parameter.requires_grad_(False)
    try:
        with evaluating(network), torch.enable_grad():
            yield
    finally:
        for parameter in trainable:
            parameter.requires_grad_(True)


def _input_sizes(network: nn.Module, layers: Iterable[nn.Module], images: Tensor) -> dict[nn.Module, torch.Size]:
    """Return the shape of what each layer takes in at its first run, in the order of these runs."""
    sizes: dict[nn.Module, torch.Size] = {}

    def note(module: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        sizes.setdefault(module, next(iter((*arguments, *keywords.values()))).shape)

    handles = [layer.register_forward_pre_hook(note, with_kwargs=True) for layer in layers]
    try:
        with torch.no_grad():
            network(images)
    finally:
        for handle in handles:
            handle.remove()
    return sizes


def _layer_norm(operator: Operator, size: torch.Size) -> LayerNorm:
    return LayerNorm(
        layer=operator.path,
        batch_norm=operator.batch_norm_path,
        norm_1=operator.norm().item(),
        norm_2=spectral_norm(operator, size),
    )
