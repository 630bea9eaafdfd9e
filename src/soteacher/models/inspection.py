"""One look at a network: what the feature at each tap is shaped like, and which layers belong together."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import suppress

import torch
from torch import Tensor, nn

from soteacher.errors import InputError
from soteacher.models.composition import Composition
from soteacher.models.parts import evaluating
from soteacher.models.taps import Tapped, find_taps, resolve_taps
from soteacher.types import NetworkFacts


def inspect_network(network: nn.Module, images: Tensor, *, name: str) -> NetworkFacts:
    """Return the shapes of a network's features, from one forward pass in evaluation mode that changes nothing.

    Which batch norm follows which convolution is found out by another such pass, when it is first asked for.

    Args:
        network: images to logits.
        images: ``[B, C, H, W]`` examples of its input, on its device.
        name: how messages call it: ``student wrn_16_2``.

    Raises:
        InputError: a tapped module did not run or gave no tensor.
    """
    taps = _Shapes(network, images)
    return NetworkFacts(name=name, taps=taps, num_logits=taps.num_logits, batch_norm_of=Composition(network, images))


class _Shapes(Mapping[str, tuple[int, ...]]):
    """Shapes by tap: the canonical ones are there, another module's is found out when it is asked for."""

    def __init__(self, network: nn.Module, images: Tensor) -> None:
        self._network = network
        self._images = images
        self.num_logits = 0
        self._canonical = self._look_at_those_that_run(list(find_taps(network)))

    def __getitem__(self, tap: str) -> tuple[int, ...]:
        return self._canonical[tap] if tap in self._canonical else self._look([tap])[tap]

    def __contains__(self, tap: object) -> bool:
        return tap in self._canonical

    def __iter__(self) -> Iterator[str]:
        return iter(self._canonical)

    def __len__(self) -> int:
        return len(self._canonical)

    def _look_at_those_that_run(self, names: list[str]) -> dict[str, tuple[int, ...]]:
        """Leave out what is named by the network's structure and takes no part in its forward pass."""
        try:
            return self._look(names)
        except InputError:
            self._look([])  # a network that cannot run at all has an error of its own
        shapes: dict[str, tuple[int, ...]] = {}
        for name in names:
            with suppress(InputError):
                shapes |= self._look([name])
        return shapes

    @torch.no_grad()
    def _look(self, names: list[str]) -> dict[str, tuple[int, ...]]:
        """Run the network once, in evaluation mode, and leave it as it was."""
        tapped = Tapped(self._network, resolve_taps(self._network, names))
        try:
            with evaluating(self._network):
                logits, features = tapped(self._images)
        finally:
            tapped.close()
        self.num_logits = logits.shape[1]
        return {name: tuple(feature.shape[1:]) for name, feature in features.items()}
