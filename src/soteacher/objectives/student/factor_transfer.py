"""Factor transfer: the student's translated maps match the teacher's paraphrased ones."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, final

import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from soteacher.errors import InputError
from soteacher.objective import Method, Objective
from soteacher.objectives.features import FeatureConfig, TapPair, student_maps, teacher_maps, to_smaller
from soteacher.objectives.student.paraphraser import FactorEncoder, Paraphraser
from soteacher.precision import at_least_float32, full_precision
from soteacher.types import DistillStep, Task

EPSILON = 1e-12
"""The smallest length of a factor that is divided by."""


def factor_distance(student_factor: Tensor, teacher_factor: Tensor) -> Tensor:
    r"""Mean absolute distance of the normalised factors, one value per example.

    .. math:: \frac{1}{H W} \left\| \frac{q(f_s)}{\|q(f_s)\|_2} - \frac{q(f_t)}{\|q(f_t)\|_2} \right\|_1,
        \quad q(f)_{hw} = \frac{1}{C} \sum_c f_{chw}^2

    Args:
        student_factor: ``[B, C, H, W]``; gradients flow.
        teacher_factor: ``[B, C', H', W']``; a constant. Where sizes differ, both are brought to the smaller one.

    Returns:
        ``[B]``, float32 (float64 from float64 factors); 0 where the factors agree up to a factor of each example.

    Raises:
        InputError: a factor is not ``[B, C, H, W]``, or the batches differ.

    Source: Kim, Park and Kwak, NeurIPS 2018, arXiv:1802.04977. The mean square over the channels is that of
    the benchmark of Tian et al. 2020, arXiv:1910.10699; the authors' code normalises all channels together, unsquared.
    """
    if student_factor.ndim != 4 or teacher_factor.ndim != 4 or len(student_factor) != len(teacher_factor):
        raise InputError(
            f"factors must be [B, C, H, W] of one batch, got {list(student_factor.shape)} (student) and "
            f"{list(teacher_factor.shape)} (teacher)"
        )
    student, teacher = to_smaller(at_least_float32(student_factor), at_least_float32(teacher_factor.detach()))
    return (_normalized(student) - _normalized(teacher)).abs().mean(dim=1)


def _normalized(factor: Tensor) -> Tensor:
    return F.normalize(factor.square().mean(dim=1).flatten(1), dim=1, eps=EPSILON)


class FactorTransferConfig(FeatureConfig):
    """Settings of :class:`FactorTransfer`."""

    takes_over: ClassVar[str | None] = "paraphraser"
    default_taps = "last_stage"
    factor_rate: float = Field(default=0.5, gt=0)
    """Channels of the factors as a share of the teacher's channels; the same as that of ``paraphraser``."""

    def build(self, task: Task) -> FactorTransfer:
        """Return the objective with its translator.

        Raises:
            InputError: there are no such taps, or more than one pair of them.
        """
        pairs = self.pairs(task)
        if len(pairs) != 1:
            raise InputError(f"factor_transfer compares one pair of taps, got {len(pairs)}")
        return FactorTransfer(self, pairs[0])


@final
class FactorTransfer(Objective[DistillStep]):
    """Match the teacher's factors; see :func:`factor_distance`.

    The student's maps go through a translator that is trained with the student, the teacher's through the encoder of
    the paraphraser, which :meth:`start` takes over from the preparation and which stays as it is.
    """

    name = "factor_transfer"

    def __init__(self, config: FactorTransferConfig, pair: TapPair) -> None:
        super().__init__()
        self.config = config
        self.pair = pair
        self.features = (pair.student,)
        self.teacher_features = (pair.teacher,)
        channels = pair.teacher_shape[0]
        factors = max(1, int(channels * config.factor_rate))
        self.translator = FactorEncoder(pair.student_shape[0], factors, normalize=True)
        self.paraphraser = FactorEncoder(channels, factors, normalize=False).requires_grad_(False)

    def start(self, prepared: Mapping[str, Objective[Any]]) -> None:
        """Take over the encoder of the preparation's paraphraser.

        Raises:
            InputError: there is none, or it is made for another tap or another rate.
        """
        found = prepared.get("paraphraser")
        if not isinstance(found, Paraphraser):
            raise InputError(
                "factor_transfer takes over a trained paraphraser: add the term 'paraphraser: {stage: preparation}'"
            )
        if found.teacher_features != self.teacher_features:
            raise InputError(
                f"factor_transfer reads tap {self.pair.teacher!r} of the teacher and its paraphraser "
                f"{found.teacher_features[0]!r}; give both the same one"
            )
        if found.config.factor_rate != self.config.factor_rate:
            raise InputError(
                f"factor_transfer has factor_rate {self.config.factor_rate} and its paraphraser "
                f"{found.config.factor_rate}; give both the same one"
            )
        self.paraphraser.load_state_dict(found.encoder.state_dict())

    def forward(self, step: DistillStep) -> Tensor:
        """Return the mean distance of the batch."""
        (own,), (wanted,) = student_maps(step, [self.pair]), teacher_maps(step, [self.pair])
        with full_precision(own):
            return factor_distance(self.translator(own), self.paraphraser(wanted)).mean()


METHOD = Method(
    name="factor_transfer",
    role="student",
    title="Factor transfer: the student's translated maps match the teacher's, paraphrased by an autoencoder",
    venue="NeurIPS 2018",
    source="Kim, Park and Kwak, NeurIPS 2018, arXiv:1802.04977; loss and weights of Tian et al., ICLR 2020, "
    "arXiv:1910.10699",
    differs="Loss, weight (200) and the translator's normalisation are the benchmark's; the authors' code compares all "
    "channels unsquared with a weight of 500, rebuilds by absolute distances and normalises nowhere. The benchmark "
    "prepares some students' paraphrasers at a learning rate of 0.01, here it is the recipe's.",
    terms={"cross_entropy": {}, "paraphraser": {"stage": "preparation"}, "factor_transfer": {"weight": 200.0}},
)
