"""Scale decoupled distillation (SDD): the student matches the teacher's predictions for regions of each image."""

from __future__ import annotations

from typing import Annotated, Literal, final

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from soteacher.errors import InputError
from soteacher.objective import Method, Objective
from soteacher.objectives.features import (
    FeatureConfig,
    TapPair,
    as_maps,
    facts_of,
    mismatch,
    student_parts,
    teacher_parts,
    vector_shape,
)
from soteacher.objectives.pooled import vector_pair
from soteacher.objectives.student.dkd import dkd_divergence
from soteacher.objectives.student.kd import kd_divergence
from soteacher.objectives.student.nkd import nkd_cross_entropy
from soteacher.precision import at_least_float32, full_precision
from soteacher.types import DistillStep, Task


def regional_logits(maps: Tensor, weight: Tensor, bias: Tensor | None, *, scales: tuple[int, ...]) -> Tensor:
    r"""Logits that a classifier gives for the cells of grids laid over the maps.

    .. math:: z_r = W \, \frac{1}{|r|} \sum_{(h, w) \in r} f_{hw} + b

    Args:
        maps: :math:`f`, ``[B, C, H, W]``, those whose average over all pixels the classifier takes in; gradients flow.
        weight: :math:`W`, ``[K, C]``.
        bias: :math:`b`, ``[K]``, or none.
        scales: cells on a side of each grid, at least 1, none larger than height or width.

    Returns:
        ``[B, N, K]`` with N the sum of the squared scales: the cells grid by grid, in rows; float32 (float64 from
        float64 maps). Scale 1 gives the network's own logits.

    Raises:
        InputError: the shapes do not fit, or a scale does not fit into the maps.

    Source: Wei, Luo and Luo, CVPR 2024, arXiv:2403.13512; grids as in the authors' code.
    """
    if maps.ndim != 4 or weight.ndim != 2 or maps.shape[1] != weight.shape[1]:
        raise InputError(
            f"wanted maps [B, C, H, W] and weights [K, C], got {list(maps.shape)} and {list(weight.shape)}"
        )
    if not scales or not 1 <= min(scales) <= max(scales) <= min(maps.shape[2:]):
        raise InputError(f"scales must be at least 1 and fit into maps of {list(maps.shape[2:])}, got {list(scales)}")
    maps = at_least_float32(maps)
    cells = torch.cat([F.adaptive_avg_pool2d(maps, scale).flatten(2) for scale in scales], dim=2).transpose(1, 2)
    with full_precision(maps):
        return F.linear(cells, weight.to(maps.dtype), None if bias is None else bias.to(maps.dtype))


def complementary_regions(teacher_logits: Tensor, teacher_regions: Tensor, labels: Tensor) -> Tensor:
    """Whether a region tells another story than the whole image, for each region of each example.

    It does where the teacher is right about one of the two and wrong about the other; where it is right about both, or
    wrong about both, the region is consistent.

    Args:
        teacher_logits: ``[B, K]`` for the whole images.
        teacher_regions: ``[B, N, K]`` for their regions.
        labels: ``[B]`` int64 class ids.

    Returns:
        ``[B, N]`` bool.

    Raises:
        InputError: the shapes do not fit.

    Source: Wei, Luo and Luo, CVPR 2024, arXiv:2403.13512; as in the authors' code.
    """
    if teacher_regions.ndim != 3 or teacher_logits.shape != (len(labels), teacher_regions.shape[2]):
        raise InputError(
            f"wanted logits [B, K], regions [B, N, K] and labels [B], got {list(teacher_logits.shape)}, "
            f"{list(teacher_regions.shape)} and {list(labels.shape)}"
        )
    whole = teacher_logits.argmax(dim=1) == labels
    return (teacher_regions.argmax(dim=2) == labels[:, None]) != whole[:, None]


