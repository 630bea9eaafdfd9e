"""A series of studies in tables and sentences: paired differences, changes along an axis, one rank correlation."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from statistics import fmean
from typing import Any, Literal

from soteacher.report.cards import correlation_words
from soteacher.report.series_figures import (
    ACCURACY,
    Quantity,
    Results,
    Seeds,
    along,
    by_arm,
    closeness,
    pairs_within_points,
    reference_teacher,
    students_of,
)
from soteacher.report.tables import Table, interval, percent, signed_points
from soteacher.statistics import PairedDifference, RankCorrelation, paired_difference, rank_correlation, verdict


def _words(quantity: Quantity) -> tuple[Callable[[float], str], Callable[[float], str]]:
    """Return how values of a quantity, and how their differences are written."""
    return (percent, signed_points) if quantity.percent else (_figure, _signed)


def _figure(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


def _signed(value: float) -> str:
    text = f"{value:+.4f}"
    return "+0.0000" if text == "-0.0000" else text


def _difference(difference: PairedDifference, write: Callable[[float], str]) -> str:
    return "-" if difference.mean is None else write(difference.mean) + interval(difference.ci95, write)


def difference_table(results: Results, axis: str) -> Table:
    """Return every teacher of every point of an axis: its closeness and its student, both against the reference's."""
    quantity, reference, points = closeness(results), reference_teacher(results), along(results, axis)
    students = list(dict.fromkeys(student for _, point in points for student in students_of(point)))
    rows: list[tuple[str, ...]] = []
    for value, point in points:
        teachers = by_arm(point, "teacher", quantity.key)
        entries = {entry["arm"]: entry for entry in point["summary"]}
        for teacher, own in teachers.items():
            cells = [
                value,
                teacher,
                _figure(fmean(own.values())),
                *_compared(own, teachers.get(reference or "", {}), same=teacher == reference),
            ]
            for student in students:
                cells += _student_cells(entries.get(students_of(point).get(student, {}).get(teacher, "")))
            rows.append(tuple(cells))
    return Table(
        columns=(
            axis, "teacher", quantity.unit, f"difference to {reference} [95 % interval]", "teacher is",
            *(f"{student}: {column}" for student in students
              for column in ("student accuracy, %", "difference to baseline, points [95 % interval]", "student is")),
        ),
        rows=tuple(rows),
        numeric=(True, False, True, True, False, *[True, True, False] * len(students)),
    )  # fmt: skip


def _compared(own: Seeds, base: Seeds, *, same: bool) -> tuple[str, str]:
    """Return the paired difference of a figure of which less is better, and the verdict."""
    if same:
        return "-", "-"
    return _difference(paired_difference(own, base), _signed), verdict(paired_difference(base, own))


def _student_cells(entry: Mapping[str, Any] | None) -> tuple[str, str, str]:
    if entry is None or entry["difference_mean"] is None:
        return percent(entry["accuracy_mean"] if entry else None), "-", "-"
    difference = signed_points(entry["difference_mean"]) + interval(entry["difference_ci95"], signed_points)
    return percent(entry["accuracy_mean"]), difference, entry["verdict"]


def trend_table(results: Results, axis: str) -> Table:
    """Return how teachers' closeness and students' accuracies change from the first to the last value of an axis."""
    points = along(results, axis)
    (first, start), (last, end) = points[0], points[-1]
    rows: list[tuple[str, ...]] = []
    for quantity in (closeness(results), ACCURACY):
        write, write_difference = _words(quantity)
        ends = by_arm(end, quantity.role, quantity.key)
        for arm, before in by_arm(start, quantity.role, quantity.key).items():
            if arm in ends:
                change = paired_difference(ends[arm], before)
                direction = {"better": "rises", "worse": "falls"}.get(verdict(change), "inconclusive")
                means = (write(fmean(before.values())), write(fmean(ends[arm].values())))
                rows.append(
                    (f"{quantity.role} {arm}", quantity.unit, *means, _difference(change, write_difference), direction)
                )
    return Table(
        columns=("arm", "figure", f"at {first}", f"at {last}", "change [95 % interval]", "it"),
        rows=tuple(rows) if len(points) > 1 else (),
        numeric=(False, False, True, True, True, False),
    )


def correlation_sentences(results: Results) -> list[dict[str, str]]:
    """Return for each student whether students of closer teachers were better, as reason and verdict."""
    sentences: list[dict[str, str]] = []
    reference, quantity = reference_teacher(results), closeness(results)
    for student in dict.fromkeys(name for point in results["points"] for name in students_of(point)):
        distances, accuracies = pairs_within_points(results, student)
        found = rank_correlation(distances, accuracies)
        if found.value is None:
            continue
        reason = (
            f"{student}: over {found.count} teachers, each against {reference} of its point and seed, the rank "
            f"correlation of {quantity.unit} with student accuracy is {correlation_words(found)}; "
            "students of closer teachers are"
        )
        sentences.append({"reason": reason, "verdict": _judged(found)})
    return sentences


def _judged(found: RankCorrelation) -> Literal["better", "worse", "inconclusive"]:
    """Return what a correlation of distance and accuracy says of students of closer teachers."""
    if found.interval is None or found.interval[0] <= 0 <= found.interval[1]:
        return "inconclusive"
    return "better" if found.interval[1] < 0 else "worse"


def tally_table(results: Results) -> Table:
    """Return for each teacher but the reference in how many points it and its students were better or worse."""
    reference, quantity = reference_teacher(results), closeness(results)
    counts: dict[str, dict[str, list[int]]] = {}
    for point in results["points"]:
        teachers = by_arm(point, "teacher", quantity.key)
        entries = {entry["arm"]: entry for entry in point["summary"]}
        for teacher, own in teachers.items():
            if teacher == reference:
                continue
            found = {"teacher": verdict(paired_difference(teachers.get(reference or "", {}), own))}
            for student, arms in students_of(point).items():
                entry = entries.get(arms.get(teacher, ""), {})
                found |= {student: entry["verdict"]} if entry.get("verdict") else {}
            for what, judged in found.items():
                tally = counts.setdefault(teacher, {}).setdefault(what, [0, 0, 0])
                tally[("better", "worse", "inconclusive").index(judged)] += 1
    headings = list(dict.fromkeys(what for found in counts.values() for what in found))
    return Table(
        columns=("teacher", *(f"{what}: better / worse / inconclusive" for what in headings)),
        rows=tuple(
            (teacher, *(" / ".join(map(str, found[what])) if what in found else "-" for what in headings))
            for teacher, found in counts.items()
        ),
        numeric=(False, *[True] * len(headings)),
    )
