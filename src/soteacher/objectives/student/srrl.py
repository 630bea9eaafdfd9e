"""Softmax regression representation learning: the student's pooled feature, read by the teacher's classifier."""

from __future__ import annotations

from typing import ClassVar, final

import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from soteacher.errors import InputError
from soteacher.objective import Method, Objective, ObjectiveConfig
from soteacher.objectives.connectors import MapConnector
from soteacher.objectives.features import as_maps, as_vectors, facts_of, map_shape, teacher_parts, vector_shape
from soteacher.precision import at_least_float32, full_precision
from soteacher.types import DistillStep, Task


def pooled_feature_distance(student_vectors: Tensor, teacher_vectors: Tensor) -> Tensor:
    r"""Mean squared distance of the connected student's pooled feature from the teacher's, one value per example.

    .. math:: \frac{1}{D} \left\| h_t - r(h_s) \right\|^2

    Args:
        student_vectors: :math:`r(h_s)`, ``[B, D]``; gradients flow.
        teacher_vectors: :math:`h_t`, ``[B, D]``; a constant.

    Returns:
        ``[B]``, float32 (float64 from float64 vectors); 0 where the two agree.

    Raises:
        InputError: the shapes differ or are not ``[B, D]``.

    Source: Yang et al., ICLR 2021, feature matching, with the mean over channels of the authors' code.
    """
    if student_vectors.ndim != 2 or student_vectors.shape != teacher_vectors.shape:
        raise InputError(
            f"student and teacher vectors must have one shape [B, D], got {list(student_vectors.shape)} (student) and "
            f"{list(teacher_vectors.shape)} (teacher)"
        )
    return (at_least_float32(student_vectors) - at_least_float32(teacher_vectors.detach())).square().mean(dim=1)


def softmax_regression_distance(
    student_vectors: Tensor, teacher_logits: Tensor, weight: Tensor, bias: Tensor | None = None
) -> Tensor:
    r"""Mean squared distance of the teacher's logits from what its classifier makes of the student's feature.

    .. math:: \frac{1}{K} \left\| z_t - (W_t \, r(h_s) + b_t) \right\|^2

    Args:
        student_vectors: :math:`r(h_s)`, ``[B, D]``; gradients flow.
        teacher_logits: :math:`z_t`, ``[B, K]``; a constant.
        weight: :math:`W_t`, ``[K, D]`` of the teacher's classifier; a constant.
        bias: :math:`b_t`, ``[K]``; none: zeros.

    Returns:
        ``[B]``, float32 (float64 from float64 vectors); 0 where the two agree.

    Raises:
        InputError: the shapes do not fit together.

    Source: Yang et al., ICLR 2021, softmax regression, as the squared distance of logits that the authors' code takes.
    """
    wanted = (len(teacher_logits), weight.shape[-1])
    if teacher_logits.ndim != 2 or tuple(student_vectors.shape) != wanted or len(weight) != teacher_logits.shape[1]:
        raise InputError(
            f"wanted vectors [B, D], logits [B, K] and a classifier [K, D], got {list(student_vectors.shape)}, "
            f"{list(teacher_logits.shape)} and {list(weight.shape)}"
        )
    vectors = at_least_float32(student_vectors)
    constant = None if bias is None else bias.detach().to(vectors.dtype)
    with full_precision(vectors):
        logits = F.linear(vectors, weight.detach().to(vectors.dtype), constant)
    return (logits - at_least_float32(teacher_logits.detach())).square().mean(dim=1)


class SRRLConfig(ObjectiveConfig):
    """Settings of :class:`SRRL`."""

    reads: ClassVar[str] = "the student's `maps`, or `pooled` where it has none, and the teacher's `pooled`"
    needs_teacher: ClassVar[bool] = True
    matching_weight: float = Field(default=1.0, gt=0)
    """Factor of the distance of the pooled features."""
    regression_weight: float = Field(default=1.0, gt=0)
    """Factor of the distance of the logits that the teacher's classifier makes of them."""

    def build(self, task: Task) -> SRRL:
        """Return the objective with a connector from the student's last maps to the teacher's channels.

        Raises:
            InputError: a network has no feature ``pooled``.
        """
        student, teacher = facts_of(task)
        # A convolutional teacher's pooled feature is of rectified maps; a transformer's is not.
        rectify = "maps" in list(teacher.taps)
        student_tap = "maps" if "maps" in list(student.taps) else "pooled"
        channels, *size = map_shape(student, student_tap)
        connector = MapConnector(channels, vector_shape(teacher, "pooled")[0], (size[0], size[1]), rectify=rectify)
        return SRRL(self, student_tap=student_tap, connector=connector)


@final
class SRRL(Objective[DistillStep]):
    """Match the teacher's pooled feature, and the logits that the teacher's classifier makes of it.

    The student's last maps go through a 1x1 convolution with batch normalisation and, for a teacher with maps, a
    rectifier, and are averaged (a student without maps: its pooled vector takes their place). See
    :func:`pooled_feature_distance` and :func:`softmax_regression_distance`. The student keeps its own classifier:
    nothing of the teacher is in its file.
    """

    name = "srrl"

    def __init__(self, config: SRRLConfig, *, student_tap: str, connector: MapConnector) -> None:
        super().__init__()
        self.config = config
        self.features = (student_tap,)
        self.teacher_features = ("pooled",)
        self.connector = connector

    def forward(self, step: DistillStep) -> Tensor:
        """Return the mean of both distances over the batch, each times its factor."""
        maps, classifier = as_maps(step.outputs.features[self.features[0]]), teacher_parts(step).classifier
        with full_precision(maps):
            vectors = as_vectors(self.connector(maps))
        matching = pooled_feature_distance(vectors, step.teacher.features["pooled"])
        regression = softmax_regression_distance(vectors, step.teacher.logits, classifier.weight, classifier.bias)
        return (self.config.matching_weight * matching + self.config.regression_weight * regression).mean()


METHOD = Method(
    name="srrl",
    role="student",
    title="Labels, the teacher's pooled feature, and what its classifier makes of the student's",
    venue="ICLR 2021",
    source="Yang, Martinez, Bulat and Tzimiropoulos, ICLR 2021 (OpenReview ZzwDy_wiWv)",
    differs=(
        "The weights, 1 each, are those of the authors' ImageNet code; what they took for CIFAR was not checked. Where "
        "a network has no last maps (transformers), its pooled vector takes their place. As published, the student "
        "keeps its own classifier: connector and teacher are gone after the training."
    ),
    terms={"cross_entropy": {"weight": 1.0}, "srrl": {"weight": 1.0}},
)
