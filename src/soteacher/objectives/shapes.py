"""What features that are compared must look like."""

from __future__ import annotations

from torch import Tensor

from soteacher.errors import InputError


def check_one_shape(student: Tensor, teacher: Tensor, what: str) -> None:
    """Refuse two features of different shapes.

    Args:
        student: of any shape with the batch first.
        teacher: the other one.
        what: how the message calls them, in the plural.

    Raises:
        InputError: the shapes differ, or there is no batch.
    """
    if student.ndim < 2 or student.shape != teacher.shape:
        raise InputError(f"{what} of student and teacher must have one shape [B, ...], {_came(student, teacher)}")


def check_maps(student: Tensor, teacher: Tensor) -> None:
    """Refuse what is not maps of the same examples; channels, heights and widths may differ.

    Raises:
        InputError: they are not ``[B, C, H, W]`` with one B.
    """
    if student.ndim != 4 or teacher.ndim != 4 or len(student) != len(teacher):
        raise InputError(f"maps of student and teacher must be [B, C, H, W] with one B, {_came(student, teacher)}")


def check_vectors(student: Tensor, teacher: Tensor) -> None:
    """Refuse what is not vectors of the same examples; their dimensions may differ.

    Raises:
        InputError: they are not ``[B, D]`` with one B.
    """
    if student.ndim != 2 or teacher.ndim != 2 or len(student) != len(teacher):
        raise InputError(f"embeddings of student and teacher must be [B, D] with one B, {_came(student, teacher)}")


def _came(student: Tensor, teacher: Tensor) -> str:
    return f"got {list(student.shape)} (student) and {list(teacher.shape)} (teacher)"
