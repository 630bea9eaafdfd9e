"""Function-consistent feature distillation: features are alike if later layers make the same of them."""

from __future__ import annotations

from typing import final

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from soteacher.errors import InputError
from soteacher.objective import Method, Objective, Ramp, ramp_factor
from soteacher.objectives.connectors import BatchNormalization
from soteacher.objectives.features import (
    FeatureConfig,
    TapPair,
    facts_of,
    map_shape,
    own_generator,
    resize,
    student_maps,
    student_parts,
    teacher_maps,
    teacher_parts,
)
from soteacher.objectives.student.kd import kd_divergence
from soteacher.precision import full_precision
from soteacher.types import DistillStep, NetworkFacts, Task


def appearance_distance(bridged: Tensor, teacher_maps: Tensor, *, pooled: bool = False) -> Tensor:
    r"""Mean squared distance of bridged maps from the teacher's, one value per example.

    .. math::

        \frac{1}{C H W} \left\| B(F_s) - F_t \right\|^2
        \; \left[ + \frac{1}{C} \left\| \bar B - \bar F_t \right\|^2 \right]

    where :math:`\bar B` and :math:`\bar F_t` are the averages of the rectified maps over their pixels.

    Args:
        bridged: :math:`B(F_s)`, ``[B, C, H, W]``; gradients flow.
        teacher_maps: :math:`F_t`, of the same shape; a constant.
        pooled: whether the second part is added, as it is at the last stage.

    Returns:
        ``[B]``; 0 where the two agree.

    Raises:
        InputError: the shapes differ or are not ``[B, C, H, W]``.

    Source: Liu et al., ICLR 2023, arXiv:2304.11832, the appearance term; its second part is from the authors' code.
    """
    if bridged.ndim != 4 or bridged.shape != teacher_maps.shape:
        raise InputError(
            f"bridged and teacher's maps must have one shape [B, C, H, W], got {list(bridged.shape)} (bridged) and "
            f"{list(teacher_maps.shape)} (teacher)"
        )
    target = teacher_maps.detach()
    distance = (bridged - target).square().mean(dim=(1, 2, 3))
    if pooled:
        difference = F.relu(bridged).mean(dim=(2, 3)) - F.relu(target).mean(dim=(2, 3))
        distance = distance + difference.square().mean(dim=1)
    return distance


