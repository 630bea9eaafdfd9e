"""Neuron selectivity transfer: the student's channels are distributed over the image as the teacher's."""

from __future__ import annotations

from collections.abc import Sequence
from typing import final

import torch
from torch import Tensor

from soteacher.objective import Method, Objective
from soteacher.objectives.features import FeatureConfig, TapPair, student_maps, teacher_maps, to_smaller
from soteacher.objectives.gram import gram_matrix
from soteacher.objectives.shapes import check_maps
from soteacher.objectives.unit_vectors import LEAST_SQUARED_NORM, unit_vectors
from soteacher.precision import at_least_float32, full_precision
from soteacher.types import DistillStep, Task


def selectivity_discrepancy(student_maps: Tensor, teacher_maps: Tensor) -> Tensor:
    r"""Squared maximum mean discrepancy of the two sets of channels, one value per example.

    Each channel is a vector :math:`f` over the pixels, of length 1; the kernel is :math:`(f \cdot g)^2`:

    .. math:: \frac{1}{C_s^2} \sum_{i,j} (f_i \cdot f_j)^2 + \frac{1}{C_t^2} \sum_{i,j} (g_i \cdot g_j)^2
        - \frac{2}{C_s C_t} \sum_{i,j} (f_i \cdot g_j)^2
        = \left\| \frac{1}{C_s} \sum_i f_i f_i^\top - \frac{1}{C_t} \sum_j g_j g_j^\top \right\|_F^2

    The cheaper side of the equation is computed: the left takes scalar products of channels, the right of pixels.

    Args:
        student_maps: ``[B, C_s, H_s, W_s]``; gradients flow.
        teacher_maps: ``[B, C_t, H_t, W_t]``; a constant. The larger maps of the two are averaged to the smaller.

    Returns:
        ``[B]``, float32 (float64 from float64 maps); 0 at agreement, whatever the order and size of the channels.

    Raises:
        InputError: the arguments are not maps of the same examples.

    Source: Huang and Wang 2017, arXiv:1707.01219, equation 5 (from memory of the paper, not checked) with the
    polynomial kernel of degree 2 and offset 0. The teacher's own sum, a constant, is kept as in RepDistiller's code, so
    that the value is a squared distance.
    """
    check_maps(student_maps, teacher_maps)
    student, teacher = to_smaller(at_least_float32(student_maps), at_least_float32(teacher_maps.detach()))
    student, teacher = student.flatten(2), teacher.flatten(2)
    student_channels, teacher_channels, num_pixels = student.shape[1], teacher.shape[1], student.shape[2]
    by_channels = student_channels**2 + teacher_channels**2 + student_channels * teacher_channels
    if by_channels < num_pixels * (student_channels + teacher_channels):
        return _by_channels(student, teacher)
    students, teachers = (gram_matrix(unit_vectors(side).mT) / side.shape[1] for side in (student, teacher))
    return (students - teachers).square().sum(dim=(1, 2))


def _by_channels(student: Tensor, teacher: Tensor) -> Tensor:
    """Return the left side of the equation; the lengths of the channels are taken from the products' diagonals."""
    with full_precision(student):
        across = student @ teacher.mT
    students, teachers = gram_matrix(student), gram_matrix(teacher)
    student_scales, teacher_scales = _inverse_lengths(students), _inverse_lengths(teachers)
    return (
        _mean_kernel(students, student_scales, student_scales)
        + _mean_kernel(teachers, teacher_scales, teacher_scales)
        - 2 * _mean_kernel(across, student_scales, teacher_scales)
    )


def _inverse_lengths(products: Tensor) -> Tensor:
    """Return what makes channels as long as :func:`unit_vectors` does: ``[B, C]`` of ``[B, C, C]``."""
    squared = products.diagonal(dim1=1, dim2=2)
    return squared.where(squared > LEAST_SQUARED_NORM, 1.0).rsqrt()


def _mean_kernel(products: Tensor, scales: Tensor, other_scales: Tensor) -> Tensor:
    """Return the mean squared scalar product of all pairs of scaled channels: ``[B]``."""
    return (products * scales[:, :, None] * other_scales[:, None, :]).square().mean(dim=(1, 2))


class NSTConfig(FeatureConfig):
    """Settings of :class:`NST`."""

    def build(self, task: Task) -> NST:
        """Return the objective for the task's networks, of any channels and sizes."""
        return NST(self.pairs(task))


@final
class NST(Objective[DistillStep]):
    """Match the distribution of the teacher's channels in every stage; see :func:`selectivity_discrepancy`."""

    name = "nst"

    def __init__(self, pairs: Sequence[TapPair]) -> None:
        super().__init__()
        self.pairs = tuple(pairs)
        self.features = tuple(pair.student for pair in pairs)
        self.teacher_features = tuple(pair.teacher for pair in pairs)

    def forward(self, step: DistillStep) -> Tensor:
        """Return the mean discrepancy of the batch, summed over the stages."""
        both = zip(student_maps(step, self.pairs), teacher_maps(step, self.pairs), strict=True)
        return torch.stack([selectivity_discrepancy(student, teacher).mean() for student, teacher in both]).sum()


METHOD = Method(
    name="nst",
    role="student",
    title="Neuron selectivity transfer: channels are distributed over the image as the teacher's",
    venue="arXiv 2017",
    source="Huang and Wang 2017, arXiv:1707.01219; weight of RepDistiller's benchmark",
    terms={"cross_entropy": {"weight": 1.0}, "nst": {"weight": 50.0}},
)
