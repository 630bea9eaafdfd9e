"""Honest statistics over seeds: intervals of means, paired differences and the verdict they allow."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import Any, Literal

from soteacher.errors import InputError

Interval = tuple[float, float]
Verdict = Literal["better", "worse", "inconclusive"]

MIN_VERDICT_SEEDS = 3
"""Paired seeds below which no difference is called better or worse."""


def mean_interval(values: Sequence[float], *, confidence: float = 0.95) -> tuple[float, Interval | None]:
    r"""Return the mean and its Student-t interval.

    .. math:: \bar{x} \pm t_{n-1}\bigl((1 + c) / 2\bigr) \, s / \sqrt{n}

    with :math:`s` the sample standard deviation. The interval covers the mean that more seeds would approach; it is
    None for a single value, which says nothing of the spread, and has no width where all values are equal.

    Args:
        values: at least one finite number.
        confidence: :math:`c`, in (0, 1).

    Raises:
        InputError: no values, a value that is not finite, or a confidence outside (0, 1).
    """
    if not values:
        raise InputError("got no values to average; wanted at least one")
    if not all(math.isfinite(value) for value in values):
        raise InputError(f"values must be finite, got {list(values)}")
    if not 0 < confidence < 1:
        raise InputError(f"confidence must lie in (0, 1), got {confidence}")
    mean = fmean(values)
    if len(values) < 2:
        return mean, None
    from scipy.stats import t  # imported here: it takes long, and single runs need no interval

    half_width = float(t.ppf((1 + confidence) / 2, df=len(values) - 1)) * stdev(values) / math.sqrt(len(values))
    return mean, (mean - half_width, mean + half_width)


@dataclass(frozen=True, slots=True, kw_only=True)
class PairedDifference:
    """What an arm gained over its baseline, seed by seed."""

    seeds: tuple[int, ...]
    """The seeds that both have, in rising order."""
    mean: float | None
    """Mean over the seeds of the arm's value minus the baseline's; None without a common seed."""
    ci95: Interval | None
    """95 % Student-t interval of the mean; None with fewer than two seeds."""


def paired_difference(values: Mapping[int, float], baseline: Mapping[int, float]) -> PairedDifference:
    """Return the mean difference over the seeds that both have, and its 95 % interval.

    What two networks of one seed share (the split, the order of the examples) cancels in their difference, so the
    interval is that of a paired t-test.

    Args:
        values: seed to value of the arm.
        baseline: seed to value of the baseline.
    """
    seeds = tuple(sorted(values.keys() & baseline.keys()))
    if not seeds:
        return PairedDifference(seeds=(), mean=None, ci95=None)
    mean, interval = mean_interval([values[seed] - baseline[seed] for seed in seeds])
    return PairedDifference(seeds=seeds, mean=mean, ci95=interval)


def verdict(difference: PairedDifference) -> Verdict:
    """Return what a difference allows to say.

    ``better`` or ``worse`` needs a 95 % interval that excludes 0, from at least 3 paired seeds.
    """
    if difference.ci95 is None or len(difference.seeds) < MIN_VERDICT_SEEDS:
        return "inconclusive"
    lower, upper = difference.ci95
    if lower > 0:
        return "better"
    return "worse" if upper < 0 else "inconclusive"


def _accuracies(rows: Sequence[dict[str, Any]], role: str) -> dict[str, dict[int, float]]:
    """Return last-epoch accuracies as arm to seed to value, arms in the order of their first row."""
    arms: dict[str, dict[int, float]] = {}
    for row in rows:
        if row["role"] != role:
            continue
        seeds = arms.setdefault(row["arm"], {})
        if row["seed"] in seeds:
            raise InputError(f"{role} {row['arm']!r} has two rows of seed {row['seed']}; wanted one per seed")
        seeds[row["seed"]] = row["accuracy_last"]
    return arms


def summarise(rows: Sequence[dict[str, Any]], baselines: Mapping[str, str | None]) -> list[dict[str, Any]]:
    """Return one entry per student arm, in the order of first appearance: its accuracy and its gain over its baseline.

    Everything is computed from ``accuracy_last``. An arm without a baseline, such as the baseline itself, has None for
    ``baseline``, ``difference_mean``, ``difference_ci95`` and ``verdict``. The teacher's mean is over all its seeds.

    Args:
        rows: the rows of ``results.json``, teachers and students.
        baselines: student arm to the arm that it is compared with, or None.

    Raises:
        InputError: two rows of one role, arm and seed.
    """
    teachers, students = _accuracies(rows, "teacher"), _accuracies(rows, "student")
    first: dict[str, dict[str, Any]] = {}
    for row in rows:
        if row["role"] == "student":
            first.setdefault(row["arm"], row)
    summary: list[dict[str, Any]] = []
    for arm, accuracies in students.items():
        mean, interval = mean_interval(list(accuracies.values()))
        teacher_arm = first[arm]["teacher_arm"]
        baseline = baselines.get(arm)
        compared = baseline is not None and baseline != arm
        difference = paired_difference(accuracies, students.get(baseline or "", {})) if compared else None
        summary.append(
            {
                "arm": arm,
                "teacher_arm": teacher_arm,
                "method": first[arm]["method"],
                "model": first[arm]["model"],
                "seeds": sorted(accuracies),
                "accuracy_mean": mean,
                "accuracy_ci95": list(interval) if interval else None,
                "teacher_accuracy_mean": fmean(teachers[teacher_arm].values()) if teacher_arm in teachers else None,
                "baseline": baseline if compared else None,
                "difference_mean": difference.mean if difference else None,
                "difference_ci95": list(difference.ci95) if difference and difference.ci95 else None,
                "verdict": verdict(difference) if difference else None,
            }
        )
    return summary


MIN_CORRELATED_PAIRS = 4
"""Pairs below which a rank correlation has no interval, and none is given."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RankCorrelation:
    """How far one quantity rises with another, whatever the shape of the curve."""

    value: float | None
    """Spearman's rho, in [-1, 1]; None for fewer than four pairs, or where one side has one value only."""
    interval: Interval | None
    """Of the correlation that more pairs would approach; None where there is no value."""
    count: int
    """Number of pairs."""


