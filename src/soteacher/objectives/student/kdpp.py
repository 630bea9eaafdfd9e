"""KD++: the student's features point to the teacher's class means, and are no shorter than the teacher's."""

from __future__ import annotations

from typing import final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from soteacher.errors import InputError
from soteacher.objective import Method, Objective
from soteacher.objectives.connectors import BatchNormalization
from soteacher.objectives.features import FeatureConfig, TapPair
from soteacher.objectives.pooled import pair_vectors, vector_pair
from soteacher.precision import at_least_float32, full_precision
from soteacher.types import DistillStep, Task

EPSILON = 1e-8
"""Added to squared lengths, whose root has no gradient at 0."""


def norm_direction_gap(student: Tensor, teacher: Tensor, centers: Tensor) -> Tensor:
    r"""What a feature lacks of the teacher's length in the direction of its class, one value per example.

    .. math:: 1 - \frac{\langle f_s, c / \lVert c \rVert \rangle}{\max(\lVert f_s \rVert, \lVert f_t \rVert)}

    Args:
        student: ``[B, D]``; gradients flow.
        teacher: ``[B, D]``; a constant.
        centers: ``[B, D]`` the teacher's mean feature in each example's class; a constant.

    Returns:
        ``[B]`` in [0, 2]; 0 where the student points to the center and is at least as long as the teacher.

    Raises:
        InputError: the shapes differ or are not ``[B, D]``.

    Source: Wang et al., ECCV 2024, arXiv:2305.17007, the ND loss, as released.
    """
    if student.ndim != 2 or not student.shape == teacher.shape == centers.shape:
        raise InputError(
            "student, teacher and centers must have one shape [B, D], got "
            f"{list(student.shape)}, {list(teacher.shape)} and {list(centers.shape)}"
        )
    student, teacher = at_least_float32(student), at_least_float32(teacher.detach())
    along = (student * F.normalize(at_least_float32(centers.detach()), dim=1)).sum(dim=1)
    length = torch.maximum(student.square().sum(dim=1), teacher.square().sum(dim=1))
    return 1 - along * (length + EPSILON).rsqrt()


def class_means(features: Tensor, labels: Tensor, *, num_classes: int) -> tuple[Tensor, Tensor]:
    """Mean feature of each class in a batch, and the number of its examples.

    Args:
        features: ``[B, D]``.
        labels: ``[B]`` class ids.
        num_classes: K.

    Returns:
        Means ``[K, D]``, 0 for classes without examples, and counts ``[K]`` of the means' type.

    Raises:
        InputError: the shapes do not fit.
    """
    if features.ndim != 2 or labels.shape != features.shape[:1]:
        raise InputError(f"wanted features [B, D] and labels [B], got {list(features.shape)} and {list(labels.shape)}")
    features = at_least_float32(features)
    # A product with indicators: sums by index are not the same in every run on a GPU.
    members = F.one_hot(labels, num_classes).to(features.dtype)
    counts = members.sum(dim=0)
    with full_precision(features):
        return members.T @ features / counts.clamp(min=1).unsqueeze(1), counts


class KDPPConfig(FeatureConfig):
    """Settings of :class:`KDPP`."""

    default_taps = "pooled"

    def build(self, task: Task) -> KDPP:
        """Return the objective; no class has a mean yet."""
        return KDPP(vector_pair(self, task, "kdpp"), task.num_classes)


@final
class KDPP(Objective[DistillStep]):
    """Point to the teacher's class means, with at least its length; see :func:`norm_direction_gap`.

    The class means are those of all the teacher's features so far; a class without any has the batch's own.
    """

    name = "kdpp"
    means: Tensor
    """``[K, D]`` the teacher's mean feature of each class."""
    counts: Tensor
    """``[K]`` how many features each mean holds."""

    def __init__(self, pair: TapPair, num_classes: int) -> None:
        super().__init__()
        self.pair = pair
        self.features, self.teacher_features = (pair.student,), (pair.teacher,)
        student, teacher = pair.student_shape[0], pair.teacher_shape[0]
        self.embedding = nn.Identity()
        if student != teacher:
            self.embedding = nn.Sequential(BatchNormalization(student), nn.Linear(student, teacher))
        self.register_buffer("means", torch.zeros(num_classes, teacher))
        self.register_buffer("counts", torch.zeros(num_classes, dtype=torch.int64))

    def forward(self, step: DistillStep) -> Tensor:
        """Return the mean gap of the batch."""
        student, teacher = pair_vectors(step, self.pair)
        own, _ = class_means(teacher, step.labels, num_classes=len(self.counts))
        means = torch.where((self.counts > 0).unsqueeze(1), self.means, own)
        with full_precision(student):
            embedded: Tensor = self.embedding(student)
        return norm_direction_gap(embedded, teacher, means[step.labels]).mean()

    @torch.no_grad()
    def update(self, step: DistillStep) -> None:
        """Take the teacher's features into the means of their classes."""
        teacher = pair_vectors(step, self.pair)[1]
        means, counts = class_means(teacher, step.labels, num_classes=len(self.counts))
        self.counts += counts.to(self.counts.dtype)
        share = counts / self.counts.clamp(min=1)
        self.means += share.unsqueeze(1) * (means - self.means)


METHOD = Method(
    name="kdpp",
    role="student",
    title="KD++: features that point to the teacher's class means and are as long as the teacher's",
    venue="ECCV 2024",
    source="Wang, Cheng, Duan, Wang, Feng and Kong, ECCV 2024, arXiv:2305.17007; weights of the released example",
    differs=(
        "The teacher's class means are running ones over the training so far, augmentation included; the authors "
        "compute them beforehand over the training set. The embedding of students of another size has no dropout. The "
        "weights are those for resnet56 and resnet20; for other pairs the authors take 1 to 4 (kd) and 0.5 to 2 (kdpp)."
    ),
    terms={
        "cross_entropy": {"weight": 1.0},
        "kd": {"weight": 1.0, "temperature": 4.0, "ramp": "warmup"},
        "kdpp": {"weight": 2.0},
    },
)
