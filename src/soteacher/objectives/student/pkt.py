"""Probabilistic knowledge transfer: each image has the same neighbours as for the teacher."""

from __future__ import annotations

from collections.abc import Sequence
from typing import final

import torch
from torch import Tensor

from soteacher.objective import Method, Objective
from soteacher.objectives.features import FeatureConfig, TapPair, as_vectors
from soteacher.objectives.gram import gram_matrix
from soteacher.objectives.shapes import check_vectors
from soteacher.objectives.unit_vectors import unit_vectors
from soteacher.precision import at_least_float32
from soteacher.types import DistillStep, Task

EPSILON = 1e-7


def neighbour_probabilities(embeddings: Tensor) -> Tensor:
    r"""How near the examples of a batch are to each one, as probabilities.

    .. math:: p_{ij} = \frac{s_{ij}}{\sum_k s_{ik}}, \quad s_{ij} = \frac{1 + \cos(e_i, e_j)}{2}

    Args:
        embeddings: ``[B, D]``; gradients flow.

    Returns:
        ``[B, B]``, float32 (float64 from float64 embeddings); rows sum to 1 and hold the example itself as well. An
        embedding of zeros counts as orthogonal to all, itself included.

    Source: Passalis and Tefas, ECCV 2018, arXiv:1803.10837, the conditional probabilities with the cosine kernel, as
    in the authors' code, which RepDistiller took over.
    """
    similarity = (gram_matrix(unit_vectors(at_least_float32(embeddings))) + 1) / 2
    return similarity / similarity.sum(dim=1, keepdim=True)


def neighbour_divergence(student_embedding: Tensor, teacher_embedding: Tensor) -> Tensor:
    r"""Divergence of the student's neighbours from the teacher's.

    .. math:: \frac{1}{B^2} \sum_{i,j} p_{t,ij} \log \frac{p_{t,ij} + \epsilon}{p_{s,ij} + \epsilon},
        \quad \epsilon = 10^{-7}

    Args:
        student_embedding: ``[B, D_s]``; gradients flow.
        teacher_embedding: ``[B, D_t]``; a constant.

    Returns:
        A scalar, nats divided by B, float32 (float64 from float64 embeddings); 0 at agreement. Lengths of the
        embeddings and rotations change nothing.

    Raises:
        InputError: the embeddings are not ``[B, D]`` of the same examples.

    Source: Passalis and Tefas, ECCV 2018, arXiv:1803.10837; the mean over all pairs as in the authors' code, whence the
    division by B once more than in a mean of divergences.
    """
    check_vectors(student_embedding, teacher_embedding)
    student = neighbour_probabilities(student_embedding)
    teacher = neighbour_probabilities(teacher_embedding.detach())
    return (teacher * ((teacher + EPSILON).log() - (student + EPSILON).log())).mean()


class PKTConfig(FeatureConfig):
    """Settings of :class:`PKT`."""

    default_taps = "pooled"

    def build(self, task: Task) -> PKT:
        """Return the objective for the task's networks, of any dimensions."""
        return PKT(self.pairs(task))


@final
class PKT(Objective[DistillStep]):
    """Match the teacher's neighbours within the batch; see :func:`neighbour_divergence`."""

    name = "pkt"

    def __init__(self, pairs: Sequence[TapPair]) -> None:
        super().__init__()
        self.features = tuple(pair.student for pair in pairs)
        self.teacher_features = tuple(pair.teacher for pair in pairs)

    def forward(self, step: DistillStep) -> Tensor:
        """Return the divergence of the batch, summed over the pairs of taps."""
        losses = [
            neighbour_divergence(as_vectors(step.outputs.features[tap]), as_vectors(step.teacher.features[teacher_tap]))
            for tap, teacher_tap in zip(self.features, self.teacher_features, strict=True)
        ]
        return torch.stack(losses).sum()


METHOD = Method(
    name="pkt",
    role="student",
    title="Probabilistic knowledge transfer: images have the same neighbours as for the teacher",
    venue="ECCV 2018",
    source="Passalis and Tefas, ECCV 2018, arXiv:1803.10837; weight of RepDistiller's benchmark",
    terms={"cross_entropy": {"weight": 1.0}, "pkt": {"weight": 30000.0}},
)