def rank_correlation(first: Sequence[float], second: Sequence[float], *, confidence: float = 0.95) -> RankCorrelation:
    r"""Return Spearman's rank correlation of paired values and its interval.

    .. math:: \tanh\Bigl(\operatorname{artanh} r \pm \Phi^{-1}\bigl((1 + c) / 2\bigr)
              \sqrt{(1 + r^2 / 2) / (n - 3)}\Bigr)

    An approximation for independent pairs: of simulated samples of 6 to 50 normal pairs whose correlation is at most
    0.9, between 94 and 99 % of its 95 % intervals hold the true value. It is too narrow where the correlation is
    stronger: of 0.99, between 83 and 93 % do. Where :math:`|r| = 1` it has no width, although four pairs in one order
    are little evidence: then the interval's outer end is :math:`r`, and its inner end is that of
    :math:`1 - 12 / (n (n^2 - 1))`, the next lower value that n different ranks can have. Tied values can have
    correlations in between; they count as that one too: [1, 2, 3, 4] with [1, 2, 3, 3], 0.95, as 0.8.

    Args:
        first: :math:`n` finite numbers.
        second: as many, pair by pair.
        confidence: :math:`c`, in (0, 1).

    Raises:
        InputError: the numbers of values differ, a value is not finite, or the confidence is outside (0, 1).

    Source: Bonett and Wright 2000, Psychometrika 65(1), the variance of Spearman's Fisher-transformed correlation; what
    is done at :math:`|r| = 1` is ours.
    """
    if len(first) != len(second):
        raise InputError(f"got {len(first)} and {len(second)} values to correlate; wanted pairs")
    if not all(map(math.isfinite, (*first, *second))):
        raise InputError(f"values must be finite, got {list(first)} and {list(second)}")
    if not 0 < confidence < 1:
        raise InputError(f"confidence must lie in (0, 1), got {confidence}")
    count = len(first)
    if count < MIN_CORRELATED_PAIRS or len(set(first)) < 2 or len(set(second)) < 2:
        return RankCorrelation(value=None, interval=None, count=count)
    from scipy.stats import norm, spearmanr

    found: Any = spearmanr(first, second)
    value = round(float(found.statistic), 12)  # perfect order comes out as 0.9999999999999999
    inner = min(abs(value), 1 - 12 / (count * (count**2 - 1)))
    centre, half_width = math.atanh(inner), float(norm.ppf((1 + confidence) / 2))
    half_width *= math.sqrt((1 + inner**2 / 2) / (count - 3))
    ends = math.tanh(centre - half_width), max(abs(value), math.tanh(centre + half_width))
    return RankCorrelation(value=value, interval=ends if value >= 0 else (-ends[1], -ends[0]), count=count)
