"""Class attention transfer: the student sees each class in the same places of an image as the teacher."""

from __future__ import annotations

from typing import final

import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from soteacher.errors import InputError
from soteacher.objective import Method, Objective
from soteacher.objectives.features import (
    FeatureConfig,
    TapPair,
    facts_of,
    mismatch,
    student_maps,
    student_parts,
    teacher_maps,
    teacher_parts,
    vector_shape,
)
from soteacher.precision import at_least_float32, full_precision
from soteacher.types import DistillStep, Task

EPSILON = 1e-6
"""The smallest length of a class's map that is divided by."""


def class_activation_maps(maps: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    r"""Return what each place of an image says for each class; the mean over the places is the logit.

    .. math:: A_{khw} = \sum_c W_{kc} \, x_{chw} + b_k

    Args:
        maps: x ``[B, C, H, W]``, whose mean over the places the classifier takes in; gradients flow.
        weight: W ``[K, C]`` of the classifier; gradients flow.
        bias: b ``[K]`` of the classifier, or none; gradients flow.

    Returns:
        ``[B, K, H, W]``, float32 (float64 from float64 maps).

    Raises:
        InputError: the classifier takes other channels.

    Source: Zhou et al., CVPR 2016, arXiv:1512.04150, without the bias; Guo et al., CVPR 2023, arXiv:2304.12777.
    """
    if maps.ndim != 4 or weight.ndim != 2 or maps.shape[1] != weight.shape[1]:
        raise InputError(
            f"wanted maps [B, C, H, W] and weights [K, C], got {list(maps.shape)} and {list(weight.shape)}"
        )
    maps = at_least_float32(maps)
    with full_precision(maps):
        return F.conv2d(maps, weight.to(maps)[:, :, None, None], None if bias is None else bias.to(maps))


def class_attention_distance(
    student_class_maps: Tensor, teacher_class_maps: Tensor, *, resolution: int, normalize: bool = True
) -> Tensor:
    r"""Mean squared distance of pooled class activation maps, one value per example.

    .. math:: \frac{1}{K R^2} \sum_k
        \left\| \frac{P A^s_k}{\| P A^s_k \|_2} - \frac{P A^t_k}{\| P A^t_k \|_2} \right\|_2^2

    where :math:`P` averages a map to R x R.

    Args:
        student_class_maps: ``[B, K, H, W]``; gradients flow.
        teacher_class_maps: ``[B, K, H', W']``; constants.
        resolution: R, at least 1.
        normalize: whether each pooled map is divided by its length.

    Returns:
        ``[B]``, float32 (float64 from float64 maps); 0 where the pooled maps agree, if normalised up to a factor.

    Raises:
        InputError: the batches or classes differ, or the resolution is below 1.

    Source: Guo, Yan, Li and Lin, CVPR 2023, arXiv:2304.12777.
    """
    if student_class_maps.ndim != 4 or student_class_maps.shape[:2] != teacher_class_maps.shape[:2]:
        raise InputError(
            f"class maps must be [B, K, H, W] of the same batch and classes, got {list(student_class_maps.shape)} "
            f"(student) and {list(teacher_class_maps.shape)} (teacher)"
        )
    if resolution < 1:
        raise InputError(f"resolution must be at least 1, got {resolution}")
    student, teacher = (
        F.adaptive_avg_pool2d(at_least_float32(maps), resolution).flatten(2)
        for maps in (student_class_maps, teacher_class_maps.detach())
    )
    if normalize:
        student, teacher = (F.normalize(maps, dim=2, eps=EPSILON) for maps in (student, teacher))
    return (student - teacher).square().mean(dim=(1, 2))


class CATConfig(FeatureConfig):
    """Settings of :class:`CAT`."""

    default_taps = "maps"
    resolution: int = Field(default=2, ge=1)
    """Height and width of the class activation maps that are compared."""
    normalize: bool = True
    """Whether only where a class is seen counts, not how strongly. The authors normalise for networks of different
    families; within a family they do not, with weights of 0.7 to 15."""

    def build(self, task: Task) -> CAT:
        """Return the objective.

        Raises:
            InputError: there are no such taps, or a classifier does not take in the mean of these maps. Of taps that
                the settings name only the channels are checked.
        """
        pairs = self.pairs(task)
        if len(pairs) != 1:
            raise InputError(f"cat compares one pair of taps, got {len(pairs)}")
        student, teacher = facts_of(task)
        for facts, tap, channels, chosen in (
            (student, pairs[0].student, pairs[0].student_shape[0], self.student_taps),
            (teacher, pairs[0].teacher, pairs[0].teacher_shape[0], self.teacher_taps),
        ):
            if (chosen is None and tap != "maps") or vector_shape(facts, "pooled") != (channels,):
                advice = (
                    f"the classifier of {facts.name} does not take in the mean of such maps: take a network that ends "
                    f"with global average pooling, or another method"
                )
                raise mismatch("cat", task, pairs[0], advice)
        return CAT(self, pairs[0])


@final
class CAT(Objective[DistillStep]):
    """Match the teacher's class activation maps; see :func:`class_attention_distance`.

    They are made by the classifiers of both networks; the student's learns from them too.
    """

    name = "cat"

    def __init__(self, config: CATConfig, pair: TapPair) -> None:
        super().__init__()
        self.config = config
        self.pair = pair
        self.features = (pair.student,)
        self.teacher_features = (pair.teacher,)

    def forward(self, step: DistillStep) -> Tensor:
        """Return the mean distance of the batch."""
        (own,), (wanted,) = student_maps(step, [self.pair]), teacher_maps(step, [self.pair])
        return class_attention_distance(
            self._class_maps(own, student_parts(step).classifier),
            self._class_maps(wanted, teacher_parts(step).classifier),
            resolution=self.config.resolution,
            normalize=self.config.normalize,
        ).mean()

    def _class_maps(self, maps: Tensor, classifier: nn.Linear) -> Tensor:
        # The classifier is linear: pooled first, there are fewer places to apply it to.
        pooled = F.adaptive_avg_pool2d(maps, self.config.resolution)
        return class_activation_maps(pooled, classifier.weight, classifier.bias)


# The authors' weights for normalised maps on CIFAR-100: with 2x2 maps 40 for ResNet50 -> MobileNetV2, which is taken
# here, and 15 for VGG13 -> MobileNetV2; with 4x4 maps 80 for WRN-40-2 -> ShuffleNetV1 and 600 for ResNet32x4 ->
# ShuffleNetV1 and V2. Without normalising, 2x2: ResNet32x4 -> ResNet8x4 15, WRN-40-2 -> WRN-16-2 12, VGG13 -> VGG8 4.5,
# ResNet110 -> ResNet32 1.8, WRN-40-2 -> WRN-40-1 1.5, ResNet56 -> ResNet20 0.7.
METHOD = Method(
    name="cat",
    role="student",
    title="Class attention transfer: the student sees each class in the same places as the teacher",
    venue="CVPR 2023",
    source="Guo, Yan, Li and Lin, CVPR 2023, arXiv:2304.12777; weight and resolution of the authors' code for "
    "ResNet50 -> MobileNetV2",
    differs="By default maps are normalised, with one weight; the authors choose both by the pair and do not normalise "
    "within a family. The classifiers' biases are part of the maps, so that their mean is the logit; the "
    "authors rebuild their networks with classifiers that have none.",
    terms={"cross_entropy": {}, "cat": {"weight": 40.0}},
)