@final
class Bridge(nn.Module):
    """Maps of one network to a feature that another one can go on from: resized, 3x3 convolution, normalised.

    Args:
        in_channels: C of ``[B, C, H, W]``.
        shape: ``(C, H, W)`` of the other network's maps.
    """

    def __init__(self, in_channels: int, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.size = (shape[1], shape[2])
        self.convolution = nn.Conv2d(in_channels, shape[0], 3, padding=1, bias=False)
        self.normalization = BatchNormalization(shape[0])
        nn.init.kaiming_normal_(self.convolution.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, maps: Tensor) -> Tensor:
        """Return the maps at the other end."""
        return self.normalization(self.convolution(resize(maps, self.size)))


class FCFDConfig(FeatureConfig):
    """Settings of :class:`FCFD`."""

    appearance_weight: float = Field(default=5.0, gt=0)
    """Factor of the distance of the features themselves, summed over the stages."""
    appearance_ramp: Ramp = "warmup"
    """How that factor grows over the run."""
    function_weight: float = Field(default=0.2, gt=0)
    """Factor of the divergence of the logits that later layers make of bridged features."""
    temperature: float = Field(default=4.0, gt=0)
    """Softening of these logits and the teacher's, dimensionless."""

    def build(self, task: Task) -> FCFD:
        """Return the objective with a bridge for each pair and direction.

        Raises:
            InputError: a tap is not one of the stages, which are where a network can go on from.
        """
        student, teacher = facts_of(task)
        pairs = self.pairs(task)
        for facts, tap in [(student, pair.student) for pair in pairs] + [(teacher, pair.teacher) for pair in pairs]:
            _check_stage(facts, tap)
            map_shape(facts, tap)
        return FCFD(self, pairs)


def _check_stage(facts: NetworkFacts, tap: str) -> None:
    if tap not in list(facts.taps) or not (tap == "stem" or tap.startswith("stage")):
        known = ", ".join(name for name in facts.taps if name == "stem" or name.startswith("stage"))
        raise InputError(f"fcfd: later layers begin at a stage; {facts.name} has {known}, got {tap!r}")


@final
class FCFD(Objective[DistillStep]):
    r"""Match the teacher's features in what they are and in what later layers make of them.

    .. math::

        w_a(e) \sum_i \left\| B_i(F_s^i) - F_t^i \right\|^2
        + w_f \left[ \tau^2 \mathrm{KL}\left(p_t \,\|\, T_{>j}(B_j(F_s^j))\right)
        + \tau^2 \mathrm{KL}\left(p_t \,\|\, S_{>k}(B'_k(F_t^k))\right) \right]

    The student's feature at stage :math:`j` goes on through the teacher's later layers :math:`T_{>j}`, and the
    teacher's at stage :math:`k` through the student's, :math:`S_{>k}`; :math:`j` and :math:`k` are drawn in each step,
    not the last stage unless it is the only one. See :func:`appearance_distance` and
    :func:`~soteacher.functional.kd_divergence`. Bridges are 3x3 convolutions with batch normalisation; the leading
    tokens of a transformer take the average of the bridged patches. The networks' parts run as they are, uncompiled.
    """

    name = "fcfd"

    def __init__(self, config: FCFDConfig, pairs: tuple[TapPair, ...]) -> None:
        super().__init__()
        self.config = config
        self.pairs = pairs
        self.features = tuple(pair.student for pair in pairs)
        self.teacher_features = tuple(pair.teacher for pair in pairs)
        inner = pairs[:-1] or pairs  # behind the last stage there is no more than pooling and classifier
        self.to_teacher = nn.ModuleList(Bridge(pair.student_shape[0], pair.teacher_shape) for pair in pairs)
        self.to_student = nn.ModuleList(Bridge(pair.teacher_shape[0], pair.student_shape) for pair in inner)

    def forward(self, step: DistillStep) -> Tensor:
        """Return the mean of all terms over the batch, each times its factor."""
        students, teachers = student_maps(step, self.pairs), teacher_maps(step, self.pairs)
        there, back = self._drawn(step)
        with full_precision(students[0]):
            bridged = [bridge(maps) for bridge, maps in zip(self.to_teacher, students, strict=True)]
            returned = self.to_student[back](teachers[back])
        tap, name = self.teacher_features[there], self.features[back]
        read_by_teacher = teacher_parts(step).run_from(
            tap, _as_feature(bridged[there], step.teacher.features[tap]), step.images
        )
        read_by_student = student_parts(step).run_from(
            name, _as_feature(returned, step.outputs.features[name]), step.images
        )
        return (
            self._appearance(step, bridged, teachers) + self._function(step, read_by_teacher, read_by_student)
        ).mean()

    def _drawn(self, step: DistillStep) -> tuple[int, int]:
        """Return the stage after which a feature changes to the teacher, and the one after which to the student."""
        generator = own_generator(step, torch.device("cpu"))
        there, back = torch.randint(len(self.to_student), (2,), generator=generator).tolist()
        return there, back

    def _appearance(self, step: DistillStep, bridged: list[Tensor], teachers: list[Tensor]) -> Tensor:
        last = len(bridged) - 1
        distances = [
            appearance_distance(ours, theirs, pooled=number == last)
            for number, (ours, theirs) in enumerate(zip(bridged, teachers, strict=True))
        ]
        ramp = ramp_factor(self.config.appearance_ramp, epoch=step.epoch, num_epochs=step.num_epochs)
        return self.config.appearance_weight * ramp * torch.stack(distances).sum(dim=0)

    def _function(self, step: DistillStep, *logits: Tensor) -> Tensor:
        divergences = [kd_divergence(read, step.teacher.logits, temperature=self.config.temperature) for read in logits]
        return self.config.function_weight * torch.stack(divergences).sum(dim=0)


def _as_feature(maps: Tensor, like: Tensor) -> Tensor:
    """Return maps in the form of a network's own feature: maps, or tokens behind leading ones of their average."""
    if like.ndim == 4:
        return maps
    patches = maps.flatten(2).transpose(1, 2)
    leading = patches.mean(dim=1, keepdim=True).expand(-1, like.shape[1] - patches.shape[1], -1)
    return torch.cat([leading, patches], dim=1)


METHOD = Method(
    name="fcfd",
    role="student",
    title="Labels, softened predictions, and features that teacher's and student's later layers read alike",
    venue="ICLR 2023",
    source="Liu, Kan, Shan and Chen, ICLR 2023, arXiv:2304.11832",
    differs=(
        "Weights and temperature are those of the authors' WRN-40-2 -> WRN-16-2; they took others for other pairs "
        "(0.02 to 5 for appearance, 0.2 or 1 for function, temperature 4 or 8). One path in each direction is drawn in "
        "a step, in their code two of all paths. Of a student's feature in the teacher's later layers only the logits "
        "are compared, in their code the later stages' features too. Bridges to features that are rectified have no "
        "leaky rectifier at their end, and neither bridges nor the student's layers on a path have running statistics. "
        "Of a wide ResNet the stages are taken as they are, in their code with the next "
        "normalisation. Features of other sizes are resized, and transformers' leading tokens take the patches' "
        "average: that is ours."
    ),
    terms={
        "cross_entropy": {"weight": 1.0},
        "kd": {"weight": 1.0, "temperature": 4.0},
        "fcfd": {"weight": 1.0},
    },
)  # fmt: skip
