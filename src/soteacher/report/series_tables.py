"""A series of studies in tables and sentences: paired differences, changes along an axis, rank correlations."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from statistics import fmean
from typing import Any, Literal

from soteacher.report.correlations import correlation_words
from soteacher.report.series_figures import (
    ACCURACY,
    NLL,
    Pair,
    Quantity,
    Results,
    Seeds,
    along,
    arm_means,
    by_arm,
    closeness,
    pairs_by_point,
    reference_teacher,
    students_of,
)
from soteacher.report.tables import Table, interval, percent, signed, signed_points
from soteacher.statistics import (
    MIN_CORRELATED_PAIRS,
    PairedDifference,
    RankCorrelation,
    Verdict,
    paired_difference,
    rank_correlation,
    verdict,
)

CorrelationVerdict = Literal["they go together", "they go against each other", "inconclusive"]
"""What is said of a teacher's distance and its student's figure."""
_JUDGED = (ACCURACY, NLL)


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
    """Return for each student, by accuracy and by NLL, whether it goes with its teachers' distance: reason, verdict.

    A kind of teacher (arm) is one pair, the mean of its differences to the reference over points and seeds. Where there
    are too few of them, one sentence says so.
    """
    sentences: list[dict[str, str]] = []
    for student in _students(results):
        means = [(judged, arm_means(pairs_by_point(results, student, judged))) for judged in _JUDGED]
        most = max(len(arms) for _, arms in means)
        if 0 < most < MIN_CORRELATED_PAIRS:
            sentences.append(_too_few(results, student, most))
            continue
        for judged, arms in means:
            found = _correlation(arms.values())
            if found.value is not None:
                sentences.append({"reason": _reason(results, student, judged, found), "verdict": _judged(found)})
    return sentences


def _students(results: Results) -> list[str]:
    return list(dict.fromkeys(name for point in results["points"] for name in students_of(point)))


def _correlation(pairs: Iterable[Pair]) -> RankCorrelation:
    pairs = list(pairs)
    return rank_correlation([distance for distance, _ in pairs], [gain for _, gain in pairs])


def _reason(results: Results, student: str, judged: Quantity, found: RankCorrelation) -> str:
    return (
        f"{student}: over {found.count} kinds of teachers, each the mean of its differences to "
        f"{reference_teacher(results)} at the same point and seed, the teacher's {closeness(results).unit} and the "
        f"student's test {_word(judged)} have the rank correlation {correlation_words(found)}:"
    )


def _too_few(results: Results, student: str, most: int) -> dict[str, str]:
    reason = (
        f"{student}: a rank correlation with the teacher's {closeness(results).unit} takes {MIN_CORRELATED_PAIRS} "
        f"kinds of teachers (arms) besides {reference_teacher(results)}; there {'is' if most == 1 else 'are'} {most}:"
    )
    return {"reason": reason, "verdict": "not judged"}


def _word(judged: Quantity) -> str:
    return "accuracy" if judged is ACCURACY else "NLL"


def _judged(found: RankCorrelation) -> CorrelationVerdict:
    """Return what a correlation's interval allows to say."""
    if found.interval is None or found.interval[0] <= 0 <= found.interval[1]:
        return "inconclusive"
    return "they go together" if found.interval[0] > 0 else "they go against each other"


def within_points_table(results: Results) -> Table:
    """Return for each student and what it is judged by how its teachers' distance ranks it within single points.

    A point's rank correlation is over its teachers' means over seeds, the reference among them. Points with fewer than
    four teachers are left out. Points share their kinds of teachers, so nothing is concluded from how many agree.
    """
    rows: list[tuple[str, ...]] = []
    for student in _students(results):
        for judged in _JUDGED:
            points = [arm_means([pairs]) for pairs in pairs_by_point(results, student, judged) if pairs]
            # The reference's differences to itself are 0.
            found = [_correlation([(0.0, 0.0), *arms.values()]).value for arms in points]
            values = [value for value in found if value is not None]
            if values:
                positive = sum(value > 0 for value in values)
                rows.append((student, _word(judged), signed(fmean(values)), f"{positive} of {len(values)}"))
    return Table(
        columns=("student", "judged by", "mean rank correlation within a point", "points where it is above 0"),
        rows=tuple(rows),
        numeric=(False, False, True, True),
    )


def tally_table(results: Results) -> Table:
    """Return for each teacher but the reference in how many points it, or its student, was better or worse.

    Teachers are judged by :func:`closeness` against the reference, students by accuracy against their baseline and by
    NLL against the reference's student.
    """
    reference = reference_teacher(results)
    counts: dict[str, dict[str, list[int]]] = {}
    for point in results["points"]:
        for teacher, what, judged in _verdicts(point, reference or "", closeness(results).key):
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


def _verdicts(point: Mapping[str, Any], reference: str, key: str) -> Iterator[tuple[str, str, Verdict]]:
    """Yield the verdicts on a point's teachers and on their students: teacher, what is judged, verdict."""
    teachers, surprises = by_arm(point, "teacher", key), by_arm(point, "student", NLL.key)
    entries = {entry["arm"]: entry for entry in point["summary"]}
    for teacher, own in teachers.items():
        if teacher == reference:
            continue
        yield teacher, "teacher", verdict(paired_difference(teachers.get(reference, {}), own))
        for student, arms in students_of(point).items():
            arm, base = arms.get(teacher, ""), arms.get(reference, "")
            if entries.get(arm, {}).get("verdict"):
                yield teacher, f"{student}, accuracy", entries[arm]["verdict"]
            if arm in surprises and base in surprises:
                yield teacher, f"{student}, NLL", verdict(paired_difference(surprises[base], surprises[arm]))
