"""Correctness ranking: examples that were right more often are to be more confident."""

from __future__ import annotations

from typing import final

import torch
from torch import Tensor

from soteacher.errors import InputError
from soteacher.objective import Method, Objective, ObjectiveConfig
from soteacher.precision import at_least_float32
from soteacher.types import Step, Task


def ranking_violation(confidence: Tensor, correctness: Tensor) -> Tensor:
    r"""How far pairs of neighbours in the batch are from their wanted difference of confidence, one value per pair.

    .. math:: \max(0, -\operatorname{sign}(c_i - c_j) (\kappa_i - \kappa_j) + |c_i - c_j|)

    with :math:`j = i + 1`, and the first example after the last. It is 0 where the example that was right more often
    leads by at least the margin :math:`|c_i - c_j|`, and where both were right equally often.

    Args:
        confidence: ``[B]`` :math:`\kappa`, in [0, 1]; gradients flow.
        correctness: ``[B]`` :math:`c`, the share of earlier predictions that were right, in [0, 1]; a constant.

    Returns:
        ``[B]``, in [0, 2]; a batch of one is its own neighbour and has 0.

    Raises:
        InputError: the shapes differ or are not ``[B]``.

    Source: Moon, Kim, Shin and Hwang, ICML 2020, arXiv:2007.01458, section 3.3, equation 2.
    """
    if confidence.ndim != 1 or confidence.shape != correctness.shape:
        raise InputError(
            "ranking needs confidence and correctness of one shape [B], got "
            f"{list(confidence.shape)} and {list(correctness.shape)}"
        )
    wanted = (correctness - correctness.roll(-1)).detach()
    lead = confidence - confidence.roll(-1)
    return (wanted.abs() - wanted.sign() * lead).relu()


class ConfidenceRankingConfig(ObjectiveConfig):
    """Settings of :class:`ConfidenceRanking`."""

    def build(self, task: Task) -> ConfidenceRanking:
        """Return the objective with an empty memory, two numbers for each training example."""
        return ConfidenceRanking(self, task)


@final
class ConfidenceRanking(Objective[Step]):
    """Rank the examples' confidence by how often they were right so far; see :func:`ranking_violation`.

    Confidence is the largest predicted probability, and correctness the share of the example's own earlier steps in
    which its prediction was right, 0 before the first. No example may occur twice in one step.
    """

    name = "confidence_ranking"
    right: Tensor
    """``[N]`` int64 how often each example's prediction was right."""
    count: Tensor
    """``[N]`` int64 how often it was looked at."""

    def __init__(self, config: ConfidenceRankingConfig, task: Task) -> None:
        super().__init__()
        self.config = config
        self.register_buffer("right", torch.zeros(task.num_examples, dtype=torch.int64))
        self.register_buffer("count", torch.zeros(task.num_examples, dtype=torch.int64))

    def forward(self, step: Step) -> Tensor:
        """Return the mean violation of the batch, by the correctness before this step."""
        confidence = at_least_float32(step.outputs.logits).softmax(dim=-1).amax(dim=-1)
        correctness = self.right[step.indices] / self.count[step.indices].clamp(min=1)
        return ranking_violation(confidence, correctness).mean()

    @torch.no_grad()
    def update(self, step: Step) -> None:
        """Count this step's predictions, and those that are right."""
        self.right[step.indices] += step.outputs.logits.argmax(dim=-1) == step.labels
        self.count[step.indices] += 1


METHOD = Method(
    name="confidence_ranking",
    role="teacher",
    title="Cross-entropy and a ranking of the examples' confidence by how often they were right",
    venue="ICML 2020",
    source="Moon, Kim, Shin and Hwang, ICML 2020, arXiv:2007.01458; weight of the released code",
    differs=(
        "Correctness is the share of right predictions, as in the paper. The released code stretches it so that the "
        "example that was right least often has 0, which widens all margins, and has no value where every example was "
        "always right. Optimiser and schedule are the study's own; theirs are batches of 128 and 300 epochs."
    ),
    terms={
        "cross_entropy": {},
        "confidence_ranking": {"weight": 1.0},
    },
)
