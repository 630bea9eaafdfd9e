"""Where a student's targets come from."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch

from soteacher.types import Batch, Outputs


class TeacherSignal(Protocol):
    """What the teacher says to a batch. A live network and stored answers are interchangeable."""

    def __call__(self, batch: Batch) -> Outputs:
        """Return the teacher's outputs for the batch, without gradients."""
        ...


class LiveTeacher:
    """A frozen network in evaluation mode that sees the images the student sees."""

    def __init__(self, forward: Callable[[torch.Tensor], Any]) -> None:
        """``forward`` maps images to ``(logits, features)``; the caller has frozen the network."""
        self._forward = forward

    @torch.no_grad()
    def __call__(self, batch: Batch) -> Outputs:
        """Run the network on the batch's images."""
        logits, features = self._forward(batch.images)
        return Outputs(logits=logits, features=features)