class SDDConfig(FeatureConfig):
    """Settings of :class:`SDD`."""

    default_taps = "maps"
    divergence: Literal["kd", "dkd", "nkd"] = "kd"
    """What compares two regions' predictions: the loss of that method."""
    scales: tuple[Annotated[int, Field(ge=1)], ...] = Field(default=(1, 2, 4), min_length=1)
    """Cells on a side of each grid; scales larger than the maps are left out."""
    complementary_weight: float = Field(default=2.0, gt=0)
    """Factor of the regions about which the teacher is right where it is wrong about the whole image, or vice versa."""
    temperature: float = Field(default=4.0, gt=0)
    """Softening of both distributions, dimensionless; ``nkd`` was published with 1."""
    target_weight: float = Field(default=1.0, gt=0)
    """Of ``dkd``: factor of the divergence in whether it is the target class."""
    non_target_weight: float = Field(default=8.0, gt=0)
    """Of ``dkd`` and ``nkd``: factor of the part of the other classes; ``nkd`` was published with 1.5."""

    def build(self, task: Task) -> SDD:
        """Return the objective for the scales that fit into both networks' maps.

        Raises:
            InputError: a network has no maps that its classifier takes the average of, or no scale fits.
        """
        pair = vector_pair(self, task, "sdd")
        self._check(task, pair)
        smallest = min(*pair.student_shape[1:], *pair.teacher_shape[1:])
        scales = tuple(scale for scale in self.scales if scale <= smallest)
        if not scales:
            raise mismatch("sdd", task, pair, f"none of the scales {list(self.scales)} fits; add 1 to scales")
        return SDD(self, pair, scales)

    def _check(self, task: Task, pair: TapPair) -> None:
        """Refuse maps that the classifier cannot take in, cell by cell."""
        student, teacher = facts_of(task)
        for facts, tap, named, shape in (
            (student, pair.student, self.student_taps, pair.student_shape),
            (teacher, pair.teacher, self.teacher_taps, pair.teacher_shape),
        ):
            if (named is None and tap != "maps") or shape[0] != vector_shape(facts, "pooled")[0]:
                advice = (
                    f"regional logits need maps whose average is what the classifier takes in, a tap 'maps', and "
                    f"{facts.name} has none; choose another method, or name taps with as many channels as its 'pooled'"
                )
                raise mismatch("sdd", task, pair, advice)


@final
class SDD(Objective[DistillStep]):
    """Match the teacher region by region; see :func:`regional_logits` and :func:`complementary_regions`."""

    name = "sdd"

    def __init__(self, config: SDDConfig, pair: TapPair, scales: tuple[int, ...]) -> None:
        super().__init__()
        self.config, self.pair, self.scales = config, pair, scales
        self.features, self.teacher_features = (pair.student,), (pair.teacher,)

    def forward(self, step: DistillStep) -> Tensor:
        """Return the weighted mean over all regions of the batch."""
        student = self._regions(step.outputs.features[self.pair.student], student_parts(step).classifier)
        with torch.no_grad():
            teacher = self._regions(step.teacher.features[self.pair.teacher], teacher_parts(step).classifier)
            complementary = complementary_regions(step.teacher.logits, teacher, step.labels)
        labels = step.labels.repeat_interleave(student.shape[1])
        losses = self._losses(student.flatten(0, 1), teacher.flatten(0, 1), labels)
        return (losses * torch.where(complementary.flatten(), self.config.complementary_weight, 1.0)).mean()

    def _regions(self, feature: Tensor, classifier: nn.Linear) -> Tensor:
        return regional_logits(as_maps(feature), classifier.weight, classifier.bias, scales=self.scales)

    def _losses(self, student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
        """Return the loss of each region."""
        temperature, others = self.config.temperature, self.config.non_target_weight
        if self.config.divergence == "dkd":
            return dkd_divergence(
                student,
                teacher,
                labels,
                temperature=temperature,
                target_weight=self.config.target_weight,
                non_target_weight=others,
            )
        if self.config.divergence == "nkd":
            return nkd_cross_entropy(student, teacher, labels, temperature=temperature, non_target_weight=others)
        return kd_divergence(student, teacher, temperature=temperature)


METHOD = Method(
    name="sdd",
    role="student",
    title="Scale decoupled distillation: softened predictions for regions at three scales",
    venue="CVPR 2024",
    source="Wei, Luo and Luo, CVPR 2024, arXiv:2403.13512 (SD-KD); weights of kd in mdistiller, which its code extends",
    differs=(
        "The default scales are 1, 2 and 4; the authors' code takes 1 and 2 for some pairs. Maps smaller than a "
        "grid leave that grid out."
    ),
    terms={
        "cross_entropy": {"weight": 0.1},
        "sdd": {"weight": 0.9, "divergence": "kd", "temperature": 4.0},
    },
)
