"""Published accuracies of networks trained as teachers, as students and alone.

The numbers are those that a source prints, not ours. Sources differ in what they report (the last epoch, or the best on
the test images), in epochs, settings and teachers; a row says what is known of it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache
from importlib.resources import files
from typing import Literal, cast, get_args

from soteacher.errors import InputError
from soteacher.reference.table import fraction, read_rows

Role = Literal["teacher", "student"]
EpochReported = Literal["last", "best", "unknown"]

FILES = ("cifar100.csv", "other.csv")
COLUMNS = (
    *("data", "role", "method", "published_as", "teacher", "teacher_method", "student"),
    *("accuracy_percent", "std_percent", "epochs", "epoch_reported", "note", "source"),
)
NETWORK_ALIASES = {
    "ResNet18": "resnet18",
    "ResNet50": "resnet50",
    "MobileNetV2": "mobilenet_v2",
    **dict.fromkeys(("ShuffleV1", "ShuffleNetV1"), "shufflenet_v1"),
    **dict.fromkeys(("ShuffleV2", "ShuffleNetV2"), "shufflenet_v2"),
    "ShuffleV2x1.5": "shufflenet_v2_x1_5",
}
"""The field's spelling of networks that have another name here; the other names are the same."""
METHOD_ALIASES = {"soteacher_released": "soteacher"}
"""Methods that are another reading of the one whose numbers were published."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Published:
    """One published accuracy."""

    data: str
    """Data set, by its name in results."""
    role: Role
    """Whose accuracy it is."""
    method: str | None
    """How the network was trained, as a method of this package; None where it has no name here."""
    published_as: str
    """How it was trained, in the source's own words."""
    teacher: str | None
    """The teacher's network; None where it does not matter, see :func:`matching`."""
    teacher_method: str | None
    """How a distilled student's teacher was trained; None where it has no name here, and for other networks."""
    student: str | None
    """The student's network; None where it does not matter, see :func:`matching`."""
    accuracy: float
    """On the test images, a fraction in [0, 1]."""
    std: float | None
    """Standard deviation over the source's runs, a fraction; None where it names none."""
    epochs: int | None
    """Epochs of training; None where the source does not say."""
    epoch_reported: EpochReported
    """Which epoch the accuracy is of: the last, the best on the test images, or one that the source does not say."""
    note: str
    """What else is known of how the number came about."""
    source: str
    """Where it stands."""


def read_published(text: str, *, origin: str) -> tuple[Published, ...]:
    """Return the rows of a table of published accuracies.

    Args:
        text: the CSV file's text; accuracies and standard deviations are in per cent there.
        origin: the file, for messages.

    Raises:
        InputError: a line that cannot be used; it is named, with what it has and what was wanted.
    """
    return tuple(_row(row, place) for place, row in read_rows(text, COLUMNS, origin=origin))


def _row(row: dict[str, str], place: str) -> Published:
    """Return one line of a table, checked."""
    for column in ("data", "published_as", "teacher", "student", "source"):
        if not row[column]:
            raise InputError(f"{place}: {column} is empty; wanted a name")
    for column, words in (("role", get_args(Role)), ("epoch_reported", get_args(EpochReported))):
        if row[column] not in words:
            raise InputError(f"{place}: {column} must be {' or '.join(words)}, got {row[column]!r}")
    return Published(
        data=row["data"],
        role=cast("Role", row["role"]),
        method=row["method"] or None,
        published_as=row["published_as"],
        teacher=row["teacher"],
        teacher_method=row["teacher_method"] or None,
        student=row["student"],
        accuracy=fraction(row, "accuracy_percent", place),
        std=fraction(row, "std_percent", place) if row["std_percent"] else None,
        epochs=_epochs(row["epochs"], place) if row["epochs"] else None,
        epoch_reported=cast("EpochReported", row["epoch_reported"]),
        note=row["note"],
        source=row["source"],
    )


def _epochs(text: str, place: str) -> int:
    """Return a number of epochs."""
    if not text.isdecimal() or int(text) < 1:
        raise InputError(f"{place}: epochs must be a whole number above 0, got {text!r}")
    return int(text)


@cache
def published() -> tuple[Published, ...]:
    """Return every published accuracy of this package."""
    folder = files("soteacher.reference")
    texts = {name: (folder / name).read_text(encoding="utf-8") for name in FILES}
    return tuple(row for name, text in texts.items() for row in read_published(text, origin=name))


def network_name(name: str) -> str:
    """Return a network's name as the tables have it: the field's spelling, and timm's tag of weights, are no other.

    Args:
        name: for example ``MobileNetV2`` or ``timm/resnet34.a1_in1k``.
    """
    bare = name.partition(".")[0] if name.startswith("timm/") else name
    return NETWORK_ALIASES.get(bare, bare)


def matching(
    *, data: str, teacher: str | None, student: str | None, method: str, teacher_method: str = "standard"
) -> tuple[Published, ...]:
    """Return the published accuracies of a data set, a pair and a method, in the order of the tables.

    A distilled student has a teacher and a student. A network trained without another is told from its own name alone:
    sources print it once for each of its pairs, and rows that are equal but for the other network come once, with None
    in its place.

    Args:
        data: the data set.
        teacher: the teacher's network; None for a student trained alone.
        student: the student's network; None for a teacher.
        method: how the network was trained: a student's method, ``alone``, or a teacher's.
        teacher_method: how a distilled student's teacher was trained.

    Raises:
        InputError: neither a teacher nor a student.
    """
    if teacher is None and student is None:
        raise InputError("got neither a teacher nor a student; wanted at least one network")
    distilled = teacher is not None and student is not None
    wanted_method = METHOD_ALIASES.get(method, method)
    wanted_teacher_method = METHOD_ALIASES.get(teacher_method, teacher_method) if distilled else None
    found = [
        replace(row, teacher=None if teacher is None else row.teacher, student=None if student is None else row.student)
        for row in published()
        if (row.data, row.method, row.teacher_method) == (data, wanted_method, wanted_teacher_method)
        and (teacher is None or row.teacher == network_name(teacher))
        and (student is None or row.student == network_name(student))
        and row.role == ("teacher" if student is None else "student")
    ]
    return tuple(dict.fromkeys(found))
