"""A student's later layers on top of a feature of another network: they are trained with it and thrown away."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from typing import Any, cast, final

import torch
from torch import Tensor, nn

from soteacher.errors import InputError
from soteacher.objectives.connectors import MapConnector
from soteacher.objectives.features import TapPair, as_maps, map_shape, stages
from soteacher.precision import full_precision
from soteacher.types import BuiltNetwork, NetworkFacts

PROBE_BATCH = 2
"""Examples in the look at a branch: batch normalisation needs two where maps have one pixel."""


def branch_points(network: NetworkFacts, student: NetworkFacts) -> tuple[TapPair, ...]:
    """Return where branches leave the network in training and enter a student, from shallow to deep.

    Stages are paired from the deepest back; the last pair is left out, behind which there is a classifier only.

    Raises:
        InputError: one of the two has fewer than two stages, or a stage gives neither maps nor tokens.
    """
    ours, theirs = stages(network), stages(student)
    if min(len(ours), len(theirs)) < 2:
        raise InputError(
            f"branches begin at stages before the last, and need two stages of both networks: {network.name} has "
            f"{', '.join(ours) or 'none'}, {student.name} has {', '.join(theirs) or 'none'}"
        )
    paired = list(zip(reversed(theirs), reversed(ours), strict=False))[:0:-1]
    return tuple(
        TapPair(student=s, teacher=t, student_shape=map_shape(student, s), teacher_shape=map_shape(network, t))
        for s, t in paired
    )


@final
class StudentBranch(nn.Module):
    """What follows a stage of a student, fed with another network's feature.

    The feature is resized and goes through a 1x1 convolution and normalisation to the shape of the student's own. The
    student's layers before that stage do not run: they have no gradients and are not trained.

    Args:
        student: with new weights, the branch's own.
        pair: the student's stage and the other network's.

    Raises:
        InputError: the student cannot go on from that stage alone.
    """

    def __init__(self, student: BuiltNetwork, pair: TapPair) -> None:
        super().__init__()
        channels, height, width = pair.student_shape
        self.connector = MapConnector(pair.teacher_shape[0], channels, (height, width))
        self.student = student.classifier.train()
        self.tap = pair.student
        self._parts = student.parts
        self._shape = student.facts.taps[pair.student]
        self._leave_out_what_does_not_run(student)

    def forward(self, feature: Tensor, images: Tensor) -> Tensor:
        """Return the logits ``[B, K]`` that the branch makes of a feature; running statistics stay as they are.

        Args:
            feature: maps, tokens or vectors of the other network's stage.
            images: ``[B, C, H, W]`` of the batch: only their shape is used.
        """
        maps = as_maps(feature)
        with full_precision(maps):
            bridged = self.connector(maps)
        return self._parts.run_from(self.tap, self._as_feature(bridged), images)

    def _as_feature(self, maps: Tensor) -> Tensor:
        """Return maps in the form of the student's own feature; leading tokens take the average of the patches."""
        if len(self._shape) != 2:
            return maps.flatten(1) if len(self._shape) == 1 else maps
        patches = maps.flatten(2).transpose(1, 2)
        leading = patches.mean(dim=1, keepdim=True).expand(-1, self._shape[0] - patches.shape[1], -1)
        return torch.cat([leading, patches], dim=1)

    def _leave_out_what_does_not_run(self, student: BuiltNetwork) -> None:
        """Take the student's parameters that no logit depends on out of the training, after one look at the branch."""
        parameters = list(self.student.parameters())
        images = parameters[0].new_zeros((PROBE_BATCH, *_image_shape(student)))
        feature = parameters[0].new_zeros((PROBE_BATCH, *self._shape))
        with torch.enable_grad():
            try:
                logits = self._parts.run_from(self.tap, feature, images)
            except InputError as error:
                raise InputError(f"{student.facts.name} makes no branch: {error}") from None
            found = torch.autograd.grad(logits.sum(), parameters, allow_unused=True)
        gradients = cast("Sequence[Tensor | None]", found)
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.requires_grad_(gradient is not None)


def _image_shape(built: BuiltNetwork) -> torch.Size:
    """Return ``(C, H, W)`` of the images that a network was looked at with.

    Asking for the shape at a module lets it run once more: what it takes in there is noted.
    """
    seen: list[torch.Size] = []

    def note(module: nn.Module, arguments: tuple[Any, ...]) -> None:
        del module
        seen.append(arguments[0].shape[1:])

    handle = built.classifier.register_forward_pre_hook(note)
    try:
        for path, _ in built.classifier.named_modules():
            inner = path.partition(".")[2]  # paths are those inside the network that the classifier holds
            with suppress(InputError, KeyError):
                _ = inner and built.facts.taps[inner]
            if seen:
                return seen[0]
    finally:
        handle.remove()
    raise InputError(f"the facts of {built.facts.name} must give the shape at any module's path, as a study's do")
