"""Relational distillation: distances and angles between the images of a batch are as for the teacher."""

from __future__ import annotations

from collections.abc import Sequence
from typing import final

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor

from soteacher.errors import InputError
from soteacher.objective import Method, Objective
from soteacher.objectives.features import FeatureConfig, TapPair, as_vectors
from soteacher.objectives.gram import gram_matrix
from soteacher.objectives.shapes import check_vectors
from soteacher.precision import at_least_float32
from soteacher.types import DistillStep, Task

LEAST_DISTANCE = 1e-12
"""Two examples that are nearer to each other than this are equal, and there is no direction from one to the other."""


def relative_distances(embeddings: Tensor) -> Tensor:
    r"""Euclidean distances of all pairs of examples, in units of their mean.

    .. math:: \| e_i - e_j \|_2 / m

    with :math:`m` the mean of the distances that are not 0.

    Args:
        embeddings: ``[B, D]``; gradients flow.

    Returns:
        ``[B, B]``, float32 (float64 from float64 embeddings); zeros where all examples are equal.

    Source: Park et al., CVPR 2019, arXiv:1904.05068, equations 6 and 7 (numbers of equations in this file are from
    memory of the paper, not checked).
    """
    return _relative(_distances(embeddings))


def _distances(embeddings: Tensor) -> Tensor:
    # The form by scalar products would round: 0 for equal examples is wanted, and a gradient of 0 there.
    embeddings = at_least_float32(embeddings)
    return torch.cdist(embeddings, embeddings, compute_mode="donot_use_mm_for_euclid_dist")


def _relative(distances: Tensor) -> Tensor:
    mean = distances.sum() / (distances > 0).sum().clamp(min=1)
    return distances / mean.where(mean > 0, 1.0)


def triplet_angles(embeddings: Tensor) -> Tensor:
    r"""Cosines of the angles that all pairs of examples form at every third one.

    .. math:: \cos \angle(j, i, k) = \frac{(e_j - e_i) \cdot (e_k - e_i)}{\|e_j - e_i\|_2 \, \|e_k - e_i\|_2}

    Args:
        embeddings: ``[B, D]``; gradients flow.

    Returns:
        ``[B, B, B]``, indexed ``[i, j, k]``; float32 (float64 from float64 embeddings); 0 where two of the examples are
        equal and there is no angle.

    Source: Park et al., CVPR 2019, arXiv:1904.05068, equation 9.
    """
    return _angles(embeddings, _distances(embeddings))


def _angles(embeddings: Tensor, distances: Tensor) -> Tensor:
    # Scalar products of differences, from those of the embeddings: that needs no [B, B, D], but cancels for examples
    # close by. In double precision, around the batch's centre, less is lost than by the rounding of single-precision
    # embeddings themselves: a cosine is off by 1e-16 times the square of (distance from the centre / distance).
    wide = embeddings.double()
    products = gram_matrix(wide - wide.detach().mean(dim=0))
    halved = products - products.diagonal()[:, None] / 2  # [i, j]: e_i e_j - e_i e_i / 2
    products = ((products - halved[:, :, None]) - halved[:, None, :]).to(distances.dtype)
    inverse = distances.where(distances > LEAST_DISTANCE, torch.inf).reciprocal()
    return products * inverse[:, :, None] * inverse[:, None, :]


def relational_distance(
    student_embedding: Tensor, teacher_embedding: Tensor, *, distance_weight: float, angle_weight: float
) -> Tensor:
    r"""How far the student's distances and angles within the batch are from the teacher's.

    .. math:: w_D \, \overline{h(d_s - d_t)} + w_A \, \overline{h(a_s - a_t)}

    with :func:`relative_distances` :math:`d`, :func:`triplet_angles` :math:`a`, means over all pairs and triplets, and
    Huber's :math:`h(x) = x^2 / 2` up to 1 and :math:`|x| - 1/2` beyond.

    Args:
        student_embedding: ``[B, D_s]``; gradients flow.
        teacher_embedding: ``[B, D_t]``; a constant.
        distance_weight: :math:`w_D \ge 0`; where it is 0 the distances are not compared.
        angle_weight: :math:`w_A \ge 0`; where it is 0 the angles, which cost :math:`B^3`, are not computed.

    Returns:
        A scalar, float32 (float64 from float64 embeddings); 0 at agreement. Shifts, rotations and a factor of all
        embeddings change nothing.

    Raises:
        InputError: the embeddings are not ``[B, D]`` of the same examples, or no weight is positive.

    Source: Park et al., CVPR 2019, arXiv:1904.05068, equations 4, 8 and 10. RepDistiller's code takes 1e-6 for
    the distance of two equal examples; ours is 0.
    """
    check_vectors(student_embedding, teacher_embedding)
    if min(distance_weight, angle_weight) < 0 or not max(distance_weight, angle_weight) > 0:
        raise InputError(f"weights must be 0 or more, one of them more: got {distance_weight} and {angle_weight}")
    embeddings = student_embedding, teacher_embedding.detach()
    distances = _distances(embeddings[0]), _distances(embeddings[1])
    losses: list[Tensor] = []
    if distance_weight > 0:
        losses.append(distance_weight * F.smooth_l1_loss(_relative(distances[0]), _relative(distances[1])))
    if angle_weight > 0:
        angles = _angles(embeddings[0], distances[0]), _angles(embeddings[1], distances[1])
        losses.append(angle_weight * F.smooth_l1_loss(*angles))
    return torch.stack(losses).sum()


class RKDConfig(FeatureConfig):
    """Settings of :class:`RKD`."""

    default_taps = "pooled"
    distance_weight: float = Field(default=25.0, ge=0)
    """Factor of the distances of pairs; 0 leaves them out."""
    angle_weight: float = Field(default=50.0, ge=0)
    """Factor of the angles of triplets; 0 leaves them out."""

    @model_validator(mode="after")
    def _compares_something(self) -> RKDConfig:
        if self.distance_weight == self.angle_weight == 0:
            raise InputError("distance_weight and angle_weight are both 0, and nothing would be compared")
        return self

    def build(self, task: Task) -> RKD:
        """Return the objective for the task's networks, of any dimensions."""
        return RKD(self, self.pairs(task))


@final
class RKD(Objective[DistillStep]):
    """Match the teacher's distances and angles within the batch; see :func:`relational_distance`."""

    name = "rkd"

    def __init__(self, config: RKDConfig, pairs: Sequence[TapPair]) -> None:
        super().__init__()
        self.config = config
        self.features = tuple(pair.student for pair in pairs)
        self.teacher_features = tuple(pair.teacher for pair in pairs)

    def forward(self, step: DistillStep) -> Tensor:
        """Return the distance of the batch, summed over the pairs of taps."""
        losses = [
            relational_distance(
                as_vectors(step.outputs.features[tap]),
                as_vectors(step.teacher.features[teacher_tap]),
                distance_weight=self.config.distance_weight,
                angle_weight=self.config.angle_weight,
            )
            for tap, teacher_tap in zip(self.features, self.teacher_features, strict=True)
        ]
        return torch.stack(losses).sum()


METHOD = Method(
    name="rkd",
    role="student",
    title="Relational distillation: distances and angles between images are as for the teacher",
    venue="CVPR 2019",
    source="Park, Kim, Lu and Cho, CVPR 2019, arXiv:1904.05068; weights of RepDistiller's benchmark",
    differs="Two equal embeddings have distance 0 and no gradient, where the released code takes a distance of 1e-6.",
    terms={"cross_entropy": {"weight": 1.0}, "rkd": {"weight": 1.0, "distance_weight": 25.0, "angle_weight": 50.0}},
)
