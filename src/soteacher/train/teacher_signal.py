"""Where a student's targets come from."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch

from soteacher.types import Batch, NetworkParts, Outputs, View


class TeacherSignal(Protocol):
    """What the teacher says to a batch. A live network and stored answers are interchangeable."""

    @property
    def parts(self) -> NetworkParts | None:
        """Pieces of the teacher's network; ``None`` where only its answers are there."""
        ...

    def __call__(self, batch: Batch, view: View | None = None) -> Outputs:
        """Return the teacher's outputs for the batch's images or for one of its further views, without gradients."""
        ...


class TeacherSchedule(Protocol):
    """Who teaches when."""

    def at(self, progress: float) -> TeacherSignal:
        """Return who teaches when a share of the run, in [0, 1), lies behind."""
        ...


class LiveTeacher:
    """A frozen network in evaluation mode that sees the images the student sees."""

    def __init__(self, forward: Callable[[torch.Tensor], Any], parts: NetworkParts | None = None) -> None:
        """``forward`` maps images to ``(logits, features)``; the caller has frozen the network."""
        self._forward = forward
        self.parts = parts

    @torch.no_grad()
    def __call__(self, batch: Batch, view: View | None = None) -> Outputs:
        """Run the network on the images."""
        logits, features = self._forward(batch.images if view is None else batch.views[view])
        return Outputs(logits=logits, features=features)

    def at(self, progress: float) -> LiveTeacher:
        """Return itself: it teaches throughout."""
        del progress
        return self


class RouteOfTeachers:
    """Teachers that follow one another in equal parts of the run.

    Source: the route of checkpoints of Jin et al. (RCO), ICCV 2019, arXiv:1904.09149.
    """

    def __init__(self, teachers: Sequence[TeacherSignal]) -> None:
        """Take the teachers in their order; at least one."""
        self._teachers = teachers

    def at(self, progress: float) -> TeacherSignal:
        """Return who teaches when a share of the run lies behind."""
        return self._teachers[int(progress * len(self._teachers))]
