"""The vocabulary of a training step: what flows from the data to the objectives."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal, Protocol

from torch import Tensor, nn

View = Literal["second", "strong", "rotated"]
"""A further view of each image of a batch, for objectives that declare it:

``second``: another draw of the study's augmentation, ``[B, C, H, W]``; ``strong``: the same and RandAugment on top;
``rotated``: the batch's own images turned by 90, 180 and 270 degrees, ``[3B, C, H, W]``, all of 90 first.
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Mixture:
    """What else is in the images of a batch, where each is blended with another one."""

    labels: Tensor
    """``[B]`` int64 class ids of the other images."""
    share: Tensor
    """``[B]`` float32: how much of each image is its own, in [0, 1]; the rest is the other one's."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """Augmented examples on the training device."""

    images: Tensor
    """``[B, C, H, W]`` float32 in [0, 1]; each network normalises its input itself."""
    labels: Tensor
    """``[B]`` int64 class ids."""
    indices: Tensor
    """``[B]`` int64 rows of the training set; objectives with a memory are keyed by them."""
    views: Mapping[View, Tensor] = field(default_factory=dict[View, Tensor])
    """Further views of the same examples, of the names that the objectives asked for."""
    keys: Mapping[View | None, Tensor] = field(default_factory=dict[View | None, Tensor])
    """``[B]`` int64, on the host: which of all views of all examples ``images`` (``None``) and the further views are,
    where there are finitely many of them; what is known of a view can be kept by it."""
    mixture: Mixture | None = None
    """What ``images`` are blended with; ``None`` where they are whole, as the further views always are."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Outputs:
    """What a network returned for a batch."""

    logits: Tensor
    """``[B, K]``."""
    features: dict[str, Tensor]
    """The taps that the objectives asked for, by name, each ``[B, ...]``."""


class NetworkParts(Protocol):
    """Pieces of a network, for objectives that send a feature through them."""

    @property
    def classifier(self) -> nn.Linear:
        """The layer that makes logits ``[B, K]`` of the feature ``pooled`` ``[B, D]``.

        Raises:
            InputError: the network's classifier is no linear layer.
        """
        ...

    def run_from(self, tap: str, feature: Tensor, images: Tensor) -> Tensor:
        """Return the logits ``[B, K]`` that the network gives where a tap has another value; gradients flow through.

        What lies before the tap does not run. Running statistics stay as they are.

        Args:
            tap: ``stem`` or a stage.
            feature: of the tap's shape.
            images: ``[B, C, H, W]`` of the batch: only their shape is used.

        Raises:
            InputError: the network has no such tap, or cannot go on from there.
        """
        ...


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
    seed: int = 0
    """For what an objective draws by itself, in a generator of its own; another one in each step."""
    views: Mapping[View, Outputs] = field(default_factory=dict[View, Outputs])
    """What the network returned for the further views."""
    parts: NetworkParts | None = None
    """Pieces of the network in training; the loop always gives them."""
    mixture: Mixture | None = None
    """What the images are blended with; only objectives whose settings say ``takes_mixtures`` ever see one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DistillStep(Step):
    """A step of student training: the same, and what the frozen teacher returned."""

    teacher: Outputs
    teacher_views: Mapping[View, Outputs] = field(default_factory=dict[View, Outputs])
    """What the teacher returned for the further views."""
    teacher_parts: NetworkParts | None = None
    """Pieces of the frozen teacher; the loop always gives them where the teacher is live."""


@dataclass(frozen=True, slots=True, kw_only=True)
class NetworkFacts:
    """What one look at a network has shown."""

    name: str
    """How messages call it: ``student wrn_16_2``."""
    taps: Mapping[str, tuple[int, ...]]
    """Shape of the feature at each tap, without the batch: ``(C, H, W)`` maps, ``(N, D)`` tokens, ``(D,)`` vectors.

    Iteration gives the canonical taps from shallow to deep; a module's path can be looked up too. An unknown name is an
    InputError.
    """
    num_logits: int
    """K, the numbers that the network puts out for each example."""
    batch_norm_of: Mapping[str, str] = field(default_factory=dict[str, str])
    """Convolution to the batch norm that takes in what it puts out, and nothing else, both as paths in the bare
    network; convolutions without one are not there."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BuiltNetwork:
    """A network with new weights that an objective has asked for, for the data of its task."""

    classifier: nn.Module
    """Images ``[B, C, H, W]`` in [0, 1] to logits ``[B, K]``."""
    parts: NetworkParts
    facts: NetworkFacts


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """The facts about the data that an objective may need in order to be built."""

    num_examples: int
    num_classes: int
    labels: Tensor | None = None
    """``[num_examples]`` int64 class of each training example."""
    rows: Tensor | None = None
    """``[M]`` int64 examples that the network is trained on, ascending; ``None`` for all."""
    network: NetworkFacts | None = None
    """The network in training."""
    teacher: NetworkFacts | None = None
    """The frozen teacher of a student."""
    build_network: Callable[[str], BuiltNetwork] | None = None
    """Makes a network by its name, for objectives that train one beside the network; a study always gives it."""
