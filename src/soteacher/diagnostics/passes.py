"""Runs of a network over images for its card: counted, in evaluation mode and float32."""

from __future__ import annotations

from collections.abc import Generator, Iterator
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from soteacher.data import AugmentConfig, EvaluationLoader, ImageSplit, TrainLoader
from soteacher.errors import InputError
from soteacher.models.classifier import Classifier
from soteacher.models.parts import evaluating
from soteacher.models.taps import Tapped, find_taps

BATCH_SIZE = 128
PROBABILITY_TOLERANCE = 1e-4
"""How far the sum of what a network puts out may lie from 1 for it to count as probabilities."""


class PassCounter:
    """Counts the images that run through a network: 1 for a forward pass, 2 more for a backward pass to the images.

    That a backward pass costs twice a forward one is the usual estimate: it makes two products with each layer's
    weights where the forward makes one.
    """

    def __init__(self, classifier: Classifier) -> None:
        self.images = 0
        self._handle = classifier.register_forward_hook(self._forward)

    def close(self) -> None:
        """Take the counter off the network."""
        self._handle.remove()

    def _forward(self, module: torch.nn.Module, arguments: tuple[Any, ...], logits: Tensor) -> None:
        del module, arguments
        count = len(logits)
        self.images += count
        if logits.requires_grad:
            logits.register_hook(lambda _: self._backward(count))

    def _backward(self, count: int) -> None:
        self.images += 2 * count


def _places_of_precision() -> list[tuple[Any, str, Any]]:
    """Return where PyTorch keeps how exactly a GPU multiplies float32, as object, attribute and what makes it exact."""
    cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
    if hasattr(cudnn, "conv"):  # since PyTorch 2.9, which refuses to read the old places once the new ones are used
        return [(place, "fp32_precision", "ieee") for place in (cudnn.conv, cudnn.rnn, matmul)]
    return [(place, "allow_tf32", False) for place in (cudnn, matmul)]


@contextmanager
def _exact_products() -> Generator[None, None, None]:
    """Multiply float32 as float32 on GPUs, where by default convolutions round it to TF32: 10 of 23 bits."""
    places = _places_of_precision()
    before = [getattr(place, name) for place, name, _ in places]
    try:
        for place, name, exact in places:
            setattr(place, name, exact)
        yield
    finally:
        for (place, name, _), value in zip(places, before, strict=True):
            setattr(place, name, value)


@contextmanager
def measured(
    classifier: Classifier, device: torch.device | str
) -> Generator[tuple[Classifier, PassCounter], None, None]:
    """Give a classifier as its figures are measured, on a device, in evaluation mode and float32, with a counter.

    On CUDA too float32 is what it says: TF32 is off meanwhile, for the whole process.

    The caller's classifier is as it was afterwards. One of other numbers than float32 is copied, not converted: what
    float64 loses on the way would not come back.
    """
    device = torch.device(device)
    tensors = [*classifier.parameters(), *classifier.buffers()]
    if any(tensor.is_floating_point() and tensor.dtype != torch.float32 for tensor in tensors):
        classifier = deepcopy(classifier).float()
    place = tensors[0].device
    classifier.to(device)
    counter = PassCounter(classifier)
    try:
        with evaluating(classifier), torch.autocast(device.type, enabled=False), _exact_products():
            yield classifier, counter
    finally:
        counter.close()
        classifier.to(place)


@torch.no_grad()
def plain_logits(classifier: Classifier, split: ImageSplit, device: torch.device | str, num_classes: int) -> Tensor:
    """Return the logits ``[N, K]`` of a split's images as they are, in their order, on the CPU.

    Raises:
        InputError: what the network puts out are no logits of the classes.
    """
    parts: list[Tensor] = []
    loader = EvaluationLoader(split, batch_size=BATCH_SIZE, device=device, workers=torch.get_num_threads())
    for batch in loader:
        parts.append(classifier(batch.images).float().cpu())
        _check_numbers(parts[-1], num_classes)
    logits = torch.cat(parts)
    _check_no_probabilities(logits)
    return logits


