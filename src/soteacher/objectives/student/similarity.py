"""Similarity preservation: images that are alike for the teacher are alike for the student."""

from __future__ import annotations

from collections.abc import Sequence
from typing import final

import torch
from torch import Tensor

from soteacher.errors import InputError
from soteacher.objective import Method, Objective
from soteacher.objectives.example_rows import example_rows
from soteacher.objectives.features import FeatureConfig, TapPair, student_maps, teacher_maps
from soteacher.objectives.gram import gram_matrix
from soteacher.objectives.unit_vectors import unit_vectors
from soteacher.precision import at_least_float32
from soteacher.types import DistillStep, Task


def batch_similarity(features: Tensor) -> Tensor:
    r"""Scalar products of all pairs of examples, with rows of length 1.

    .. math:: G_{ij} = \frac{f_i \cdot f_j}{\sqrt{\sum_k (f_i \cdot f_k)^2}}

    Args:
        features: ``[B, ...]``, flattened for each example; gradients flow.

    Returns:
        ``[B, B]``, float32 (float64 from float64 features); a row of zeros where an example's features are 0.

    Source: Tung and Mori, ICCV 2019, arXiv:1907.09682, equations 1 to 3 (from memory of the paper, not checked);
    the loss is that of RepDistiller's code.
    """
    return unit_vectors(gram_matrix(example_rows(at_least_float32(features))))


def similarity_distance(student_features: Tensor, teacher_features: Tensor) -> Tensor:
    r"""Mean squared distance of the similarities of all pairs of examples.

    .. math:: \frac{1}{B^2} \| G_s - G_t \|_F^2

    Args:
        student_features: ``[B, ...]``; gradients flow.
        teacher_features: ``[B, ...]``, of any other shape; a constant.

    Returns:
        A scalar, float32 (float64 from float64 features); 0 at agreement. A factor of all features and rotations of the
        feature space change nothing.

    Raises:
        InputError: the features are not of the same examples.

    Source: Tung and Mori, ICCV 2019, arXiv:1907.09682.
    """
    if student_features.ndim < 2 or teacher_features.ndim < 2 or len(student_features) != len(teacher_features):
        raise InputError(
            f"features of student and teacher must be [B, ...] with one B, got {list(student_features.shape)} "
            f"(student) and {list(teacher_features.shape)} (teacher)"
        )
    return (batch_similarity(student_features) - batch_similarity(teacher_features.detach())).square().mean()


class SimilarityConfig(FeatureConfig):
    """Settings of :class:`Similarity`."""

    default_taps = "last_stage"

    def build(self, task: Task) -> Similarity:
        """Return the objective for the task's networks, of any channels and sizes."""
        return Similarity(self.pairs(task))


@final
class Similarity(Objective[DistillStep]):
    """Match the teacher's similarities within the batch in the last stage; see :func:`similarity_distance`."""

    name = "similarity"

    def __init__(self, pairs: Sequence[TapPair]) -> None:
        super().__init__()
        self.pairs = tuple(pairs)
        self.features = tuple(pair.student for pair in pairs)
        self.teacher_features = tuple(pair.teacher for pair in pairs)

    def forward(self, step: DistillStep) -> Tensor:
        """Return the distance of the batch, summed over the pairs of taps."""
        both = zip(student_maps(step, self.pairs), teacher_maps(step, self.pairs), strict=True)
        return torch.stack([similarity_distance(student, teacher) for student, teacher in both]).sum()


METHOD = Method(
    name="similarity",
    role="student",
    title="Similarity-preserving distillation: pairs of images are as alike as for the teacher",
    venue="ICCV 2019",
    source="Tung and Mori, ICCV 2019, arXiv:1907.09682; weight of RepDistiller's benchmark",
    terms={"cross_entropy": {"weight": 1.0}, "similarity": {"weight": 3000.0}},
)
