"""Singular vectors: how the main directions of neighbouring stages go together is as in the teacher."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import final

import torch
from pydantic import Field
from torch import Tensor

from soteacher.errors import InputError
from soteacher.objective import Method, Objective
from soteacher.objectives.features import FeatureConfig, TapPair, mismatch, student_maps, teacher_maps
from soteacher.objectives.unit_vectors import unit_vectors
from soteacher.precision import at_least_float32, full_precision
from soteacher.types import DistillStep, Task

SPARE_VECTORS = 3
"""The student's vectors beyond the teacher's, among which the ones to compare are chosen."""
LEAST_GAP = 1e-4
"""Eigenvalues nearer than this, in units of the largest, count as one in the gradient."""
RADIUS_SQUARED = 4.0
"""The square of the radial basis function's width."""


def singular_vectors(maps: Tensor, *, num_vectors: int) -> tuple[Tensor, Tensor]:
    r"""Return the largest singular values of each example's maps, and the singular vectors over the channels.

    For :math:`M` with a row for each pixel and a column for each channel, and :math:`M = U \Sigma V^\top`: the first
    columns of :math:`V`, from the eigenvectors of the smaller one of :math:`M^\top M` and :math:`M M^\top`.

    Args:
        maps: ``[B, C, H, W]``; gradients flow to the vectors only.
        num_vectors: n, from 1 to the smaller one of C and H * W.

    Returns:
        Singular values ``[B, n]`` from the largest down, a constant, and vectors ``[B, C, n]`` of length 1, whose
        largest entry is positive; float32 (float64 from float64 maps). Singular values below 3e-4 of the largest drown
        in rounding in float32. The gradient takes eigenvalues nearer than 1e-4 of the largest as equal, where it would
        have no bound.

    Raises:
        InputError: the argument is not maps, or they have fewer singular vectors.

    Source: Lee, Kim and Song, ECCV 2018, arXiv:1807.06819, in the form of RepDistiller's KDSVD; the gradient is the
    first-order change of eigenvectors,
    :math:`dv_i = \sum_{j \ne i} v_j (v_j^\top dA \, v_i) / (\lambda_i - \lambda_j)`.
    """
    if maps.ndim != 4 or not 1 <= num_vectors <= min(maps.shape[1], maps.shape[2] * maps.shape[3]):
        raise InputError(f"wanted maps [B, C, H, W] with {num_vectors} or more of C and H * W, got {list(maps.shape)}")
    by_channel = at_least_float32(maps).flatten(2)
    few_pixels = by_channel.shape[2] < by_channel.shape[1]
    with full_precision(by_channel):
        gram = by_channel.mT @ by_channel if few_pixels else by_channel @ by_channel.mT
        values, vectors = _leading_eigenvectors(gram, num_vectors)
        vectors = unit_vectors(by_channel @ vectors, dim=1) if few_pixels else vectors
    return values.clamp(min=0).sqrt(), _oriented(vectors)


def _oriented(vectors: Tensor) -> Tensor:
    """Return vectors ``[B, C, n]`` with the sign that makes the largest entry positive."""
    largest = vectors.detach().abs().argmax(dim=1, keepdim=True)
    return vectors.where(vectors.detach().take_along_dim(largest, dim=1) >= 0, -vectors)


def _leading_eigenvectors(gram: Tensor, num_vectors: int) -> tuple[Tensor, Tensor]:
    """Return eigenvalues ``[B, n]`` and eigenvectors ``[B, N, n]`` of symmetric matrices, the largest first."""
    constant = gram.detach()
    # What is not a number passes through the last line, to where the loop finds it.
    values, basis = torch.linalg.eigh(constant.nan_to_num(posinf=0.0, neginf=0.0))
    leading_values, leading = values[:, -num_vectors:].flip(1), basis[:, :, -num_vectors:].flip(2)
    scale = leading_values[:, :1, None].where(leading_values[:, :1, None] > 0, 1.0)
    gaps = (leading_values[:, None, :] - values[:, :, None]) / scale
    inverse_gaps = gaps / (gaps.square() + LEAST_GAP**2)
    # The change is 0 in value and carries the gradient.
    change = basis.mT @ (((gram - constant) / scale) @ leading)
    return leading_values, leading + basis @ (change * inverse_gaps)


def aligned_vectors(student_vectors: Tensor, teacher_vectors: Tensor) -> Tensor:
    """Return, for each of the teacher's vectors, the student's nearest one in direction, with the same sign.

    Args:
        student_vectors: ``[B, C, m]``; gradients flow.
        teacher_vectors: ``[B, C, n]``; a constant.

    Returns:
        ``[B, C, n]``; one of the student's vectors may stand more than once.

    Raises:
        InputError: the vectors are not of the same examples and channels.

    Source: Lee, Kim and Song, ECCV 2018, arXiv:1807.06819, as in the authors' code.
    """
    if student_vectors.ndim != 3 or student_vectors.shape[:2] != teacher_vectors.shape[:2]:
        raise InputError(
            f"vectors must be [B, C, n] with one B and C, got {list(student_vectors.shape)} (student) and "
            f"{list(teacher_vectors.shape)} (teacher)"
        )
    with full_precision(student_vectors):
        cosines = student_vectors.detach().mT @ teacher_vectors.detach()
    nearest = cosines.abs().argmax(dim=1, keepdim=True)
    flip = cosines.take_along_dim(nearest, dim=1) < 0
    chosen = student_vectors.take_along_dim(nearest, dim=2)
    return chosen.where(~flip, -chosen)


