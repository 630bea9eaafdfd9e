"""Which batch norm takes in what a convolution puts out: together the two are one operator."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm  # pyright: ignore[reportPrivateUsage] the one class of all of them
from torch.nn.modules.conv import _ConvNd  # pyright: ignore[reportPrivateUsage] the one class of all of them
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from soteacher.models.classifier import Classifier
from soteacher.models.parts import evaluating


class Composition(Mapping[str, str]):
    """Path of each convolution or linear layer to that of its batch norm, found out when it is first asked for.

    Paths are those in the bare network, without the :class:`Classifier` that may hold it. A layer is there if, in a
    forward pass in evaluation mode, a batch norm took in the very tensor that it put out and no other operation read or
    overwrote it. Layers and batch norms that ran more than once are left out, and so are linear layers whose outputs
    are no vectors ``[B, C]``: a batch norm scales the second dimension.

    Args:
        network: images to logits.
        images: ``[B, C, H, W]`` examples of its input, on its device.
    """

    def __init__(self, network: nn.Module, images: Tensor) -> None:
        self._network = network
        self._images = images
        self._pairs: dict[str, str] | None = None

    def __getitem__(self, layer: str) -> str:
        return self._found()[layer]

    def __iter__(self) -> Iterator[str]:
        return iter(self._found())

    def __len__(self) -> int:
        return len(self._found())

    def _found(self) -> dict[str, str]:
        if self._pairs is None:
            self._pairs = _pairs(self._network, self._images)
        return self._pairs


def _pairs(network: nn.Module, images: Tensor) -> dict[str, str]:
    """Run the network once and name what belongs together, in the order of its modules."""
    watch = _Watch()
    handles: list[Any] = []
    for module in network.modules():
        if isinstance(module, (_ConvNd, nn.Linear)):
            handles.append(module.register_forward_hook(watch.put_out))
        elif isinstance(module, _BatchNorm):
            handles.append(module.register_forward_pre_hook(watch.begin, with_kwargs=True))
            handles.append(module.register_forward_hook(watch.end))
    try:
        with torch.no_grad(), evaluating(network), watch:
            network(images)
    finally:
        for handle in handles:
            handle.remove()
    bare = network.network if isinstance(network, Classifier) else network
    paths = {module: path for path, module in bare.named_modules()}
    joined = watch.joined()
    return {path: paths[joined[module]] for module, path in paths.items() if joined.get(module) in paths}


class _Watch(TorchDispatchMode):
    """Sees every operation of a forward pass, and so who reads or overwrites what a layer put out."""

    def __init__(self) -> None:
        super().__init__()
        self._made_by: dict[int, nn.Module] = {}  # a tensor's id to the layer that put it out
        self._kept: list[Tensor] = []  # an id is unique only as long as its tensor lives
        self._taken_by: dict[nn.Module, list[nn.Module]] = {}  # a layer to the batch norms that took in its output
        self._used_otherwise: set[nn.Module] = set()
        self._runs: Counter[nn.Module] = Counter()
        self._running: int | None = None  # id of what the batch norm at work has taken in

    def put_out(self, module: nn.Module, arguments: Any, output: Any) -> None:
        """Note what a convolution or linear layer gives."""
        del arguments
        self._runs[module] += 1
        if isinstance(output, Tensor) and output.ndim == cast("Tensor", module.weight).ndim:
            self._made_by[id(output)] = module
            self._kept.append(output)

    def begin(self, module: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        """Note what a batch norm takes in."""
        self._runs[module] += 1
        taken = id(next(iter((*arguments, *keywords.values())), None))
        if taken in self._made_by:
            self._taken_by.setdefault(self._made_by[taken], []).append(module)
            self._running = taken

    def end(self, module: nn.Module, arguments: Any, output: Any) -> None:
        """Note that the batch norm is done."""
        del module, arguments, output
        self._running = None

    def joined(self) -> dict[nn.Module, nn.Module]:
        """Return the batch norm of each layer that has one for itself."""
        return {
            layer: takers[0]
            for layer, takers in self._taken_by.items()
            if len(takers) == 1
            and layer not in self._used_otherwise
            and self._runs[layer] == 1
            and self._runs[takers[0]] == 1
        }

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operation and note which layers' outputs it has read."""
        del types
        for value in tree_leaves((args, kwargs)):
            if isinstance(value, Tensor) and id(value) in self._made_by and id(value) != self._running:
                self._used_otherwise.add(self._made_by[id(value)])
        return func(*args, **(kwargs or {}))
