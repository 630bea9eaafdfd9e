import math

import numpy as np
import pytest
from scipy import stats

from soteacher.errors import InputError
from soteacher.statistics import (
    PairedDifference,
    RankCorrelation,
    mean_interval,
    paired_difference,
    rank_correlation,
    summarise,
    verdict,
)


def _row(role: str, arm: str, seed: int, value: float, teacher_arm: str | None = None) -> dict:
    return {
        "role": role,
        "arm": arm,
        "teacher_arm": teacher_arm,
        "method": arm.rpartition("-")[2],
        "model": "wrn_16_1",
        "seed": seed,
        "accuracy_last": value,
        "accuracy_best": 1.0,
    }


def test_mean_interval_by_hand() -> None:
    # Standard deviation 1, t quantile of two degrees of freedom 4.302653 (tables), half-width 4.302653 / sqrt(3).
    mean, interval = mean_interval([1.0, 2.0, 3.0])
    assert mean == 2.0
    assert interval == pytest.approx((2 - 2.484138, 2 + 2.484138), abs=1e-6)


@pytest.mark.parametrize("confidence", [0.5, 0.9, 0.95])
def test_mean_interval_matches_scipy(confidence: float) -> None:
    values = np.random.default_rng(0).normal(size=6)
    expected = stats.ttest_1samp(values, 0).confidence_interval(confidence)
    mean, interval = mean_interval(values.tolist(), confidence=confidence)
    assert mean == pytest.approx(values.mean())
    assert interval == pytest.approx(tuple(expected))


def test_mean_interval_of_one_value_is_none() -> None:
    assert mean_interval([0.25]) == (0.25, None)


def test_mean_interval_of_equal_values_has_no_width() -> None:
    assert mean_interval([0.5, 0.5, 0.5]) == (0.5, (0.5, 0.5))


def test_mean_interval_refuses_bad_input() -> None:
    with pytest.raises(InputError, match="no values"):
        mean_interval([])
    with pytest.raises(InputError, match="must be finite"):
        mean_interval([0.5, math.nan])
    with pytest.raises(InputError, match=r"confidence must lie in \(0, 1\), got 95"):
        mean_interval([0.5, 0.6], confidence=95)


def test_paired_difference_matches_the_paired_t_test() -> None:
    random = np.random.default_rng(1)
    baseline = random.normal(size=5)
    values = baseline + random.normal(0.3, 0.1, size=5)
    expected = stats.ttest_rel(values, baseline).confidence_interval(0.95)
    difference = paired_difference(dict(enumerate(values)), dict(enumerate(baseline)))
    assert difference.mean == pytest.approx((values - baseline).mean())
    assert difference.ci95 == pytest.approx(tuple(expected))


def test_paired_difference_uses_the_common_seeds() -> None:
    difference = paired_difference({4: 0.5, 2: 0.75, 9: 0.9}, {2: 0.5, 4: 0.25, 7: 0.1})
    assert difference == PairedDifference(seeds=(2, 4), mean=0.25, ci95=(0.25, 0.25))


def test_paired_difference_without_enough_seeds() -> None:
    assert paired_difference({0: 0.5}, {0: 0.25}) == PairedDifference(seeds=(0,), mean=0.25, ci95=None)
    assert paired_difference({0: 0.5}, {1: 0.25}) == PairedDifference(seeds=(), mean=None, ci95=None)


@pytest.mark.parametrize(
    ("seeds", "interval", "expected"),
    [
        (3, (0.001, 0.02), "better"),
        (3, (-0.02, -0.001), "worse"),
        (3, (-0.001, 0.02), "inconclusive"),
        (3, (0.0, 0.02), "inconclusive"),
        (3, (0.0, 0.0), "inconclusive"),
        (2, (0.001, 0.02), "inconclusive"),
        (1, None, "inconclusive"),
        (0, None, "inconclusive"),
    ],
)
def test_verdict(seeds: int, interval: tuple[float, float] | None, expected: str) -> None:
    mean = sum(interval) / 2 if interval else None
    assert verdict(PairedDifference(seeds=tuple(range(seeds)), mean=mean, ci95=interval)) == expected