def singular_vector_distance(
    student_maps: Sequence[Tensor], teacher_maps: Sequence[Tensor], *, num_vectors: int
) -> Tensor:
    r"""Squared distance of how the singular vectors of neighbouring layers go together, one value per example.

    .. math:: \sum_l \sum_{i,j,k} \left( \rho(v_{s,ik}^l, v_{s,jk}^{l+1}) - \rho(v_{t,ik}^l, v_{t,jk}^{l+1}) \right)^2,
        \quad \rho(a, b) = \exp \frac{-(a - b)^2}{8}

    Both sides' vectors are weighted by the teacher's singular values, which are first scaled to a vector of length 1.

    Args:
        student_maps: two or more layers from shallow to deep, each ``[B, C_l, H, W]``; gradients flow.
        teacher_maps: as many layers with the same channels, of any heights and widths; constants.
        num_vectors: k, at least 1; fewer are compared where some maps have fewer channels or pixels.

    Returns:
        ``[B]``, float32 (float64 from float64 maps); 0 where the two agree.

    Raises:
        InputError: other numbers of layers or channels, or ``num_vectors`` below 1.

    Source: Lee, Kim and Song, ECCV 2018, arXiv:1807.06819; constants and scalings as in RepDistiller's KDSVD.
    """
    students, teachers = [maps.shape[:2] for maps in student_maps], [maps.shape[:2] for maps in teacher_maps]
    if len(students) < 2 or students != teachers or num_vectors < 1:
        raise InputError(
            f"num_vectors of 1 or more and two or more layers with the same [B, C] are wanted, got {num_vectors}, "
            f"{[list(shape) for shape in students]} (student) and {[list(shape) for shape in teachers]} (teacher)"
        )
    num_vectors = min(num_vectors, *(_most_vectors(maps) for maps in [*student_maps, *teacher_maps]))
    directions = [_directions(s, t.detach(), num_vectors) for s, t in zip(student_maps, teacher_maps, strict=True)]
    distances = [
        (_relation(lower[0], upper[0]) - _relation(lower[1], upper[1])).square().sum(dim=(1, 2, 3))
        for lower, upper in pairwise(directions)
    ]
    return torch.stack(distances).sum(dim=0)


def _most_vectors(maps: Tensor) -> int:
    return min(maps.shape[1], maps.shape[2:].numel())


def _directions(student_maps: Tensor, teacher_maps: Tensor, num_vectors: int) -> tuple[Tensor, Tensor]:
    """Return the weighted vectors of student and teacher, each ``[B, C, n]``."""
    values, teacher_vectors = singular_vectors(teacher_maps, num_vectors=num_vectors)
    num_candidates = min(num_vectors + SPARE_VECTORS, _most_vectors(student_maps))
    _, candidates = singular_vectors(student_maps, num_vectors=num_candidates)
    weights = unit_vectors(values)[:, None]
    return aligned_vectors(candidates, teacher_vectors) * weights, teacher_vectors * weights


def _relation(lower: Tensor, upper: Tensor) -> Tensor:
    """Return the radial basis function of all pairs of channels: ``[B, C, D, n]``."""
    return (-(lower[:, :, None] - upper[:, None]).square() / (2 * RADIUS_SQUARED)).exp()


class KDSVDConfig(FeatureConfig):
    """Settings of :class:`KDSVD`."""

    num_vectors: int = Field(default=1, ge=1)
    """Singular vectors that are compared in each stage."""

    def build(self, task: Task) -> KDSVD:
        """Return the objective.

        Raises:
            InputError: a stage of the student has other channels than the teacher's, or there is one stage only.
        """
        pairs = self.pairs(task)
        for pair in pairs:
            if len(pairs) < 2 or pair.student_shape[0] != pair.teacher_shape[0]:
                raise mismatch(
                    "kdsvd",
                    task,
                    pair,
                    "two or more taps of equal channels are wanted, as of wrn_40_2 and wrn_16_2: set student_taps and "
                    "teacher_taps or take another method",
                )
        return KDSVD(self, pairs)


@final
class KDSVD(Objective[DistillStep]):
    """Match the teacher's relations of neighbouring stages; see :func:`singular_vector_distance`."""

    name = "kdsvd"

    def __init__(self, config: KDSVDConfig, pairs: Sequence[TapPair]) -> None:
        super().__init__()
        self.config = config
        self.pairs = tuple(pairs)
        self.features = tuple(pair.student for pair in pairs)
        self.teacher_features = tuple(pair.teacher for pair in pairs)

    def forward(self, step: DistillStep) -> Tensor:
        """Return the mean distance of the batch."""
        students, teachers = student_maps(step, self.pairs), teacher_maps(step, self.pairs)
        return singular_vector_distance(students, teachers, num_vectors=self.config.num_vectors).mean()


METHOD = Method(
    name="kdsvd",
    role="student",
    title="Singular vectors: main directions of neighbouring stages go together as in the teacher",
    venue="ECCV 2018",
    source="Lee, Kim and Song, ECCV 2018, arXiv:1807.06819; loss and settings of RepDistiller's KDSVD, weight 1",
    differs=(
        "The vectors come from an eigendecomposition of the smaller Gram matrix, with a gradient that is bounded where "
        "singular values meet; the released codes decompose the maps and drop what is not finite. The teacher's "
        "vectors have the sign that makes their largest entry positive; the released codes take the sign that comes, "
        "on which the loss depends."
    ),
    terms={"cross_entropy": {"weight": 1.0}, "kdsvd": {"weight": 1.0, "num_vectors": 1}},
)
