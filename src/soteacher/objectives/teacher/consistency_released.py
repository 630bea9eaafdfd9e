"""The consistency term of SoTeacher's released code, whose average counts the first epoch twice."""

from __future__ import annotations

from typing import final

import torch
from torch import Tensor

from soteacher.objective import Objective, ObjectiveConfig, Ramp
from soteacher.objectives.prediction_memory import take_in_predictions
from soteacher.objectives.teacher.consistency import running_mean, squared_distance
from soteacher.precision import at_least_float32
from soteacher.types import Step, Task


def released_running_mean(average: Tensor, value: Tensor, count: Tensor) -> Tensor:
    r"""Average of :math:`n + 1` values in which the first counts twice, for each example.

    .. math:: (2 v_1 + v_2 + \dots + v_{n+1}) / (n + 2)

    Args:
        average: ``[B, K]`` the same average of the first :math:`n` values; ignored in rows whose count is 0.
        value: ``[B, K]`` the last value.
        count: ``[B]`` integers :math:`n \ge 0`.

    Returns:
        ``[B, K]``.

    Raises:
        InputError: the shapes do not fit.

    Source: released code of Dong, Liu and Shang, ICLR 2024, arXiv:2206.06661: from epoch 2 on it takes the new value in
    with the share 1 / (1 + epoch) instead of 1 / epoch.
    """
    return running_mean(average, value, count + (count > 0))


class ConsistencyReleasedConfig(ObjectiveConfig):
    """Settings of :class:`ConsistencyReleased`."""

    ramp: Ramp = "linear"
    """How the weight grows over the run; early averages deserve little trust."""

    def build(self, task: Task) -> ConsistencyReleased:
        """Return the objective with an empty memory, one row for each training example."""
        return ConsistencyReleased(self, task)


@final
class ConsistencyReleased(Objective[Step]):
    """Stay near the average of the authors' code; see ``squared_distance`` and :func:`released_running_mean`.

    Memory and restrictions are those of ``consistency``.
    """

    name = "consistency_released"
    average: Tensor
    """``[N, K]`` float32 average of each example's earlier predictions, the first of them counted twice."""
    count: Tensor
    """``[N]`` int64 number of them."""

    def __init__(self, config: ConsistencyReleasedConfig, task: Task) -> None:
        super().__init__()
        self.config = config
        self.register_buffer("average", torch.zeros(task.num_examples, task.num_classes, dtype=torch.float32))
        self.register_buffer("count", torch.zeros(task.num_examples, dtype=torch.int64))

    def forward(self, step: Step) -> Tensor:
        """Return the mean squared distance of the batch, from the averages before this step."""
        predictions = at_least_float32(step.outputs.logits).softmax(dim=-1)
        average, count = self.average.index_select(0, step.indices), self.count.index_select(0, step.indices)
        return squared_distance(predictions, average, count).mean()

    def update(self, step: Step) -> None:
        """Take this step's predictions into the averages of its examples."""
        take_in_predictions(self.average, self.count, step, released_running_mean)
