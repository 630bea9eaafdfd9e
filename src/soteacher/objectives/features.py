"""Which features of student and teacher an objective compares, and in which form."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import isqrt
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from soteacher.errors import InputError
from soteacher.objective import ObjectiveConfig
from soteacher.precision import at_least_float32
from soteacher.types import DistillStep, NetworkFacts, NetworkParts, Step, Task

MOST_PREFIX_TOKENS = 8
"""Class, distillation and register tokens of a transformer; more than these left over is no square of patches."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TapPair:
    """A feature of the student and the one of the teacher that it is compared with."""

    student: str
    teacher: str
    student_shape: tuple[int, ...]
    """``(C, H, W)`` of maps (tokens as :func:`as_maps` gives them), or ``(D,)`` of vectors."""
    teacher_shape: tuple[int, ...]


class FeatureConfig(ObjectiveConfig):
    """Settings that all objectives on features share: which taps. Subclasses say which they are by default."""

    needs_teacher: ClassVar[bool] = True
    default_taps: ClassVar[Literal["stages", "second_stage", "last_stage", "preactivations", "maps", "pooled"]] = (
        "stages"
    )
    """``stages``: all, paired from the deepest back; ``second_stage``: the pair of the student's second, as is usual
    for hints; ``last_stage``; ``preactivations``: as ``stages``, of networks that have them the preactivations;
    ``maps``: what the last pooling takes in, else the last stage; ``pooled``: what the classifier takes in."""

    student_taps: tuple[str, ...] | None = None
    """Taps of the student, from shallow to deep; null: the objective's own choice, which its page says."""
    teacher_taps: tuple[str, ...] | None = None
    """Taps of the teacher that these are compared with, one by one; null: the objective's own choice."""

    def pairs(self, task: Task) -> tuple[TapPair, ...]:
        """Return the pairs of features, from shallow to deep.

        Raises:
            InputError: a network has no such tap, or one side has more taps than the other.
        """
        student, teacher = facts_of(task)
        chosen = self.student_taps is not None and self.teacher_taps is not None
        default = [] if chosen else _default_pairs(self.default_taps, student, teacher)
        student_taps = [pair[0] for pair in default] if self.student_taps is None else self.student_taps
        teacher_taps = [pair[1] for pair in default] if self.teacher_taps is None else self.teacher_taps
        if len(student_taps) != len(teacher_taps) or not student_taps:
            raise InputError(
                f"as many taps of the student as of the teacher are wanted, at least one: got "
                f"{', '.join(student_taps) or 'none'} of {student.name} and {', '.join(teacher_taps) or 'none'} of "
                f"{teacher.name}; set student_taps and teacher_taps"
            )
        form = vector_shape if self.default_taps == "pooled" else map_shape
        return tuple(
            TapPair(student=s, teacher=t, student_shape=form(student, s), teacher_shape=form(teacher, t))
            for s, t in zip(student_taps, teacher_taps, strict=True)
        )


def facts_of(task: Task) -> tuple[NetworkFacts, NetworkFacts]:
    """Return what is known of student and teacher.

    Raises:
        InputError: the task does not say it.
    """
    if task.network is None or task.teacher is None:
        raise InputError("an objective on features needs to know both networks: give Task(network=..., teacher=...)")
    return task.network, task.teacher


def stages(facts: NetworkFacts) -> list[str]:
    """Return a network's stages, from shallow to deep."""
    return [tap for tap in facts.taps if tap.startswith("stage")]


def _default_pairs(kind: str, student: NetworkFacts, teacher: NetworkFacts) -> list[tuple[str, str]]:
    """Return the taps that an objective compares where the settings do not say it."""
    if kind == "pooled":
        return [("pooled", "pooled")]
    paired = list(zip(reversed(stages(student)), reversed(stages(teacher)), strict=False))[::-1]
    if not paired:
        bare = teacher if stages(student) else student
        raise InputError(f"{bare.name} names no stages; set student_taps and teacher_taps to paths of modules")
    if kind == "maps":
        return [(_last_maps(student, paired[-1][0]), _last_maps(teacher, paired[-1][1]))]
    if kind == "last_stage":
        return paired[-1:]
    if kind == "second_stage":
        return [next((pair for pair in paired if pair[0] == "stage2"), paired[-1])]
    if kind == "preactivations":
        return [(_before_rectifier(student, s), _before_rectifier(teacher, t)) for s, t in paired]
    return paired


def _last_maps(facts: NetworkFacts, last_stage: str) -> str:
    return "maps" if "maps" in list(facts.taps) else last_stage


def _before_rectifier(facts: NetworkFacts, stage: str) -> str:
    tap = stage.replace("stage", "preactivation")
    return tap if tap in list(facts.taps) else stage


