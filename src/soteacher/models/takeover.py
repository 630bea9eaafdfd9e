"""A student takes over its teacher's classifier, with a projector in front of it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from soteacher.errors import InputError
from soteacher.models.classifier import Classifier
from soteacher.models.parts import Parts, evaluating
from soteacher.models.reused_classifier import ReusedSpec, reuse_classifier
from soteacher.models.taps import Tapped, classifier_module, find_taps


def take_over_classifier(
    student: Classifier, teacher: Classifier, images: Tensor, *, reduction: int, names: tuple[str, str]
) -> ReusedSpec:
    """Let a student end in a new projector and a frozen copy of its teacher's classifier; it is changed in place.

    Maps are projected where both networks have the tap ``maps``, else the pooled vectors. The projector's weights are
    drawn from PyTorch's global generator.

    Args:
        student: a network with a classifier layer.
        teacher: a network whose classifier is a linear layer.
        images: ``[B, C, H, W]`` examples of their input.
        reduction: the projector's inner channels are the teacher's divided by this.
        names: how messages call student and teacher.

    Returns:
        What builds the student's end again: ``reused`` of :class:`~soteacher.models.classifier.NetworkSpec`.

    Raises:
        InputError: the teacher's classifier is not linear, or the logits of one of the two are not those of its
            classifier layer alone.
    """
    own, taken = _look(student, images, names[0]), _look(teacher, images, names[1])
    layer = taken.linear
    maps = own.map_channels is not None and taken.map_channels == layer.in_features
    path = classifier_module(student.network)
    assert path is not None, "the look has found it"
    spec = ReusedSpec(
        classifier=path,
        pooling=find_taps(student.network)["maps"].module if maps else None,
        in_features=own.map_channels if maps and own.map_channels is not None else own.linear.in_features,
        features=layer.in_features,
        bias=layer.bias is not None,  # pyright: ignore[reportUnnecessaryComparison] torch's types leave out the None
        reduction=reduction,
    )
    reuse_classifier(student.network, spec, num_classes=layer.out_features)
    Parts(student).classifier.load_state_dict(layer.state_dict())
    student.to(own.linear.weight.device)
    return spec


@dataclass(frozen=True, slots=True)
class _End:
    """How a network ends."""

    linear: nn.Linear
    map_channels: int | None
    """Of the tap ``maps``; ``None`` where there is none."""


@torch.no_grad()
def _look(classifier: Classifier, images: Tensor, name: str) -> _End:
    """Run a network once, in evaluation mode, and make sure that its linear layer alone makes the logits."""
    try:
        linear = Parts(classifier).classifier
    except InputError as error:
        raise InputError(f"{name} has no classifier to exchange or reuse: {error}") from None
    taps = find_taps(classifier)
    tapped = Tapped(classifier, {tap: taps[tap] for tap in ("maps", "pooled") if tap in taps})
    try:
        with evaluating(classifier):
            logits, features = tapped(images.to(classifier.mean.device))
    finally:
        tapped.close()
    pooled = features["pooled"]
    if pooled.shape[1] != linear.in_features or not torch.allclose(linear(pooled), logits, rtol=1e-3, atol=1e-4):
        raise InputError(f"{name} has no classifier to exchange or reuse: its logits are not those of one linear layer")
    return _End(linear, features["maps"].shape[1] if "maps" in features else None)
