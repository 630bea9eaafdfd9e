"""Cross-entropy of a further view with the labels: for methods that train on two views of each image."""

from __future__ import annotations

from typing import ClassVar, final

from torch import Tensor

from soteacher.objective import Objective, ObjectiveConfig
from soteacher.objectives.cross_entropy import cross_entropy
from soteacher.objectives.views import student_view
from soteacher.types import Step, Task, View


class ViewCrossEntropyConfig(ObjectiveConfig):
    """Settings of :class:`ViewCrossEntropy`."""

    def build(self, task: Task) -> ViewCrossEntropy:
        """Return the objective; it needs nothing from the task."""
        del task
        return ViewCrossEntropy()


@final
class ViewCrossEntropy(Objective[Step]):
    """Fit the labels on the strongly augmented view too; see :func:`soteacher.functional.cross_entropy`."""

    name = "view_cross_entropy"
    views: ClassVar[tuple[View, ...]] = ("strong",)

    def forward(self, step: Step) -> Tensor:
        """Return the mean cross-entropy of the batch in its strong view."""
        return cross_entropy(student_view(step, "strong").logits, step.labels).mean()