def test_verdict_agrees_with_the_p_value() -> None:
    random = np.random.default_rng(2)
    for _ in range(50):
        values, baseline = random.normal(0.5, 1, size=4), random.normal(size=4)
        test = stats.ttest_rel(values, baseline)
        found = verdict(paired_difference(dict(enumerate(values)), dict(enumerate(baseline))))
        expected = "inconclusive" if test.pvalue >= 0.05 else "better" if test.statistic > 0 else "worse"
        assert found == expected


def test_summarise_has_one_entry_per_student_arm() -> None:
    rows = [_row("teacher", "soteacher", seed, 0.75) for seed in range(3)]
    rows += [_row("student", "standard-kd", seed, 0.5) for seed in (2, 0, 1)]
    rows += [
        _row("student", "soteacher-kd", seed, 0.625 + 0.001 * seed, teacher_arm="soteacher") for seed in (0, 1, 2, 3)
    ]
    standard, soteacher = summarise(rows, {"standard-kd": None, "soteacher-kd": "standard-kd"})
    assert standard == {
        "arm": "standard-kd",
        "teacher_arm": None,
        "method": "kd",
        "model": "wrn_16_1",
        "seeds": [0, 1, 2],
        "accuracy_mean": 0.5,
        "accuracy_ci95": [0.5, 0.5],
        "teacher_accuracy_mean": None,
        "baseline": None,
        "difference_mean": None,
        "difference_ci95": None,
        "verdict": None,
    }
    assert soteacher["seeds"] == [0, 1, 2, 3]
    assert soteacher["teacher_accuracy_mean"] == 0.75
    assert soteacher["baseline"] == "standard-kd"
    assert soteacher["difference_mean"] == pytest.approx(0.126)
    half_width = 4.302653 * 0.001 / math.sqrt(3)
    assert soteacher["difference_ci95"] == pytest.approx([0.126 - half_width, 0.126 + half_width])
    assert soteacher["verdict"] == "better"


def test_summarise_compares_equal_arms_as_inconclusive() -> None:
    rows = [_row("student", arm, seed, 0.1 * seed) for arm in ("alone", "standard-kd") for seed in range(3)]
    entry = summarise(rows, {"alone": "standard-kd"})[0]
    assert (entry["difference_mean"], entry["difference_ci95"], entry["verdict"]) == (0.0, [0.0, 0.0], "inconclusive")


def test_summarise_of_unfinished_runs() -> None:
    assert summarise([], {}) == []
    assert summarise([_row("teacher", "standard", 0, 0.5)], {}) == []
    entry = summarise([_row("student", "soteacher-kd", 0, 0.5, "soteacher")], {"soteacher-kd": "standard-kd"})[0]
    assert entry["accuracy_ci95"] is None
    assert entry["teacher_accuracy_mean"] is None
    assert (entry["baseline"], entry["difference_mean"], entry["verdict"]) == ("standard-kd", None, "inconclusive")


def test_summarise_takes_an_arm_that_is_its_own_baseline_as_the_baseline() -> None:
    entry = summarise([_row("student", "alone", 0, 0.5)], {"alone": "alone"})[0]
    assert (entry["baseline"], entry["verdict"]) == (None, None)


def test_summarise_refuses_two_rows_of_one_seed() -> None:
    with pytest.raises(InputError, match="student 'alone' has two rows of seed 0; wanted one per seed"):
        summarise([_row("student", "alone", 0, 0.5)] * 2, {})


SPEARMAN_X = [67, 28, 30, 28, 52, 40, 25, 37, 44, 10, 14, 20, 28, 40, 51]
SPEARMAN_Y = [21, 4, 9, 12, 35, 18, 10, 22, 24, 1, 6, 8, 13, 16, 19]


