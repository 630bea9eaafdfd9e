"""What an architecture family of ours provides. A family is one file, and one line of the zoo's table."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal, Protocol

from torch import nn


@dataclass(frozen=True, slots=True)
class Tap:
    """Where a feature is taken: what a module puts out, or what it takes in (its first argument)."""

    module: str
    """Path of the module in the network, as in ``named_modules``."""
    side: Literal["output", "input"] = "output"
    channels: int | None = None
    """Where given, maps that have this many channels last, ``[B, H, W, C]``, come as ``[B, C, H, W]``."""


class FamilyNetwork(nn.Module, ABC):
    """A network of ours, which says itself where its features are. Subclasses are final.

    Its logits are the classifier layer's values for the averages of the last maps: nothing lies between.
    """

    feature_modules: ClassVar[Mapping[str, str]]
    """Canonical feature names (``stem``, ``stage1``, ...), from shallow to deep, and the modules that put them out."""
    pooling_module: ClassVar[str] = "avgpool"
    """The layer that averages the last maps: what it takes in is the feature ``maps``."""
    classifier_module: ClassVar[str]
    """The layer that makes logits out of the pooled features."""

    @abstractmethod
    def preactivations(self) -> dict[str, Tap]:
        """Return where the stages' outputs are before a rectifier cuts them: ``preactivation1`` for ``stage1``, ...

        A stage that ends without a rectifier, and has none in front of what follows, is left out: its output serves.
        """


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


class BlockBuilder(Protocol):
    """How a block is made: a block's class."""

    def __call__(self, in_channels: int, channels: int, *, stride: int) -> nn.Module:
        """Return a block with new weights."""
        ...


def stage_of_blocks(
    block: BlockBuilder, in_channels: int, channels: int, num_blocks: int, *, stride: int, expansion: int = 1
) -> nn.Sequential:
    """Return a stage whose first block changes channels and sides.

    Args:
        block: makes a block; it puts out ``expansion`` times its channels.
        in_channels: of the stage's input.
        channels: of each block.
        num_blocks: how many.
        stride: of the first block.
        expansion: see ``block``.
    """
    first = block(in_channels, channels, stride=stride)
    return nn.Sequential(first, *(block(expansion * channels, channels, stride=1) for _ in range(num_blocks - 1)))


def preactivations_of_blocks(network: FamilyNetwork) -> dict[str, Tap]:
    """Return the preactivations of stages that are sequences of blocks: what the last block's ``relu`` takes in."""
    stages = {name: module for name, module in network.feature_modules.items() if name.startswith("stage")}
    return {
        f"pre{name.replace('stage', 'activation')}": Tap(
            f"{module}.{len(list(network.get_submodule(module).children())) - 1}.relu", "input"
        )
        for name, module in stages.items()
    }


def initialize(network: nn.Module) -> None:
    r"""Draw the convolutions from :math:`\mathcal N(0, 2 / \text{fan\_out})`; other layers keep PyTorch's start.

    The fan counts kernel elements times output channels, also where a convolution has groups.

    Source: He et al. 2015, arXiv:1502.01852, section 2.2, backward form, as the CIFAR networks of the literature do.
    """
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
