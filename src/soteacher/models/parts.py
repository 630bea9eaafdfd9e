"""Pieces of a network, for objectives that send features through them."""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, final

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm  # pyright: ignore[reportPrivateUsage] the one class of all of them

from soteacher.errors import InputError
from soteacher.models.classifier import Classifier
from soteacher.models.taps import Tap, classifier_module, find_taps


@dataclass(frozen=True, slots=True)
class _Before:
    """What happens in a network up to a tap."""

    shapes: Mapping[nn.Module, tuple[int, ...]]
    """The outermost modules that are done when the tapped one is, with the shapes of what they put out."""
    channels_last: bool
    """Whether the tapped module puts out ``[B, H, W, C]`` where the tap gives ``[B, C, H, W]``."""


@final
class Parts:
    """The classifier of a network, and its way from a tap to the logits; see :class:`soteacher.types.NetworkParts`."""

    def __init__(self, classifier: Classifier) -> None:
        self._classifier = classifier
        taps = find_taps(classifier)
        self._stages = {name: tap for name, tap in taps.items() if name == "stem" or name.startswith("stage")}
        self._before: dict[str, _Before] = {}

    @property
    def classifier(self) -> nn.Linear:
        """The linear layer that makes the logits.

        Raises:
            InputError: there is none.
        """
        network = self._classifier.network
        path = classifier_module(network)
        layer = network.get_submodule(path) if path is not None else None
        if not isinstance(layer, nn.Linear):
            came = "none" if layer is None else type(layer).__name__
            raise InputError(f"wanted a linear layer as the classifier of {type(network).__name__}, got {came}")
        return layer

    def run_from(self, tap: str, feature: Tensor, images: Tensor) -> Tensor:
        """Return the logits that the network gives where a tap has another value; gradients flow through.

        What lies before the tap does not run, and running statistics stay as they are.

        Args:
            tap: ``stem`` or a stage.
            feature: of the tap's shape.
            images: ``[B, C, H, W]`` of the batch: only their shape is used.

        Raises:
            InputError: no such stage, or a value that the rest cannot take.
        """
        if tap not in self._stages:
            raise InputError(f"no part of the network begins at {tap!r}; known: {', '.join(self._stages) or 'none'}")
        if tap not in self._before:
            self._before[tap] = _look_before(self._classifier, self._stages[tap], images)
        before = self._before[tap]
        value = feature.permute(0, 2, 3, 1) if before.channels_last else feature
        with ExitStack() as changes:
            for module, shape in before.shapes.items():
                changes.enter_context(_answering(module, partial(feature.new_zeros, (len(feature), *shape[1:]))))
            tapped = self._classifier.get_submodule(self._stages[tap].module)
            changes.enter_context(_answering(tapped, lambda: value))
            changes.enter_context(_running_statistics_kept(self._classifier))
            try:
                return self._classifier(images)
            except RuntimeError as error:
                reason = str(error).splitlines()[0]
                raise InputError(
                    f"the network cannot go on from {tap!r} with a feature {list(feature.shape)}: {reason}"
                ) from error


@torch.no_grad()
def _look_before(classifier: Classifier, tap: Tap, images: Tensor) -> _Before:
    """Run the network once and note what is done when the tapped module is."""
    tapped = classifier.get_submodule(tap.module)
    done: dict[nn.Module, tuple[int, ...]] = {}
    layout: list[bool] = []

    def note(module: nn.Module, arguments: Any, output: Any) -> None:
        del arguments
        if isinstance(output, Tensor) and not layout:
            if module is tapped:
                layout.append(output.ndim == 4 and output.shape[1] != tap.channels == output.shape[3])
            else:
                done[module] = tuple(output.shape)

    handles = [module.register_forward_hook(note) for module in classifier.modules()]
    try:
        with _running_statistics_kept(classifier), torch.random.fork_rng():  # dropout draws are those of no look
            classifier(images[:1].expand(2, -1, -1, -1))
    finally:
        for handle in handles:
            handle.remove()
    inner = {below for module in [tapped, *done] for below in module.modules() if below is not module}
    return _Before({module: shape for module, shape in done.items() if module not in inner}, layout[0])


@contextmanager
def _answering(module: nn.Module, answer: Callable[[], Tensor]) -> Generator[None, None, None]:
    """Let a module return a given value without running."""

    def forward(*arguments: Any, **keywords: Any) -> Tensor:
        del arguments, keywords
        return answer()

    module.forward = forward
    try:
        yield
    finally:
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
