"""The vocabulary of a training step: what flows from the data to the objectives."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """Augmented examples on the training device."""

    images: Tensor
    """``[B, C, H, W]`` float32 in [0, 1]; each network normalises its input itself."""
    labels: Tensor
    """``[B]`` int64 class ids."""
    indices: Tensor
    """``[B]`` int64 rows of the training set; objectives with a memory are keyed by them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Outputs:
    """What a network returned for a batch."""

    logits: Tensor
    """``[B, K]``."""
    features: dict[str, Tensor]
    """The taps that the objectives asked for, by name, each ``[B, ...]``."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """What one optimisation step offers to every objective."""

    images: Tensor
    labels: Tensor
    indices: Tensor
    outputs: Outputs
    model: nn.Module
    """The network in training, without any wrapper of precision or compilation."""
    epoch: int
    """The pass over the data that this step belongs to, from 0."""
    num_epochs: int
    progress: float
    """The share of the run that lies behind, in [0, 1)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DistillStep(Step):
    """A step of student training: the same, and what the frozen teacher returned."""

    teacher: Outputs


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """The facts about the data that an objective may need in order to be built."""

    num_examples: int
    num_classes: int