def _check_numbers(logits: Tensor, num_classes: int) -> None:
    if logits.shape[1] != num_classes:
        raise InputError(
            f"the network puts out {logits.shape[1]} numbers for each image, wanted logits of {num_classes} classes"
        )
    if not logits.isfinite().all():
        raise InputError("the network puts out values that are not finite, wanted logits")


def _check_no_probabilities(logits: Tensor) -> None:
    """Refuse what a network ends in that has its softmax inside: the card's would be that of a softmax."""
    sums = logits.sum(dim=1)
    if bool((logits >= 0).all()) and bool(((sums - 1).abs() <= PROBABILITY_TOLERANCE).all()):
        raise InputError("the network puts out probabilities (no negative number, and a sum of 1), wanted logits")


@torch.no_grad()
def running_modules(classifier: Classifier, images: Tensor) -> set[torch.nn.Module]:
    """Return the modules that are called in a forward pass.

    Args:
        classifier: in evaluation mode.
        images: ``[B, C, H, W]`` on its device; they run through the network once.
    """
    running: set[torch.nn.Module] = set()

    def note(module: torch.nn.Module, arguments: tuple[Any, ...]) -> None:
        del arguments
        running.add(module)

    handles = [module.register_forward_pre_hook(note) for module in classifier.modules()]
    try:
        classifier(images)
    finally:
        for handle in handles:
            handle.remove()
    return running


@dataclass(frozen=True, slots=True, kw_only=True)
class SeenView:
    """What a network returned for one augmented view of a split, in the split's order, on the CPU."""

    logits: Tensor
    """``[N, K]`` float32."""
    features: Tensor
    """``[N, D]`` float32: what the tap ``pooled`` gives, or the logits where there is none."""


def has_pooled_features(classifier: Classifier, images: Tensor) -> bool:
    """Return whether the network has the tap ``pooled`` and it takes part in its forward pass.

    Args:
        classifier: in evaluation mode.
        images: ``[B, C, H, W]`` on its device; they run through the network once.
    """
    taps = find_taps(classifier)
    if "pooled" not in taps:
        return False
    tapped = Tapped(classifier, {"pooled": taps["pooled"]})
    try:
        with torch.no_grad():
            tapped(images)
    except InputError:  # it is named by the network's structure only
        return False
    finally:
        tapped.close()
    return True


@torch.no_grad()
def seen_views(
    classifier: Classifier,
    split: ImageSplit,
    augment: AugmentConfig,
    *,
    num_views: int,
    seed: int,
    pooled: bool,
    device: torch.device | str,
) -> Iterator[SeenView]:
    """Yield what a network returns for augmented views of a split.

    Args:
        classifier: in evaluation mode, on the device.
        split: the images.
        augment: how a view differs from its image.
        num_views: draws of the augmentation for each image.
        seed: of the draws.
        pooled: whether the features are those of the tap ``pooled``; see :func:`has_pooled_features`.
        device: the network's.
    """
    loader = TrainLoader(
        split, batch_size=BATCH_SIZE, augment=augment, seed=seed, device=device, workers=torch.get_num_threads()
    )
    tapped = Tapped(classifier, {"pooled": find_taps(classifier)["pooled"]} if pooled else {})
    try:
        for view in range(num_views):
            rows: list[Tensor] = []
            logits: list[Tensor] = []
            features: list[Tensor] = []
            for batch in loader.epoch(view):
                given, taken = tapped(batch.images)
                rows.append(batch.indices.cpu())
                logits.append(given.float().cpu())
                features.append(taken.get("pooled", given).flatten(1).float().cpu())
            order = torch.cat(rows).argsort()
            yield SeenView(logits=torch.cat(logits)[order], features=torch.cat(features)[order])
    finally:
        tapped.close()
