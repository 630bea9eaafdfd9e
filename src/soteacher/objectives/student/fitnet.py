"""FitNet: the student's maps predict a hidden layer of the teacher, its hint."""

from __future__ import annotations

from collections.abc import Sequence
from typing import final

import torch
from torch import Tensor, nn

from soteacher.objective import Method, Objective
from soteacher.objectives.connectors import MapConnector
from soteacher.objectives.example_rows import example_rows
from soteacher.objectives.features import FeatureConfig, TapPair, student_maps, teacher_maps
from soteacher.objectives.shapes import check_one_shape
from soteacher.objectives.squares import squared_norm
from soteacher.precision import at_least_float32, full_precision
from soteacher.types import DistillStep, Task


def hint_distance(predicted_maps: Tensor, teacher_maps: Tensor) -> Tensor:
    r"""Mean squared distance of the predicted hint from the teacher's maps, one value per example.

    .. math:: \frac{1}{C H W} \| r(F_s) - F_t \|_2^2

    Args:
        predicted_maps: ``[B, C, H, W]`` or another shape with the batch first, after the regressor; gradients flow.
        teacher_maps: of the same shape; a constant.

    Returns:
        ``[B]``, float32 (float64 from float64 maps); 0 where the two agree.

    Raises:
        InputError: the shapes differ.

    Source: Romero et al., ICLR 2015, arXiv:1412.6550, equation 3 (from memory of the paper, not checked),
    where half of a sum stands for the mean; the mean is that of RepDistiller's code.
    """
    check_one_shape(predicted_maps, teacher_maps, "maps")
    difference = example_rows(at_least_float32(predicted_maps) - at_least_float32(teacher_maps.detach()))
    return squared_norm(difference) / difference.shape[1]


class FitNetConfig(FeatureConfig):
    """Settings of :class:`FitNet`."""

    default_taps = "second_stage"

    def build(self, task: Task) -> FitNet:
        """Return the objective with a regressor for each pair of taps."""
        return FitNet(self.pairs(task))


@final
class FitNet(Objective[DistillStep]):
    """Predict the teacher's hint from the student's maps by a trained 1x1 convolution; see :func:`hint_distance`."""

    name = "fitnet"

    def __init__(self, pairs: Sequence[TapPair]) -> None:
        super().__init__()
        self.pairs = tuple(pairs)
        self.features = tuple(pair.student for pair in pairs)
        self.teacher_features = tuple(pair.teacher for pair in pairs)
        self.regressors = nn.ModuleList(
            MapConnector(pair.student_shape[0], pair.teacher_shape[0], (pair.teacher_shape[1], pair.teacher_shape[2]))
            for pair in pairs
        )

    def forward(self, step: DistillStep) -> Tensor:
        """Return the mean distance of the batch, summed over the pairs of taps."""
        hints = teacher_maps(step, self.pairs)
        with full_precision(hints[0]):
            guided = zip(self.regressors, student_maps(step, self.pairs), strict=True)
            predicted = [regressor(maps) for regressor, maps in guided]
        return torch.stack([hint_distance(p, h).mean() for p, h in zip(predicted, hints, strict=True)]).sum()


METHOD = Method(
    name="fitnet",
    role="student",
    title="FitNet hints: the student's second stage predicts the teacher's",
    venue="ICLR 2015",
    source="Romero et al., ICLR 2015, arXiv:1412.6550; weight and stage of RepDistiller's benchmark",
    differs=(
        "One stage with labels and hints together, as in RepDistiller; the paper first trains on the hints alone, "
        "which stage: preparation gives, and then on softened predictions. The regressor is a 1x1 convolution with "
        "batch normalisation and a change of size; no rectifier follows it, since stages may be negative."
    ),
    terms={"cross_entropy": {"weight": 1.0}, "fitnet": {"weight": 100.0}},
)
