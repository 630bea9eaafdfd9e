"""Where a student's targets come from."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

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

    def __init__(self, forward: Callable[[Tensor], Any], parts: NetworkParts | None = None) -> None:
        """``forward`` maps images to ``(logits, features)``; the caller has frozen the network."""
        self._forward = forward
        self.parts = parts

    def __call__(self, batch: Batch, view: View | None = None) -> Outputs:
        """Run the network on the images."""
        return self.answer(batch.images if view is None else batch.views[view])

    @torch.no_grad()
    def answer(self, images: Tensor) -> Outputs:
        """Return what the network puts out for images ``[B, C, H, W]``."""
        logits, features = self._forward(images)
        return Outputs(logits=logits, features=features)

    def at(self, progress: float) -> LiveTeacher:
        """Return itself: it teaches throughout."""
        del progress
        return self


class Answers(Protocol):
    """Where answers to numbered views are kept; see :class:`soteacher.train.answer_store.AnswerStore`."""

    def read(self, keys: Tensor) -> tuple[Tensor, Tensor]:
        """Return logits ``[B, K]`` float32 on the host, and ``[B]`` bool which of them are known."""
        ...

    def write(self, keys: Tensor, logits: Tensor) -> Tensor:
        """Keep logits and return them as they will be read."""
        ...


SMALLEST_BATCH = 16
"""Fewer images may go through other arithmetic, whose last bits differ from those of the whole batch."""


class CachedTeacher:
    """A frozen network whose logits are kept: each view of each image goes through it once, for all its students.

    Logits have the precision of what keeps them, those that have just been computed too, so that a training does not
    depend on who has asked first. There are no features.
    """

    def __init__(self, live: LiveTeacher, answers: Answers) -> None:
        """Take the network and its answers so far."""
        self._live, self._answers = live, answers
        self.parts = live.parts

    def __call__(self, batch: Batch, view: View | None = None) -> Outputs:
        """Return what is known, and ask the network for the rest."""
        if view not in batch.keys:  # a view of which there is no end
            return self._live(batch, view)
        images, keys = batch.images if view is None else batch.views[view], batch.keys[view]
        logits, known = self._answers.read(keys)
        if not known.all():
            rows = (~known).nonzero().flatten()
            answers = self._live.answer(images if len(rows) == len(keys) else images[_filled_up(rows, len(keys))])
            logits[rows] = self._answers.write(keys[rows], answers.logits[: len(rows)].float().cpu())
        return Outputs(logits=logits.to(images.device, non_blocking=True), features={})

    def at(self, progress: float) -> CachedTeacher:
        """Return itself: it teaches throughout."""
        del progress
        return self


def _filled_up(rows: Tensor, count: int) -> Tensor:
    """Return some rows of a batch with others behind them, so that they are a multiple of the smallest batch."""
    wanted = min(count, -(-len(rows) // SMALLEST_BATCH) * SMALLEST_BATCH)
    return torch.cat([rows, torch.arange(wanted - len(rows))])


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
