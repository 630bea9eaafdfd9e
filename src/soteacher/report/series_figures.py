"""The figures of a series of studies: read from its results by point, arm and seed."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from soteacher.report.record import Role

Seeds = dict[int, float]
"""A figure of the networks of one arm, by seed."""
Results = Mapping[str, Any]
"""What the ``results.json`` of a series holds."""
Pair = tuple[float, float]
"""How much farther a teacher is from what it should be than the reference, and how much higher its student's figure."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Quantity:
    """A figure of a network's row, or of its card."""

    role: Role
    key: str
    """In the row, or a path in the card's figures."""
    title: str
    unit: str
    percent: bool = False
    """Whether it is a fraction, shown as per cent."""


QUANTITIES = (
    Quantity(role="teacher", key="distance.train.mse", title="Distance of the teachers on training inputs",
             unit="squared distance to the true distribution"),
    Quantity(role="teacher", key="distance.train.kl", title="Divergence of the teachers on training inputs",
             unit="KL from the true distribution, nats"),
    Quantity(role="teacher", key="distance.train.total_variation", title="Total variation of the teachers",
             unit="total variation on training inputs"),
    Quantity(role="teacher", key="distance.test.mse", title="Distance of the teachers on test inputs",
             unit="squared distance to the true distribution"),
    Quantity(role="teacher", key="distance.train_out_of_fold.mse", title="Distance of the teachers to the proxy",
             unit="squared distance to out-of-fold predictions"),
    Quantity(role="teacher", key="lipschitz.input_gradient_mean", title="Slope of the teachers on training inputs",
             unit="mean norm of the input gradient"),
    Quantity(role="teacher", key="views.prediction_variance", title="Variance of the teachers over augmented views",
             unit="variance of predictions"),
    Quantity(role="teacher", key="train_accuracy", title="Train accuracy of the teachers",
             unit="accuracy, %", percent=True),
    Quantity(role="teacher", key="accuracy_last", title="Test accuracy of the teachers",
             unit="accuracy, %", percent=True),
    Quantity(role="teacher", key="nll", title="Test NLL of the teachers", unit="NLL, nats"),
    Quantity(role="student", key="accuracy_last", title="Test accuracy of the students",
             unit="accuracy, %", percent=True),
    Quantity(role="student", key="nll", title="Test NLL of the students", unit="NLL, nats"),
)  # fmt: skip
"""What is drawn, in this order; a figure that no network has is left out."""
CLOSENESS = ("distance.train.mse", "distance.train_out_of_fold.mse", "nll")
"""What says how good a teacher is without a student: the first that teachers have. Lower is better."""
ACCURACY, NLL = (one for one in QUANTITIES if one.role == "student")
"""What students are judged by. NLL also counts how sure they are, and so shows smaller gains than accuracy does."""


def value_of(row: Mapping[str, Any], key: str) -> float | None:
    """Return a figure of a row or of its card; None where neither has it."""
    return row.get(key, row.get("card", {}).get(key))


def by_arm(point: Mapping[str, Any], role: str, key: str) -> dict[str, Seeds]:
    """Return a figure of a point's networks of one role, by arm and seed."""
    arms: dict[str, Seeds] = {}
    for row in point["rows"]:
        value = value_of(row, key)
        if row["role"] == role and value is not None:
            arms.setdefault(row["arm"], {})[row["seed"]] = value
    return arms


def along(results: Results, axis: str) -> list[tuple[str, Mapping[str, Any]]]:
    """Return the points of an axis that have results, in the axis' order, each with its value in words."""
    values = results["axes"][axis]
    points = [point for point in results["points"] if axis in point["on"]]
    points.sort(key=lambda point: values.index(point["on"][axis]))
    return [(str(point["on"][axis]), point) for point in points]


def reference_teacher(results: Results) -> str | None:
    """Return the teacher that the others are compared with.

    It is that of the baseline student, else the one called ``standard``, else the first; None without teachers.
    """
    rows = [row for point in results["points"] for row in point["rows"]]
    baselines = [entry["baseline"] for point in results["points"] for entry in point["summary"] if entry["baseline"]]
    teachers = dict.fromkeys(row["arm"] for row in rows if row["role"] == "teacher")
    of_baselines = [row["teacher_arm"] for row in rows if row["role"] == "student" and row["arm"] in baselines]
    return next((arm for arm in (*of_baselines, "standard", *teachers) if arm in teachers), None)


def closeness(results: Results) -> Quantity:
    """Return the figure that says how good a teacher is without a student: the first of :data:`CLOSENESS` there is."""
    rows = [row for point in results["points"] for row in point["rows"] if row["role"] == "teacher"]
    found = (key for key in CLOSENESS if any(value_of(row, key) is not None for row in rows))
    key = next(found, CLOSENESS[-1])
    return next(one for one in QUANTITIES if one.role == "teacher" and one.key == key)


def students_of(point: Mapping[str, Any]) -> dict[str, dict[str, str]]:
    """Return the distilled students of a point: student to teacher to arm."""
    found: dict[str, dict[str, str]] = {}
    for row in point["rows"]:
        if row["role"] == "student" and row["teacher_arm"] is not None:
            student = row["arm"].removeprefix(f"{row['teacher_arm']}-")
            found.setdefault(student, {})[row["teacher_arm"]] = row["arm"]
    return found


def pairs_by_point(results: Results, student: str, judged: Quantity) -> list[dict[str, list[Pair]]]:
    """Return, for each point, how every teacher but the reference and its student differ from those of the reference.

    Differences are taken within a point and a seed, so that nothing that an axis changes for all teachers alike is in
    them. A point without a pair has an empty entry.

    Args:
        results: of the series.
        student: the student's name in the studies.
        judged: what the students are judged by.

    Returns:
        Teacher to its pairs, one for each seed: differences of the teachers' :func:`closeness`, and of their students'
        figures.
    """
    reference, key = reference_teacher(results), closeness(results).key
    return [_pairs(point, student, judged, reference or "", key) for point in results["points"]]


def _pairs(point: Mapping[str, Any], student: str, judged: Quantity, reference: str, key: str) -> dict[str, list[Pair]]:
    teachers, students = by_arm(point, "teacher", key), by_arm(point, "student", judged.key)
    arms = students_of(point).get(student, {})
    base, base_student = teachers.get(reference, {}), students.get(arms.get(reference, ""), {})
    pairs: dict[str, list[Pair]] = {}
    for teacher, arm in arms.items():
        own, own_student = teachers.get(teacher, {}), students.get(arm, {})
        shared = own.keys() & own_student.keys() & base.keys() & base_student.keys()
        if shared and teacher != reference:
            pairs[teacher] = [(own[seed] - base[seed], own_student[seed] - base_student[seed]) for seed in shared]
    return pairs


def arm_means(points: Iterable[Mapping[str, Sequence[Pair]]]) -> dict[str, Pair]:
    """Return one pair for each teacher: its mean over the seeds of all points given.

    A teacher is one pair, however many seeds and points it has: its networks resemble one another, and counted one by
    one they would make an interval narrower than it is.
    """
    pairs: dict[str, list[Pair]] = {}
    for point in points:
        for teacher, own in point.items():
            pairs.setdefault(teacher, []).extend(own)
    return {
        # Rounded, since equal means that differ in their last bit would have different ranks.
        teacher: (round(fmean(distance for distance, _ in own), 12), round(fmean(gain for _, gain in own), 12))
        for teacher, own in pairs.items()
    }
