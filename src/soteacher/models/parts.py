"""Pieces of a network, for objectives that send features through them."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm  # pyright: ignore[reportPrivateUsage] the one class of all of them

from soteacher.errors import InputError
from soteacher.models.classifier import Classifier
from soteacher.models.taps import Tap, classifier_module, find_taps

LOOK_BATCH = 3
"""Examples in a look at a network: what it puts out for so many is taken to be one value per example."""


@dataclass(frozen=True, slots=True)
class _Before:
    """What happens in a network up to a tap."""

    shapes: Mapping[nn.Module, tuple[tuple[int, ...], ...]]
    """The outermost modules that are done when the tapped one is, itself among them, with the shape of what each of
    their calls puts out."""
    tapped: nn.Module
    feature: tuple[int, ...]
    """Shape of the tap's feature, without the batch."""
    channels_last: bool
    """Whether the tapped module puts out ``[B, H, W, C]`` where the tap gives ``[B, C, H, W]``."""


@final
class Parts:
    """The classifier of a network, and its way from a tap to the logits; see :class:`soteacher.types.NetworkParts`.

    A part is the network's own forward pass in which the modules before the tap answer with zeros instead of running
    and the tapped one answers with the given feature. That serves networks of any kind whose features all go through
    the tap, and is found out by one look at the network for each tap and image size.
    """

    def __init__(self, classifier: Classifier) -> None:
        self._classifier = classifier
        taps = find_taps(classifier)
        self._stages = {name: tap for name, tap in taps.items() if name == "stem" or name.startswith("stage")}
        self._before: dict[tuple[str, torch.Size], _Before] = {}
        path = classifier_module(classifier.network)
        self._last = classifier.network.get_submodule(path) if path is not None else None

    @property
    def classifier(self) -> nn.Linear:
        """The linear layer that makes the logits.

        Raises:
            InputError: there is none.
        """
        if not isinstance(self._last, nn.Linear):
            came = "none" if self._last is None else type(self._last).__name__
            network = type(self._classifier.network).__name__
            raise InputError(f"wanted a linear layer as the classifier of {network}, got {came}")
        return self._last

    def run_from(self, tap: str, feature: Tensor, images: Tensor) -> Tensor:
        """Return the logits that the network gives where a tap has another value; gradients flow through.

        What lies before the tap does not run. Running statistics and the state of the random generators stay as they
        are: two calls in a row drop out the same.

        Args:
            tap: ``stem`` or a stage.
            feature: of the tap's shape.
            images: ``[B, C, H, W]`` of the batch: only their shape is used.

        Raises:
            InputError: no such stage, a feature of another shape, or a network whose logits do not depend on this
                feature alone.
        """
        if tap not in self._stages:
            raise InputError(f"no part of the network begins at {tap!r}; known: {', '.join(self._stages) or 'none'}")
        go_on: Any = _go_on  # the compiler's decorator hides what it takes in
        return go_on(self._classifier, tap, self._stages[tap], self._before, feature, images)


@torch.compiler.disable  # what stands in for the modules is another one in each call
def _go_on(
    classifier: Classifier,
    name: str,
    tap: Tap,
    known: dict[tuple[str, torch.Size], _Before],
    feature: Tensor,
    images: Tensor,
) -> Tensor:
    """Return the logits that follow from a feature; what the look has found is kept in ``known``."""
    key = name, images.shape[1:]
    if key not in known:
        with torch.no_grad(), evaluating(classifier), _random_state_kept(images.device):
            known[key] = _look_before(classifier, name, tap, images)
    before = known[key]
    if feature.shape[1:] != before.feature or len(feature) != len(images):
        raise InputError(
            f"the network goes on from {name!r} with a feature {[len(images), *before.feature]}, got "
            f"{list(feature.shape)}"
        )
    return _run_from(classifier, before, feature, images)


