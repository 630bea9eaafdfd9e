"""What an architecture family of ours provides. A family is one file, and one line of the zoo's table."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import ClassVar, Protocol

from torch import nn


class FamilyNetwork(nn.Module):
    """A network of ours, which says itself where its features are. Subclasses are final."""

    feature_modules: ClassVar[Mapping[str, str]]
    """Canonical feature names (``stem``, ``stage1``, ...), from shallow to deep, and the modules that put them out."""
    classifier_module: ClassVar[str]
    """The layer that makes logits out of the pooled features."""


class Builder(Protocol):
    """How a family builds a network by name."""

    def __call__(self, name: str, *, num_classes: int, in_channels: int) -> FamilyNetwork:
        """Return the network with random weights.

        Raises:
            InputError: there is no such network in the family.
        """
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """One line of the zoo's table."""

    names: tuple[str, ...]
    """The names to list; a family may build more, by a pattern."""
    knows: Callable[[str], bool]
    """Says whether a name is of the family, at no cost; raises an InputError where it is but no network has it."""
    build: Builder


def initialize(network: nn.Module) -> None:
    r"""Draw the convolutions from :math:`\mathcal N(0, 2 / \text{fan\_out})`; other layers keep PyTorch's start.

    Source: He et al. 2015, arXiv:1502.01852, section 2.2, backward form, as the CIFAR networks of the literature do.
    """
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
