"""A memory of each example's predictions: how an average of them takes in those of a step."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from soteacher.types import Step


@torch.no_grad()
def take_in_predictions(
    average: Tensor, count: Tensor, step: Step, mean: Callable[[Tensor, Tensor, Tensor], Tensor]
) -> None:
    """Take a step's predictions into the averages of its examples; both memories are changed in place.

    Args:
        average: ``[N, K]`` float32 average of each training example's earlier predictions.
        count: ``[N]`` int64 number of them.
        step: gives the predictions, and the rows of its examples.
        mean: ``(average, value, count)`` to the average that holds the value as well.
    """
    predictions = step.outputs.logits.softmax(dim=-1, dtype=torch.float32)
    before = count.index_select(0, step.indices)
    average.index_copy_(0, step.indices, mean(average.index_select(0, step.indices), predictions, before))
    count.index_copy_(0, step.indices, before + 1)