def _look_before(classifier: Classifier, name: str, tap: Tap, images: Tensor) -> _Before:
    """Run the network on one image and note what is done when the tapped module is; make sure that it can be left out.

    A module that runs several times is tapped at its last run, as in :class:`soteacher.models.taps.Tapped`.
    """
    images = images[:1].expand(LOOK_BATCH, -1, -1, -1)
    tapped = classifier.get_submodule(tap.module)
    calls: list[tuple[nn.Module, Tensor]] = []

    def note(module: nn.Module, arguments: Any, output: Any) -> None:
        del arguments
        if isinstance(output, Tensor):
            calls.append((module, output))

    handles = [module.register_forward_hook(note) for module in classifier.modules()]
    try:
        logits = classifier(images)
    finally:
        for handle in handles:
            handle.remove()
    last = max((number for number, (module, _) in enumerate(calls) if module is tapped), default=None)
    if last is None:
        raise InputError(f"no part of the network begins at {name!r}: {tap.module!r} did not run or gave no tensor")
    done, output = calls[: last + 1], calls[last][1]
    inside = {below for module, _ in done for below in module.modules() if below is not module}
    shapes: dict[nn.Module, tuple[tuple[int, ...], ...]] = {}
    for module, value in done:
        if module not in inside:
            shapes[module] = (*shapes.get(module, ()), tuple(value.shape))
    channels_last = output.ndim == 4 and output.shape[1] != tap.channels == output.shape[3]
    feature = output.permute(0, 3, 1, 2) if channels_last else output
    before = _Before(shapes, tapped, tuple(feature.shape[1:]), channels_last)
    again = _run_from(classifier, before, feature, images)
    if not torch.allclose(again, logits, rtol=1e-3, atol=1e-3 * float(logits.abs().max())):
        raise InputError(
            f"the network cannot go on from {name!r}: what lies before it reaches the logits on other ways"
        )
    return before


def _run_from(classifier: Classifier, before: _Before, feature: Tensor, images: Tensor) -> Tensor:
    """Run the network with zeros before the tap and the feature at it."""
    value = feature.permute(0, 2, 3, 1) if before.channels_last else feature
    with ExitStack() as changes:
        for module, shapes in before.shapes.items():
            answers = [_zeros(shape, feature) for shape in shapes]
            if module is before.tapped:
                answers[-1] = value
            changes.enter_context(_answering(module, iter(answers)))
        changes.enter_context(_running_statistics_kept(classifier))
        changes.enter_context(_random_state_kept(feature.device))
        return classifier(images)


def _zeros(shape: tuple[int, ...], feature: Tensor) -> Tensor:
    """Return zeros instead of a module's output, for as many examples as the feature has."""
    return feature.new_zeros((len(feature), *shape[1:]) if shape and shape[0] == LOOK_BATCH else shape)


@contextmanager
def _answering(module: nn.Module, answers: Iterator[Tensor]) -> Generator[None, None, None]:
    """Let the next calls of a module return given values without running; the calls after them run."""
    own: Callable[..., Any] = module.forward
    had_one = "forward" in vars(module)

    def forward(*arguments: Any, **keywords: Any) -> Any:
        answer = next(answers, None)
        return own(*arguments, **keywords) if answer is None else answer

    module.forward = forward
    try:
        yield
    finally:
        if had_one:
            module.forward = own
        else:
            del module.forward  # the class's own one shows again


@contextmanager
def _running_statistics_kept(network: nn.Module) -> Generator[None, None, None]:
    """Let batch normalisation in training normalise by the batch as ever, without a trace."""
    tracking = [module for module in network.modules() if isinstance(module, _BatchNorm) and module.training]
    tracking = [module for module in tracking if module.track_running_stats]
    for module in tracking:
        module.track_running_stats = False
    try:
        yield
    finally:
        for module in tracking:
            module.track_running_stats = True


@contextmanager
def _random_state_kept(device: torch.device) -> Generator[None, None, None]:
    """Draw without a trace, on the device and on the host."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        yield


@contextmanager
def evaluating(network: nn.Module) -> Generator[None, None, None]:
    """Put a network in evaluation mode for a while: nothing is dropped, no statistics are taken."""
    training = {module: module.training for module in network.modules()}
    network.eval()
    try:
        yield
    finally:
        for module, mode in training.items():
            module.training = mode
