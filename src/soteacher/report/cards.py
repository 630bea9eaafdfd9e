"""Teachers' cards beside what their students reached: figures by name and in words, rank correlations and tables."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from soteacher.report.card_tables import DISTANCE_SECTIONS, DISTANCES, PREDICTIONS, SECTIONS, SINGLE, Figure, figure
from soteacher.report.record import NetworkRecord, RunRecord
from soteacher.report.tables import Table, interval, percent, signed
from soteacher.statistics import MIN_CORRELATED_PAIRS, RankCorrelation, rank_correlation

_KNOWN: dict[str, tuple[str, Figure]] = {
    **{f"{key}.{one.key}": (f"{split}: {one.label}", one) for key, split in SECTIONS.items() for one in PREDICTIONS},
    **{f"{one.key}.{key}": (f"{split}: {one.label}", one) for key, split in SECTIONS.items() for one in PREDICTIONS},
    **{
        f"distance.{key}.{one.key}": (f"distance, {split}: {one.label}", one)
        for key, split in DISTANCE_SECTIONS.items()
        for one in DISTANCES
    },
    **{one.key: (one.label, one) for one in SINGLE},
}
"""Words of the figures by dotted name, those of a card's own page; a fitted temperature has its split behind it."""
_IN_TABLE = (
    *("train.accuracy", "test.accuracy", "train.nll", "test.nll", "test.ece", "test.ece_calibrated"),
    *("distance.train.mse", "distance.train.kl", "distance.test.mse", "distance.test.kl"),
    *("distance.train_out_of_fold.mse", "distance.train_out_of_fold.kl", "train.entropy", "test.entropy"),
    *("train.conditional_mutual_information", "views.prediction_variance", "views.true_class_stddev"),
    *("lipschitz.log10_product_1", "lipschitz.log10_product_2", "lipschitz.input_gradient_mean"),
    *("lipschitz.input_gradient_95", "lipschitz.largest_slope"),
)
"""The figures of the table of teachers; the others are set against the students only."""
MIN_DECISIVE_PAIRS = 6
"""Pairs below which even a perfect order has an interval that holds 0."""


def flat_figures(card: Mapping[str, Any]) -> dict[str, float]:
    """Return the figures that a card has by dotted name, such as ``distance.train.kl``, without those that are null.

    Args:
        card: what ``card.json`` holds; empty where there is none.
    """
    return dict(_flat(card.get("figures") or {}, ""))


def _flat(figures: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, float]]:
    for key, value in figures.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        elif value is not None:
            yield prefix + key, float(value)


def figure_words(name: str) -> str:
    """Return a figure's dotted name in words, with its unit; a name that is not known, without its dots."""
    return _KNOWN[name][0] if name in _KNOWN else name.replace(".", ": ").replace("_", " ")


def in_its_unit(name: str, value: float) -> float:
    """Return a figure's value as it is shown: fractions that are shown in per cent times 100."""
    return 100 * value if name in _KNOWN and _KNOWN[name][1].write is percent else value


def _mean_words(name: str, values: Sequence[float]) -> str:
    write = _KNOWN[name][1].write if name in _KNOWN else figure
    return write(fmean(values) if values else None)


def carded_teachers(record: RunRecord) -> dict[str, list[NetworkRecord]]:
    """Return the teachers' networks that have a card with figures, by arm."""
    teachers = record.of_role("teacher").items()
    found = {arm: [network for network in networks if flat_figures(network.card)] for arm, networks in teachers}
    return {arm: networks for arm, networks in found.items() if networks}


def card_table(teachers: Mapping[str, Sequence[NetworkRecord]]) -> Table:
    """Return a row for each teacher arm: means over its seeds of the figures that some card has."""
    figures = {arm: [flat_figures(network.card) for network in networks] for arm, networks in teachers.items()}
    shown = [name for name in _IN_TABLE if any(name in own for cards in figures.values() for own in cards)]
    rows: list[tuple[str, ...]] = []
    for arm, cards in figures.items():
        cells = (_mean_words(name, [own[name] for own in cards if name in own]) for name in shown)
        rows.append((arm, str(len(cards)), *cells))
    return Table(
        columns=("arm", "seeds", *map(figure_words, shown)),
        rows=tuple(rows),
        numeric=(False, *[True] * (1 + len(shown))),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """One teacher's network and what a student reached with it."""

    arm: str
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
        teachers: see :func:`carded_teachers`.
    """
    rows: dict[str, list[Mapping[str, Any]]] = {}
    for row in record.results.get("rows", []):
        if row["role"] == "student" and row.get("teacher_arm") in teachers:
            name = row["arm"].removeprefix(f"{row['teacher_arm']}-")
            rows.setdefault(name if row["method"] == name else f"{name} (method {row['method']})", []).append(row)
    settings = record.config.get("teachers") or {}
    seedless = {arm for arm in teachers if "file" in (settings.get(arm) or {})}
    students: list[TaughtStudent] = []
    for name, own in rows.items():
        networks = [network for group in teachers.values() for network in group]
        points = tuple(point for network in networks for point in _points(network, own, network.arm in seedless))
        students.append(TaughtStudent(name=name, points=points, correlations=arm_correlations(points)))
    return students


def _points(teacher: NetworkRecord, rows: Sequence[Mapping[str, Any]], seedless: bool) -> Iterator[Point]:
    """Yield the point of a teacher's network, if the student has learnt from it."""
    reached = [
        row["accuracy_last"]
        for row in rows
        if row["teacher_arm"] == teacher.arm and (seedless or row["seed"] == teacher.seed)
    ]
    if reached:
        figures = flat_figures(teacher.card)
        yield Point(arm=teacher.arm, seed=teacher.seed, figures=figures, accuracy=fmean(reached))


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
        f"{looked_at} figures were looked at for each student. Of twenty figures that have nothing to do with student "
        "accuracy, up to about one has an interval that excludes 0, and the strongest of many is stronger than it "
        "would be in other runs.",
    ]


def too_few_points(students: Sequence[TaughtStudent]) -> str:
    """Return why no student is set against the figures."""
    most = max((len(one.arms) for one in students), default=0)
    wanted = f"{MIN_CORRELATED_PAIRS} kinds of teachers (arms) with a card that one student has learnt from"
    found = {0: "there are none", 1: "there is 1"}.get(most, f"there are {most}")
    if most >= MIN_CORRELATED_PAIRS:
        found = "there are, but they do not differ in what they have in common"
    return f"Student accuracy is not set against these figures: that takes {wanted}; {found}."
