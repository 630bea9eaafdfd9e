"""Logits of student and teacher as the functions on them take them in: checked, the target's apart from the others'."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from soteacher.errors import InputError


def check_logits(student_logits: Tensor, teacher_logits: Tensor, labels: Tensor | None = None) -> None:
    """Refuse logits that cannot be compared; the labels' values are not looked at, a GPU would have to wait for it.

    Args:
        student_logits: ``[B, K]``.
        teacher_logits: ``[B, K]``.
        labels: ``[B]`` class ids, for functions that set the target apart; they need two classes at least.

    Raises:
        InputError: the shapes differ or are not these, or the labels are no integers.
    """
    if student_logits.ndim != 2 or student_logits.shape != teacher_logits.shape:
        raise InputError(
            f"student and teacher logits must have one shape [B, K], got {list(student_logits.shape)} (student) and "
            f"{list(teacher_logits.shape)} (teacher)"
        )
    if labels is None:
        return
    if labels.shape != student_logits.shape[:1] or labels.is_floating_point():
        raise InputError(
            f"labels must be integer class ids [{student_logits.shape[0]}], got {list(labels.shape)} of {labels.dtype}"
        )
    if student_logits.shape[1] < 2:
        raise InputError(
            f"the target is set apart from the other classes: at least 2 are wanted, got logits "
            f"{list(student_logits.shape)}"
        )


def check_positive(**numbers: float) -> None:
    """Refuse numbers that are not positive and finite.

    Args:
        numbers: by the name that the message says.

    Raises:
        InputError: one of them is zero, negative, infinite or no number.
    """
    for name, number in numbers.items():
        if not number > 0 or not math.isfinite(number):
            raise InputError(f"{name} must be positive and finite, got {number}")


def target_logits(logits: Tensor, labels: Tensor) -> Tensor:
    """Return each example's logit of its own class: ``[B]`` of logits ``[B, K]`` and labels ``[B]``."""
    return logits.gather(1, labels.long()[:, None]).squeeze(1)


def other_logits(logits: Tensor, labels: Tensor) -> Tensor:
    """Return each example's logits of the other classes, in their order: ``[B, K - 1]``.

    Left out, not set to a large negative number: no temperature is then too high for it.
    """
    places = torch.arange(logits.shape[1] - 1, device=logits.device)
    return torch.where(places < labels[:, None], logits[:, :-1], logits[:, 1:])