def test_rank_correlation_is_that_of_bonetts_own_program() -> None:
    # The example of ci.spear in Bonett's R package statpsych, https://dgbonett.github.io/statpsych.
    found = rank_correlation(SPEARMAN_X, SPEARMAN_Y)
    assert found.value == pytest.approx(0.8699639, abs=1e-7)
    assert found.interval == pytest.approx((0.5840951, 0.9638297), abs=1e-7)
    assert found.count == 15


@pytest.mark.parametrize("confidence", [0.5, 0.95])
def test_rank_correlation_by_hand(confidence: float) -> None:
    random = np.random.default_rng(0)
    first, second = random.normal(size=9), random.normal(size=9).round(1)
    ranks = [stats.rankdata(values) for values in (first, second)]
    rho = np.corrcoef(*ranks)[0, 1]
    half_width = stats.norm.ppf((1 + confidence) / 2) * math.sqrt((1 + rho**2 / 2) / 6)
    found = rank_correlation(first.tolist(), second.tolist(), confidence=confidence)
    assert found.value == pytest.approx(rho)
    assert found.interval == pytest.approx(
        (math.tanh(np.arctanh(rho) - half_width), math.tanh(np.arctanh(rho) + half_width))
    )


def test_rank_correlation_sees_ranks_only_and_turns_with_a_sign() -> None:
    found = rank_correlation(SPEARMAN_X, SPEARMAN_Y)
    assert rank_correlation([math.exp(x) for x in SPEARMAN_X], [y**3 for y in SPEARMAN_Y]) == found
    assert rank_correlation(SPEARMAN_Y, SPEARMAN_X) == found
    turned = rank_correlation([-x for x in SPEARMAN_X], SPEARMAN_Y)
    assert turned.value == -found.value
    assert turned.interval == (-found.interval[1], -found.interval[0])


@pytest.mark.parametrize("count", [4, 5, 12])
def test_rank_correlation_in_perfect_order_is_not_certain(count: int) -> None:
    found = rank_correlation(range(count), range(count))
    swapped = rank_correlation(range(count), [1, 0, *range(2, count)])
    assert found.value == 1
    assert found.interval == (pytest.approx(swapped.interval[0]), 1)
    assert (found.interval[0] < 0) == (count < 6)
    turned = rank_correlation(range(count), [-place for place in range(count)])
    assert (turned.value, turned.interval) == (-1, (-1, -found.interval[0]))


@pytest.mark.parametrize(
    ("first", "second"), [([], []), ([1, 2, 3], [1, 2, 3]), ([1, 1, 1, 1], [1, 2, 3, 4]), ([1, 2, 3, 4], [0.5] * 4)]
)
def test_rank_correlation_of_too_little_is_none(first: list[float], second: list[float]) -> None:
    assert rank_correlation(first, second) == RankCorrelation(value=None, interval=None, count=len(first))


@pytest.mark.parametrize(("count", "correlation"), [(6, 0.0), (10, 0.6), (25, 0.9)])
def test_rank_correlation_interval_covers_the_truth(count: int, correlation: float) -> None:
    random = np.random.default_rng(0)
    truth = 6 / math.pi * math.asin(correlation / 2)  # Spearman's rho of two normal quantities
    covered = 0
    for _ in range(400):
        first = random.normal(size=count)
        second = correlation * first + math.sqrt(1 - correlation**2) * random.normal(size=count)
        found = rank_correlation(first.tolist(), second.tolist())
        assert found.interval is not None
        covered += found.interval[0] <= truth <= found.interval[1]
    assert 0.92 <= covered / 400 <= 0.99


def test_rank_correlation_refuses_bad_input() -> None:
    with pytest.raises(InputError, match="got 4 and 5 values to correlate; wanted pairs"):
        rank_correlation([1, 2, 3, 4], [1, 2, 3, 4, 5])
    with pytest.raises(InputError, match="must be finite"):
        rank_correlation([1, 2, 3, math.inf], [1, 2, 3, 4])
    with pytest.raises(InputError, match=r"confidence must lie in \(0, 1\), got 1"):
        rank_correlation([1, 2, 3, 4], [1, 2, 3, 4], confidence=1)
