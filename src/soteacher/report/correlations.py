"""What students reached beside their teachers' cards: rank correlations over kinds of teachers, and their words."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from soteacher.report.cards import figure_words, flat_figures, teacher_kinds
from soteacher.report.record import NetworkRecord, RunRecord
from soteacher.report.tables import Table, interval, signed
from soteacher.statistics import MIN_CORRELATED_PAIRS, RankCorrelation, rank_correlation

MIN_DECISIVE_PAIRS = 6
"""Pairs below which even a perfect order has an interval that holds 0."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """One teacher's network and what a student reached with it."""

    arm: str
    """Its kind, which is its arm where no other arm is the same network."""
    seed: int
    figures: Mapping[str, float]
    """Of the teacher's card, by dotted name."""
    accuracy: float
    """Of the student, after the last epoch: a fraction. A teacher that has no seeds: the mean over the student's."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TaughtStudent:
    """A student of the study with all the teachers that it learnt from and that have a card."""

    name: str
    points: tuple[Point, ...]
    correlations: Mapping[str, RankCorrelation]
    """See :func:`arm_correlations`."""

    @property
    def arms(self) -> tuple[str, ...]:
        """Teacher arms that it learnt from, in the order of their points."""
        return tuple(dict.fromkeys(point.arm for point in self.points))


def taught_students(record: RunRecord, teachers: Mapping[str, Sequence[NetworkRecord]]) -> list[TaughtStudent]:
    """Return the students that learnt from teachers with a card, one for each name and method, in the run's order.

    Args:
        record: the run.
        teachers: see :func:`~soteacher.report.cards.carded_teachers`.
    """
    rows: dict[str, list[Mapping[str, Any]]] = {}
    for row in record.results.get("rows", []):
        if row["role"] == "student" and row.get("teacher_arm") in teachers:
            name = row["arm"].removeprefix(f"{row['teacher_arm']}-")
            rows.setdefault(name if row["method"] == name else f"{name} (method {row['method']})", []).append(row)
    settings = record.config.get("teachers") or {}
    seedless = {arm for arm in teachers if "file" in (settings.get(arm) or {})}
    kinds = teacher_kinds(teachers)
    students: list[TaughtStudent] = []
    for name, own in rows.items():
        points: list[Point] = []
        for kind, arms in kinds.items():
            of_kind = [row for row in own if row["teacher_arm"] in arms]
            points += _points(kind, teachers[arms[0]], of_kind, seedless)
        students.append(TaughtStudent(name=name, points=tuple(points), correlations=arm_correlations(points)))
    return students


def _points(
    kind: str, teachers: Sequence[NetworkRecord], rows: Sequence[Mapping[str, Any]], seedless: Collection[str]
) -> Iterator[Point]:
    """Yield the points of a kind's networks that the student has learnt from."""
    for teacher in teachers:
        reached = [
            row["accuracy_last"] for row in rows if row["teacher_arm"] in seedless or row["seed"] == teacher.seed
        ]
        if reached:
            figures = flat_figures(teacher.card)
            yield Point(arm=kind, seed=teacher.seed, figures=figures, accuracy=fmean(reached))


def arm_means(points: Sequence[Point], name: str) -> dict[str, tuple[float, float]]:
    """Return a figure and the student's accuracy by arm: means over those of its points that have the figure."""
    by_arm: dict[str, list[Point]] = {}
    for point in points:
        if name in point.figures:
            by_arm.setdefault(point.arm, []).append(point)
    return {
        arm: (_rounded_mean(one.figures[name] for one in own), _rounded_mean(one.accuracy for one in own))
        for arm, own in by_arm.items()
    }


def _rounded_mean(values: Iterable[float]) -> float:
    """Return a mean to 12 digits: equal means that differ in their last bit would have different ranks."""
    return float(f"{fmean(values):.12g}")


