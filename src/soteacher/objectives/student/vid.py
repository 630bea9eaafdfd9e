"""Variational information distillation: the student's maps tell as much as they can about the teacher's."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import final

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from soteacher.errors import InputError
from soteacher.objective import Method, Objective
from soteacher.objectives.features import FeatureConfig, TapPair, student_maps, teacher_maps, to_smaller
from soteacher.objectives.shapes import check_one_shape
from soteacher.objectives.squares import squared_norm
from soteacher.precision import at_least_float32, full_precision
from soteacher.types import DistillStep, Task

LEAST_VARIANCE = 1e-5


def variational_information_loss(predicted_mean: Tensor, teacher_maps: Tensor, log_scale: Tensor) -> Tensor:
    r"""Negative log-likelihood of the teacher's maps under the student's Gaussian, one value per example.

    .. math:: \frac{1}{2 C H W} \sum_{c,p} \left( \frac{(\mu_{c,p} - F_{c,p})^2}{v_c} + \log v_c \right),
        \quad v_c = \log(1 + e^{a_c}) + 10^{-5}

    Args:
        predicted_mean: :math:`\mu`, ``[B, C, H, W]``; gradients flow.
        teacher_maps: :math:`F`, ``[B, C, H, W]``; a constant.
        log_scale: :math:`a`, ``[C]``; gradients flow.

    Returns:
        ``[B]``, nats per value without the constant :math:`\log(2 \pi) / 2`, so that it can be negative; float32
        (float64 from float64 maps).

    Raises:
        InputError: the maps' shapes differ, or the scales are not one per channel.

    Source: Ahn et al., CVPR 2019, arXiv:1904.05835, equation 5 (from memory of the paper, not checked); the
    mean over all values as in the authors' code, which RepDistiller took over.
    """
    check_one_shape(predicted_mean, teacher_maps, "maps")
    if log_scale.shape != predicted_mean.shape[1:2] or predicted_mean.ndim != 4:
        raise InputError(
            f"one log_scale for each channel of maps [B, C, H, W] is wanted, got {list(log_scale.shape)} and maps "
            f"{list(predicted_mean.shape)}"
        )
    variance = F.softplus(at_least_float32(log_scale)) + LEAST_VARIANCE
    difference = (at_least_float32(predicted_mean) - at_least_float32(teacher_maps.detach())).flatten(2)
    squared = squared_norm(difference) / difference.shape[2]  # the pixels of a channel have one variance
    return 0.5 * (squared / variance + variance.log()).mean(dim=1)


class VIDConfig(FeatureConfig):
    """Settings of :class:`VID`."""

    initial_variance: float = Field(default=5.0, gt=LEAST_VARIANCE)
    """Variance of every channel's Gaussian before training, in squared units of the teacher's maps."""

    def build(self, task: Task) -> VID:
        """Return the objective with a regressor for each pair of taps."""
        return VID(self, self.pairs(task))


@final
class VID(Objective[DistillStep]):
    """Predict the teacher's maps, and how sure that is, from the student's; see :func:`variational_information_loss`.

    Each regressor is three 1x1 convolutions with rectifiers between them, as wide as the teacher's maps.
    """

    name = "vid"

    def __init__(self, config: VIDConfig, pairs: Sequence[TapPair]) -> None:
        super().__init__()
        self.config = config
        self.pairs = tuple(pairs)
        self.features = tuple(pair.student for pair in pairs)
        self.teacher_features = tuple(pair.teacher for pair in pairs)
        self.regressors = nn.ModuleList(_regressor(pair.student_shape[0], pair.teacher_shape[0]) for pair in pairs)
        start = _inverse_softplus(config.initial_variance - LEAST_VARIANCE)
        self.log_scales = nn.ParameterList(torch.full((pair.teacher_shape[0],), start) for pair in pairs)

    def forward(self, step: DistillStep) -> Tensor:
        """Return the mean loss of the batch, summed over the stages."""
        students, teachers = student_maps(step, self.pairs), teacher_maps(step, self.pairs)
        losses: list[Tensor] = []
        for index, regressor in enumerate(self.regressors):
            student, teacher = to_smaller(students[index], teachers[index])
            with full_precision(student):
                predicted = regressor(student)
            losses.append(variational_information_loss(predicted, teacher, self.log_scales[index]).mean())
        return torch.stack(losses).sum()


def _regressor(in_channels: int, channels: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(in_channels, channels, 1, bias=False),
        nn.ReLU(),
        nn.Conv2d(channels, channels, 1, bias=False),
        nn.ReLU(),
        nn.Conv2d(channels, channels, 1, bias=False),
    )


def _inverse_softplus(value: float) -> float:
    return value + math.log(-math.expm1(-value))


METHOD = Method(
    name="vid",
    role="student",
    title="Variational information distillation: the student's stages predict the teacher's, with a learned variance",
    venue="CVPR 2019",
    source="Ahn, Hu, Damianou, Lawrence and Dai, CVPR 2019, arXiv:1904.05835; weight of RepDistiller's benchmark",
    terms={"cross_entropy": {"weight": 1.0}, "vid": {"weight": 1.0}},
)
