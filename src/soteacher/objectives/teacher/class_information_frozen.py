"""Class-conditional mutual information around the class means of the network as it was before the training."""

from __future__ import annotations

from typing import ClassVar, final

import torch
from torch import Tensor

from soteacher.objective import Objective, ObjectiveConfig
from soteacher.objectives.teacher.class_information import divergence_from_centroids, running_centroids
from soteacher.types import Step, Task


class ClassInformationFrozenConfig(ObjectiveConfig):
    """Settings of :class:`ClassInformationFrozen`."""

    def build(self, task: Task) -> ClassInformationFrozen:
        """Return the objective with uniform centroids, until the survey has found the true ones."""
        return ClassInformationFrozen(self, task)


@final
class ClassInformationFrozen(Objective[Step]):
    r"""Drive predictions away from where their class's mean was before the training.

    .. math:: - \frac{1}{B} \sum_i \mathrm{KL}\left(\sigma(z_i) \,\|\, Q^0_{y_i}\right)

    :math:`Q^0_y` is the exact mean prediction of class y over the training examples, taken in by the survey before the
    first step and never changed; where nobody surveys it stays uniform, and the objective rewards sureness. See
    ``divergence_from_centroids``.

    After the first steps this is no mutual information any more: all predictions of a class may leave its centroid
    together, and the value is bounded by no more than the floor, minus 27.6 nats. For a class k that the centroid
    hardly holds, more probability earns more than the cross-entropy takes for it once it is above
    :math:`e^{1 / w} \, Q^0_{y k}`, with :math:`w` the term's weight and as long as the label's own is near 1: above 55
    times the entry for 0.25, 22000 times for 0.1. So watch the accuracy where the weight is large.
    """

    name = "class_information_frozen"
    surveys: ClassVar[bool] = True
    centroids: Tensor
    """``[K, K]`` float32 mean prediction of each class before the training."""
    counts: Tensor
    """``[K]`` int64 number of examples of each class in these means."""

    def __init__(self, config: ClassInformationFrozenConfig, task: Task) -> None:
        super().__init__()
        self.config = config
        self.register_buffer("centroids", torch.full((task.num_classes,) * 2, 1 / task.num_classes))
        self.register_buffer("counts", torch.zeros(task.num_classes, dtype=torch.int64))

    def forward(self, step: Step) -> Tensor:
        """Return minus the mean divergence of the batch."""
        return -divergence_from_centroids(step.outputs.logits, step.labels, self.centroids).mean()

    @torch.no_grad()
    def survey(self, step: Step) -> None:
        """Take a batch of the training examples into the means."""
        self.centroids, self.counts = running_centroids(
            self.centroids, self.counts, step.outputs.logits, step.labels, momentum=1.0
        )
