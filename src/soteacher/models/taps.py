"""Named features of any network, taken by hooks: the network itself stays as it is."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from difflib import get_close_matches
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from soteacher.errors import InputError
from soteacher.models.classifier import Classifier
from soteacher.models.family import FamilyNetwork, Tap
from soteacher.models.reused_classifier import ProjectedClassifier, ProjectedPooling, projected_end


def find_taps(network: nn.Module) -> dict[str, Tap]:
    """Return the canonical taps of a network, from shallow to deep.

    ``stem`` and ``stage1`` to ``stageN`` are what the stages put out, maps ``[B, C, H, W]`` or tokens ``[B, N, D]``;
    ``preactivation1`` to ``preactivationN`` the same before the last rectifier, of the networks of ours whose stages
    have one; ``maps`` the last maps ``[B, D, H, W]``, whose averages are ``pooled``; and ``pooled`` what the classifier
    layer takes in, flattened to ``[B, D]``.

    Networks of ours say where these are, and timm's say it of the stages: the first of five stages at half resolution
    is the stem, and of blocks that all have one resolution (a ViT's) four evenly spaced ones are the stages, the last
    among them; a stage that is no module of its own is left out. A network of timm has ``maps`` where a module
    ``global_pool`` beside the classifier layer holds PyTorch's average pooling to one pixel, which takes channels
    first, and between the two there is nothing but flattening and dropout of rate 0. Of any other network only
    ``pooled`` is known, the input of its last linear layer, if it has one.

    A network that ends in a projector and its teacher's classifier (:mod:`soteacher.models.reused_classifier`) has
    ``projected`` besides, what the projector puts out, and ``pooled`` is what the teacher's classifier takes in. Where
    it is maps that are projected, ``maps`` are the projected ones; where it is vectors, there are none.
    """
    if isinstance(network, Classifier):
        return {name: _inside_classifier(tap) for name, tap in find_taps(network.network).items()}
    taps = _stage_taps(network)
    classifier = classifier_module(network)
    if isinstance(network, FamilyNetwork):
        taps |= network.preactivations()
        taps["maps"] = Tap(network.pooling_module, "input")
    elif classifier is not None and _is_timm(network) and (pooling := _timm_pooling(network, classifier)):
        taps["maps"] = Tap(pooling, "input")
    if (end := projected_end(network)) is not None:
        path, module = end
        taps["projected"] = Tap(f"{path}.projector")
        taps.pop("maps", None)
        if isinstance(module, ProjectedPooling):
            taps["maps"] = taps["projected"]  # it is these that are averaged now
    if classifier is not None:
        taps["pooled"] = Tap(classifier, "input")
    return taps


def resolve_taps(network: nn.Module, names: Iterable[str]) -> dict[str, Tap]:
    """Return a tap for each name: a canonical one, or the path of a module whose output it is.

    Paths inside a :class:`Classifier` are those of the network that it holds.

    Raises:
        InputError: a name is neither.
    """
    if isinstance(network, Classifier):
        return {name: _inside_classifier(tap) for name, tap in resolve_taps(network.network, names).items()}
    taps, modules = find_taps(network), _modules(network)
    resolved: dict[str, Tap] = {}
    for name in names:
        if name not in taps and name not in modules:
            raise _unknown_tap(name, network)
        resolved[name] = taps[name] if name in taps else Tap(name)
    return resolved


def classifier_module(network: nn.Module) -> str | None:
    """Return the path of the layer that makes the logits: known for our networks and timm's, else the last linear one.

    Of two classifiers (distilled ViTs) it is the first, and behind a projector the teacher's own.
    """
    end = projected_end(network)
    if end is not None and isinstance(end[1], ProjectedClassifier):
        return f"{end[0]}.classifier"
    if isinstance(network, FamilyNetwork):
        return network.classifier_module
    layer = network.get_classifier() if _is_timm(network) else None  # pyright: ignore[reportCallIssue]  # timm's method
    layer = layer[0] if isinstance(layer, tuple) else layer
    linear: str | None = None
    for path, module in _modules(network).items():
        if module is layer:
            return path
        if isinstance(module, nn.Linear):
            linear = path
    return linear


class Tapped(nn.Module):
    """A network that returns its features beside its logits.

    The parameters are those of ``network``, below the name ``network``. A module that runs several times in one pass is
    tapped at its last run. :meth:`close` takes the hooks off again.

    Args:
        network: images to logits.
        taps: by the names that the features are to have; ``pooled`` is flattened to ``[B, D]``.

    Raises:
        InputError: the network has no such module.
    """

    def __init__(self, network: nn.Module, taps: Mapping[str, Tap]) -> None:
        super().__init__()
        modules = _modules(network)
        for tap in taps.values():
            if tap.module not in modules:
                raise _unknown_tap(tap.module, network)
        self.network = network
        self.taps = dict(taps)
        # Only a dictionary during `forward`, so that nothing outlives it and the network's other callers keep nothing.
        self._captured: dict[str, tuple[Tensor, int | None]] | None = None
        self._handles = [self._hook(name, tap, modules[tap.module]) for name, tap in taps.items()]

    def forward(self, images: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Return logits ``[B, K]`` and the features in the order of the taps; gradients flow through both.

        Raises:
            InputError: a tapped module did not run, deals in something other than a tensor, or what it put out was
                overwritten by a later operation.
        """
        captured: dict[str, tuple[Tensor, int | None]] = {}
        self._captured = captured
        try:
            logits = self.network(images)
        finally:
            self._captured = None
        return logits, {name: self._feature(name, captured) for name in self.taps}

    def close(self) -> None:
        """Take the hooks off the network; afterwards ``forward`` cannot return features."""
        for handle in self._handles:
            handle.remove()

    def _hook(self, name: str, tap: Tap, module: nn.Module) -> RemovableHandle:
        if tap.side == "input":
            return module.register_forward_pre_hook(partial(self._capture_input, name))
        return module.register_forward_hook(partial(self._capture_output, name))

    def _capture_input(self, name: str, module: nn.Module, arguments: tuple[Any, ...]) -> None:
        del module
        self._capture(name, arguments[0] if arguments else None)

    def _capture_output(self, name: str, module: nn.Module, arguments: tuple[Any, ...], output: Any) -> None:
        del module, arguments
        self._capture(name, output)

    def _capture(self, name: str, value: Any) -> None:
        if self._captured is None:
            return
        if not isinstance(value, Tensor):
            tap = self.taps[name]
            came = type(value).__name__
            raise InputError(f"tap {name!r}: wanted one tensor as {tap.side} of {tap.module!r}, got {came}")
        self._captured[name] = value, _version(value)

    def _feature(self, name: str, captured: Mapping[str, tuple[Tensor, int | None]]) -> Tensor:
        tap = self.taps[name]
        if name not in captured:
            raise InputError(f"tap {name!r}: module {tap.module!r} did not run in this forward pass")
        feature, version = captured[name]
        if version != _version(feature):
            raise InputError(f"tap {name!r}: {tap.side} of {tap.module!r} was overwritten; tap the module after it")
        if name == "pooled":
            return feature.flatten(1)
        if tap.channels is not None and feature.ndim == 4 and feature.shape[1] != tap.channels == feature.shape[3]:
            return feature.permute(0, 3, 1, 2)
        return feature


def _stage_taps(network: nn.Module) -> dict[str, Tap]:
    """Return the taps of ``stem`` and ``stage1`` to ``stageN``."""
    if isinstance(network, FamilyNetwork):
        return {name: Tap(module) for name, module in network.feature_modules.items()}
    if not _is_timm(network):
        return {}
    stages: list[dict[str, Any]] = list(network.feature_info)  # pyright: ignore[reportArgumentType]  # a list in timm
    reductions = [stage["reduction"] for stage in stages]
    if len(stages) > 4 and len(set(reductions)) == 1:
        stages = [stages[(quarter * len(stages) + 2) // 4 - 1] for quarter in (1, 2, 3, 4)]
    first = 0 if len(stages) == 5 and reductions[0] == 2 else 1
    modules = _modules(network)
    return {
        f"stage{number}" if number else "stem": Tap(stage["module"], channels=stage["num_chs"])
        for number, stage in enumerate(stages, start=first)
        if stage["module"] in modules
    }


def _timm_pooling(network: nn.Module, classifier: str) -> str | None:
    """Return the path of the average pooling whose outputs the classifier takes in; ``None`` where that is not sure.

    Modules stand in the order in which timm's networks run them, as far as the pooling and what follows are concerned.
    """
    parent, _, name = classifier.rpartition(".")
    siblings = list(network.get_submodule(parent).named_children())
    names = [sibling for sibling, _ in siblings]
    if "global_pool" not in names or names.index("global_pool") > names.index(name):
        return None
    pooling, *between = [module for _, module in siblings[names.index("global_pool") : names.index(name)]]
    layers = [layer for layer in pooling.modules() if not list(layer.children()) and not _passes(layer)]
    averages = [
        layer for layer in layers if isinstance(layer, nn.AdaptiveAvgPool2d) and layer.output_size in (1, (1, 1))
    ]
    if len(layers) != 1 or layers != averages or not all(_passes(module) for module in between):
        return None
    return f"{parent}.global_pool" if parent else "global_pool"


def _passes(module: nn.Module) -> bool:
    """Say whether a module leaves every value as it is."""
    return isinstance(module, (nn.Identity, nn.Flatten)) or (isinstance(module, nn.Dropout) and module.p == 0)


def _is_timm(network: nn.Module) -> bool:
    """Say whether the network describes itself as timm's do, without importing timm."""
    return isinstance(getattr(network, "feature_info", None), list) and callable(
        getattr(network, "get_classifier", None)
    )


def _modules(network: nn.Module) -> dict[str, nn.Module]:
    """Return every module below the network by each of its paths."""
    modules = dict(network.named_modules(remove_duplicate=False))
    del modules[""]
    return modules


def _inside_classifier(tap: Tap) -> Tap:
    """Return the tap as seen from the classifier that holds the network."""
    return replace(tap, module=f"network.{tap.module}")


def _version(tensor: Tensor) -> int | None:
    """Return how often the tensor was written in place; ``None`` where PyTorch does not count."""
    if torch.compiler.is_compiling() or tensor.is_inference():
        return None
    return tensor._version  # pyright: ignore[reportPrivateUsage]  # the name that PyTorch documents it by


def _unknown_tap(name: str, network: nn.Module) -> InputError:
    """Return the error that lists the canonical taps and the nearest modules."""
    modules = list(_modules(network))
    near = get_close_matches(name, modules, n=3, cutoff=0.5) or modules[:3]
    known = ", ".join(find_taps(network)) or "none"
    return InputError(
        f"unknown tap {name!r} of {type(network).__name__}; named taps: {known}; or a module's path, such as "
        f"{', '.join(near) or 'none'}"
    )
