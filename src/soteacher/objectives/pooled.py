"""Objectives that compare one vector of the student with one of the teacher for each example."""

from __future__ import annotations

from torch import Tensor

from soteacher.errors import InputError
from soteacher.objectives.features import FeatureConfig, TapPair, as_vectors
from soteacher.types import DistillStep, Task


def vector_pair(config: FeatureConfig, task: Task, objective: str) -> TapPair:
    """Return the one pair of features that an objective compares.

    Args:
        config: says which taps.
        task: says what the networks have.
        objective: its name, for messages.

    Raises:
        InputError: more than one pair, or a tap that there is not.
    """
    pairs = config.pairs(task)
    if len(pairs) != 1:
        raise InputError(
            f"{objective} compares one pair of features, got {len(pairs)} taps a side: "
            f"{', '.join(pair.student for pair in pairs)}; set student_taps and teacher_taps to one each"
        )
    return pairs[0]


def pair_vectors(step: DistillStep, pair: TapPair) -> tuple[Tensor, Tensor]:
    """Return a pair's features as vectors ``[B, D]`` in at least single precision; the teacher's are constants."""
    teacher = step.teacher.features[pair.teacher].detach()
    return as_vectors(step.outputs.features[pair.student]), as_vectors(teacher)
