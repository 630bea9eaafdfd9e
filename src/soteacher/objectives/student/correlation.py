"""Correlation congruence: where the student misses the teacher, it does not miss for the neighbour in the batch too."""

from __future__ import annotations

from collections.abc import Sequence
from typing import final

import torch
from pydantic import Field
from torch import Tensor, nn

from soteacher.errors import InputError
from soteacher.objective import Method, Objective
from soteacher.objectives.features import FeatureConfig, TapPair, as_vectors
from soteacher.precision import at_least_float32, full_precision
from soteacher.types import DistillStep, Task


def correlation_distance(student_embedding: Tensor, teacher_embedding: Tensor) -> Tensor:
    r"""How much the student's errors on neighbours of the batch go together.

    .. math:: \frac{1}{B - 1} \sum_{i=1}^{B-1} \sum_d \delta_{i,d} \, \delta_{i+1,d}, \quad \delta = | e_s - e_t |

    Args:
        student_embedding: ``[B, D]``; gradients flow.
        teacher_embedding: ``[B, D]``; gradients flow, since the teacher's embedding is trained as well.

    Returns:
        A scalar, not negative, float32 (float64 from float64 embeddings); 0 at agreement and for a single example. It
        depends on the order of the batch.

    Raises:
        InputError: the shapes differ or are not ``[B, D]``.

    Source: Peng et al., ICCV 2019, arXiv:1904.01802, in the form that the author gave to RepDistiller; the paper
    compares kernels of all pairs of examples instead (from memory of the paper, not checked).
    """
    if student_embedding.ndim != 2 or student_embedding.shape != teacher_embedding.shape:
        raise InputError(
            f"student and teacher embeddings must have one shape [B, D], got {list(student_embedding.shape)} (student) "
            f"and {list(teacher_embedding.shape)} (teacher)"
        )
    error = (at_least_float32(student_embedding) - at_least_float32(teacher_embedding)).abs()
    return (error[:-1] * error[1:]).sum() / max(1, len(error) - 1)


class CorrelationConfig(FeatureConfig):
    """Settings of :class:`Correlation`."""

    default_taps = "pooled"
    dimension: int = Field(default=128, ge=1)
    """Numbers in each of the embeddings that are compared."""

    def build(self, task: Task) -> Correlation:
        """Return the objective with a linear embedding of each side of each pair."""
        return Correlation(self, self.pairs(task))


@final
class Correlation(Objective[DistillStep]):
    """Match the teacher in a common space that both are embedded in; see :func:`correlation_distance`."""

    name = "correlation"

    def __init__(self, config: CorrelationConfig, pairs: Sequence[TapPair]) -> None:
        super().__init__()
        self.config = config
        self.features = tuple(pair.student for pair in pairs)
        self.teacher_features = tuple(pair.teacher for pair in pairs)
        self.student_embeddings = nn.ModuleList(nn.Linear(pair.student_shape[0], config.dimension) for pair in pairs)
        self.teacher_embeddings = nn.ModuleList(nn.Linear(pair.teacher_shape[0], config.dimension) for pair in pairs)

    def forward(self, step: DistillStep) -> Tensor:
        """Return the distance of the batch, summed over the pairs of taps."""
        losses: list[Tensor] = []
        with full_precision(step.outputs.logits):
            for tap, embedding, teacher_tap, teacher_embedding in zip(
                self.features, self.student_embeddings, self.teacher_features, self.teacher_embeddings, strict=True
            ):
                student = embedding(as_vectors(step.outputs.features[tap]))
                teacher = teacher_embedding(as_vectors(step.teacher.features[teacher_tap].detach()))
                losses.append(correlation_distance(student, teacher))
        return torch.stack(losses).sum()


METHOD = Method(
    name="correlation",
    role="student",
    title="Correlation congruence, as in the standard benchmark: errors on neighbours of a batch do not go together",
    venue="ICCV 2019",
    source="Peng et al., ICCV 2019, arXiv:1904.01802; loss, embeddings and weight of RepDistiller's benchmark",
    differs="A batch of one example has no neighbours and gives 0, where the released code gives no number.",
    terms={"cross_entropy": {"weight": 1.0}, "correlation": {"weight": 0.02}},
)
