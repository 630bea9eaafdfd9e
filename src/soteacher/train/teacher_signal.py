"""Where a student's targets come from."""

from __future__ import annotations

from collections.abc import Callable
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