def arm_correlations(points: Sequence[Point]) -> dict[str, RankCorrelation]:
    """Return the rank correlation of each figure with student accuracy over the arms' means, strongest first.

    An arm is one pair, however many seeds it has: networks of one arm resemble one another, and counted one by one they
    would make an interval narrower than it is. Figures that fewer than four arms have, or all alike, are left out.

    Args:
        points: of one student.
    """
    found: dict[str, RankCorrelation] = {}
    for name in dict.fromkeys(name for point in points for name in point.figures):
        pairs = list(arm_means(points, name).values())
        correlation = rank_correlation([figure for figure, _ in pairs], [accuracy for _, accuracy in pairs])
        if correlation.value is not None:
            found[name] = correlation
    return dict(sorted(found.items(), key=lambda item: -abs(item[1].value or 0)))


def correlation_words(correlation: RankCorrelation | None) -> str:
    """Return a rank correlation with its interval; ``-`` for None."""
    if correlation is None or correlation.value is None:
        return "-"
    return signed(correlation.value) + interval(correlation.interval, signed)


def correlation_table(students: Sequence[TaughtStudent]) -> Table:
    """Return a row for each figure, the strongest on average first: its rank correlation with each student."""
    by_name: dict[str, list[float]] = {}
    for student in students:
        for name, correlation in student.correlations.items():
            by_name.setdefault(name, []).append(abs(correlation.value or 0))
    rows = [
        (
            figure_words(name),
            *(
                correlation_words(found) + (f" of {found.count}" if found and found.count < len(student.arms) else "")
                for student in students
                for found in [student.correlations.get(name)]
            ),
        )
        for name in sorted(by_name, key=lambda name: -fmean(by_name[name]))
    ]
    return Table(
        columns=("figure of the teacher", *(f"{one.name}, {len(one.arms)} kinds of teachers" for one in students)),
        rows=tuple(rows),
        numeric=(False, *[True] * len(students)),
    )


def correlation_notes(students: Sequence[TaughtStudent]) -> list[str]:
    """Return what keeps the correlations from saying more than they do."""
    looked_at = max(len(one.correlations) for one in students)
    return [
        "The correlation is Spearman's rho over kinds of teachers (arms): each is one pair, the mean figure of its "
        "networks and the mean accuracy of their students. A number behind it says how many kinds have the figure, "
        f"where not all do; fewer than {MIN_CORRELATED_PAIRS} give no correlation.",
        "In brackets stands its 95 % interval (Bonett and Wright 2000). It is about other kinds of teachers, as though "
        "these had been drawn at random from many; more seeds make the means surer, but only more kinds make it "
        f"narrower. Below {MIN_DECISIVE_PAIRS} kinds it holds 0 in whatever order they stand. Kinds that share a term, "
        "or of which one is an earlier state of another, are not quite independent, and it should be wider.",
        "A correlation is not a cause: a figure can go with student accuracy because both go with something else.",
        "The charts that stand open are of figures that are fixed beforehand, whatever this run shows of them: "
        "accuracy on train and test; NLL, ECE, ECE calibrated and entropy on test; squared distances to label "
        "distributions; conditional information on train; variance of predictions and deviation of the true class over "
        "views; largest slope; 95th percentile of the input gradient. Those without a chart are not in "
        "these cards, or have no correlation.",
        f"{looked_at} figures were looked at for each student. Of twenty figures that have nothing to do with student "
        "accuracy, up to about one has an interval that excludes 0, and the strongest of many is stronger than it "
        "would be in other runs.",
    ]


def too_few_arms(students: Sequence[TaughtStudent]) -> list[str]:
    """Return why the students without a correlation are not set against the figures, a sentence for each reason."""
    if not students:
        return ["Student accuracy is not set against these figures: no student has learnt from a teacher with a card."]
    reasons: dict[str, list[str]] = {}
    for student in students:
        if not student.correlations:
            reasons.setdefault(_too_few(student), []).append(student.name)
    return [
        f"The accuracy of {' and of '.join(names)} is not set against these figures: {reason}."
        for reason, names in reasons.items()
    ]


def _too_few(student: TaughtStudent) -> str:
    count = len(student.arms)
    if count >= MIN_CORRELATED_PAIRS:
        return "its teachers do not differ in what they have in common, or all taught it equally well"
    there = "there is 1" if count == 1 else f"there are {count}"
    return (
        f"that takes {MIN_CORRELATED_PAIRS} kinds of teachers (arms) with a card that it has learnt from; {there} "
        f"({', '.join(student.arms)})"
    )