def map_shape(facts: NetworkFacts, tap: str) -> tuple[int, int, int]:
    """Return ``(C, H, W)`` of a tap's maps, as :func:`as_maps` gives them.

    Raises:
        InputError: there is no such tap, or it gives neither maps nor tokens.
    """
    shape = facts.taps[tap]
    if len(shape) == 3:
        return (shape[0], shape[1], shape[2])
    if len(shape) == 2:
        side = _patch_side(shape[0], f"{facts.name}, tap {tap!r}")
        return (shape[1], side, side)
    if len(shape) == 1:
        return (shape[0], 1, 1)
    raise InputError(f"{facts.name}, tap {tap!r}: wanted maps (C, H, W) or tokens (N, D), got {shape}")


def vector_shape(facts: NetworkFacts, tap: str) -> tuple[int]:
    """Return ``(D,)`` of a tap's vectors, as :func:`as_vectors` gives them.

    Raises:
        InputError: there is no such tap, or it gives neither vectors nor something that can be averaged to them.
    """
    shape = facts.taps[tap]
    return (shape[0],) if len(shape) == 1 else (map_shape(facts, tap)[0],)


def as_maps(feature: Tensor) -> Tensor:
    """Return a feature as maps ``[B, C, H, W]`` in at least single precision.

    Args:
        feature: maps as they are; tokens ``[B, N, D]``, whose leading class and register tokens are left out and whose
            patches form a square; vectors ``[B, D]``, maps of one pixel.

    Raises:
        InputError: another shape, or tokens that form no square.
    """
    feature = at_least_float32(feature)
    if feature.ndim == 4:
        return feature
    if feature.ndim == 2:
        return feature[:, :, None, None]
    if feature.ndim != 3:
        raise InputError(f"wanted maps [B, C, H, W], tokens [B, N, D] or vectors [B, D], got {list(feature.shape)}")
    side = _patch_side(feature.shape[1], "tokens")
    return feature[:, -side * side :].transpose(1, 2).unflatten(2, (side, side))


def as_vectors(feature: Tensor) -> Tensor:
    """Return a feature as vectors ``[B, D]`` in at least single precision: maps and patches are averaged."""
    return at_least_float32(feature) if feature.ndim == 2 else as_maps(feature).mean(dim=(2, 3))


def _patch_side(num_tokens: int, where: str) -> int:
    side = isqrt(num_tokens)
    if num_tokens - side * side > MOST_PREFIX_TOKENS:
        raise InputError(f"{where}: {num_tokens} tokens form no square of patches; choose another tap")
    return side


def student_maps(step: Step, pairs: Sequence[TapPair]) -> list[Tensor]:
    """Return the student's side of the pairs as maps."""
    return [as_maps(step.outputs.features[pair.student]) for pair in pairs]


def teacher_maps(step: DistillStep, pairs: Sequence[TapPair]) -> list[Tensor]:
    """Return the teacher's side of the pairs as maps; constants."""
    return [as_maps(step.teacher.features[pair.teacher].detach()) for pair in pairs]


def resize(maps: Tensor, size: tuple[int, int]) -> Tensor:
    """Return maps of another height and width: larger ones averaged down, smaller ones interpolated bilinearly."""
    if maps.shape[-2:] == size:
        return maps
    if maps.shape[-2] >= size[0] and maps.shape[-1] >= size[1]:
        return F.adaptive_avg_pool2d(maps, size)
    return F.interpolate(maps, size=size, mode="bilinear", align_corners=False)


def to_smaller(first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    """Return two maps with the smaller height and width of both."""
    size = (min(first.shape[-2], second.shape[-2]), min(first.shape[-1], second.shape[-1]))
    return resize(first, size), resize(second, size)


def mismatch(objective: str, task: Task, pair: TapPair, advice: str) -> InputError:
    """Return the error for a pair of features that an objective cannot compare.

    Args:
        objective: its name.
        task: says what the networks are called.
        pair: the features.
        advice: what is wanted, and what to do.
    """
    student, teacher = facts_of(task)
    return InputError(
        f"{objective}: tap {pair.student!r} of {student.name} is {list(pair.student_shape)} and tap "
        f"{pair.teacher!r} of {teacher.name} is {list(pair.teacher_shape)}; {advice}"
    )


def student_parts(step: Step) -> NetworkParts:
    """Return the pieces of the network in training.

    Raises:
        InputError: the loop does not give them.
    """
    if step.parts is None:
        raise InputError("this objective sends features through the student: the step must have parts=...")
    return step.parts


def teacher_parts(step: DistillStep) -> NetworkParts:
    """Return the pieces of the teacher.

    Raises:
        InputError: the loop does not give them: stored answers have no network behind them.
    """
    if step.teacher_parts is None:
        raise InputError("this objective sends features through the teacher: it needs a live one, teacher_parts=...")
    return step.teacher_parts


def own_generator(step: Step, device: torch.device) -> torch.Generator:
    """Return the generator of an objective's own draws: the same in every look at the step, another in the next."""
    return torch.Generator(device=device).manual_seed(step.seed)
