"""One-for-all (OFA-KD): exits on the student's stages learn the teacher's predictions, whatever it is built of."""

from __future__ import annotations

from itertools import pairwise
from typing import ClassVar, final

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from soteacher.errors import InputError
from soteacher.objective import Method, Objective, ObjectiveConfig
from soteacher.objectives.connectors import BatchNormalization
from soteacher.objectives.features import as_maps, map_shape, stages
from soteacher.objectives.student.class_logits import check_logits, check_positive
from soteacher.precision import at_least_float32, full_precision
from soteacher.types import DistillStep, NetworkFacts, Task


def enhanced_target_cross_entropy(
    student_logits: Tensor, teacher_logits: Tensor, labels: Tensor, *, exponent: float, temperature: float
) -> Tensor:
    r"""Cross-entropy with the teacher's prediction, the label's share of it enhanced; one value per example.

    .. math:: -\big( (1 + p_{t,y})^\gamma - 1 \big) \log p_{s,y} - \sum_{k \ne y} p_{t,k}^\gamma \log p_{s,k}

    The larger the exponent, the more of the target is the label's, all the more where the teacher is sure of it.

    Args:
        student_logits: ``[B, K]``, the network's or an exit's; gradients flow.
        teacher_logits: ``[B, K]``; a constant.
        labels: ``[B]`` int64 class ids.
        exponent: :math:`\gamma > 0`; at 1 the cross-entropy with the teacher's prediction.
        temperature: of both predictions, positive, dimensionless.

    Returns:
        ``[B]``, nats, float32 (float64 from float64 logits); positive also where the two agree.

    Raises:
        InputError: the shapes do not fit, or a number is not positive and finite.

    Source: Hao et al., NeurIPS 2023, arXiv:2310.19444; formula as in the authors' code.
    """
    check_logits(student_logits, teacher_logits, labels)
    check_positive(exponent=exponent, temperature=temperature)
    log_student = F.log_softmax(at_least_float32(student_logits) / temperature, dim=-1)
    teacher = (at_least_float32(teacher_logits.detach()) / temperature).softmax(dim=-1)
    label = torch.zeros_like(teacher).scatter(1, labels.long()[:, None], 1.0)
    return -(((teacher + label) ** exponent - label) * log_student).sum(dim=-1)


class OFAConfig(ObjectiveConfig):
    """Settings of :class:`OFA`."""

    reads: ClassVar[str] = "all stages of the student"
    needs_teacher: ClassVar[bool] = True
    exponent: float = Field(default=1.5, gt=0)
    """How much the label's share of the teacher's predictions is enhanced; 1: not at all."""
    temperature: float = Field(default=1.0, gt=0)
    """Softening of both predictions, dimensionless."""
    student_taps: tuple[str, ...] | None = Field(default=None, min_length=1)
    """Taps of the student that get an exit, from shallow to deep; null: all its stages."""

    def build(self, task: Task) -> OFA:
        """Return the objective with an exit on each tap.

        Raises:
            InputError: the task does not say what the student is, or the student has no stages or no such tap.
        """
        if task.network is None:
            raise InputError("exits on the student's stages need to know the student: give Task(network=...)")
        taps = tuple(stages(task.network)) if self.student_taps is None else self.student_taps
        if not taps:
            raise InputError(f"{task.network.name} names no stages; set student_taps to paths of modules")
        return OFA(self, task.network, taps)


@final
class OFA(Objective[DistillStep]):
    """Teach an exit on each of the student's stages, and its own logits; see :func:`enhanced_target_cross_entropy`."""

    name = "ofa"

    def __init__(self, config: OFAConfig, network: NetworkFacts, taps: tuple[str, ...]) -> None:
        super().__init__()
        self.config = config
        self.features = taps
        channels = [map_shape(network, tap)[0] for tap in taps]
        self.exits = nn.ModuleList(
            _Exit(count, channels[-1], network.num_logits, num_halvings=len(taps) - 1 - place)
            for place, count in enumerate(channels)
        )

    def forward(self, step: DistillStep) -> Tensor:
        """Return the sum over the exits and the network's own logits, the mean of the batch."""
        maps = [as_maps(step.outputs.features[tap]) for tap in self.features]
        with full_precision(step.outputs.logits):
            answers = [leave(feature) for leave, feature in zip(self.exits, maps, strict=True)]
        losses = [
            enhanced_target_cross_entropy(
                logits,
                step.teacher.logits,
                step.labels,
                exponent=self.config.exponent,
                temperature=self.config.temperature,
            ).mean()
            for logits in (*answers, step.outputs.logits)
        ]
        return torch.stack(losses).sum()


@final
class _Exit(nn.Module):
    """Maps ``[B, C, H, W]`` to logits ``[B, K]``: halved as often as there are deeper exits, averaged, classified."""

    def __init__(self, channels: int, width: int, num_logits: int, *, num_halvings: int) -> None:
        super().__init__()
        counts = [*(channels * 2**times for times in range(num_halvings)), width]
        blocks = [_Halving(count, after) for count, after in pairwise(counts)]
        self.projector = nn.Sequential(*blocks) if blocks else nn.Conv2d(channels, width, 1)
        self.classifier = nn.Linear(width, num_logits)
        nn.init.trunc_normal_(self.classifier.weight, std=0.02)
        nn.init.zeros_(self.classifier.bias)
        for module in self.projector.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, maps: Tensor) -> Tensor:
        return self.classifier(self.projector(maps).mean(dim=(2, 3)))


@final
class _Halving(nn.Module):
    """Two separable 3x3 convolutions, the first with stride 2, each normalised and rectified."""

    def __init__(self, channels: int, out_channels: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(channels, channels, 3, stride=2, padding=1, groups=channels, bias=False),
            nn.Conv2d(channels, channels, 1, bias=False),
            BatchNormalization(channels),
            nn.ReLU(),
            nn.Conv2d(channels, channels, 3, padding=1, groups=channels, bias=False),
            nn.Conv2d(channels, out_channels, 1, bias=False),
            BatchNormalization(out_channels),
            nn.ReLU(),
        )

    def forward(self, maps: Tensor) -> Tensor:
        return self.layers(maps)


METHOD = Method(
    name="ofa",
    role="student",
    title="One-for-all: exits on the student's stages learn the teacher's predictions, for networks of any two kinds",
    venue="NeurIPS 2023",
    source="Hao et al., NeurIPS 2023, arXiv:2310.19444; exponent of the command that the authors' repository shows",
    differs=(
        "The exponent is the same for all pairs of networks. Exits are as wide as the student's last stage "
        "(theirs: as the wider one of both networks' last stages), convolutions on patches also for a transformer "
        "student (theirs: transformer blocks), and normalised by the batch's own statistics."
    ),
    terms={"cross_entropy": {"weight": 1.0}, "ofa": {"weight": 1.0}},
)
