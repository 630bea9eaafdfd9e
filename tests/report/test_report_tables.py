from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from soteacher.report import cost_table, read_run, summary_sentence, summary_table
from soteacher.report.tables import amount, network_table, signed_points, teacher_table


def _entry(**changes: Any) -> dict[str, Any]:
    return {
        "arm": "soteacher-kd",
        "teacher_arm": "soteacher",
        "method": "kd",
        "model": "wrn_16_1",
        "seeds": [0, 1, 2],
        "accuracy_mean": 0.851,
        "accuracy_ci95": [0.843, 0.859],
        "teacher_accuracy_mean": 0.9,
        "baseline": "standard-kd",
        "difference_mean": 0.004,
        "difference_ci95": [-0.002, 0.01],
        "verdict": "inconclusive",
        **changes,
    }


BASELINE = _entry(arm="standard-kd", baseline=None, difference_mean=None, difference_ci95=None, verdict=None)
SINGLE = _entry(seeds=[4], accuracy_ci95=None, difference_ci95=None)


@pytest.mark.parametrize(
    ("entry", "sentence"),
    [
        (
            _entry(),
            "soteacher-kd: 85.10 % [84.30, 85.90] over 3 seeds; "
            "+0.40 points [-0.20, +1.00] against standard-kd: inconclusive",
        ),
        (SINGLE, "soteacher-kd: 85.10 % from 1 seed; +0.40 points against standard-kd: inconclusive"),
        (BASELINE, "standard-kd: 85.10 % [84.30, 85.90] over 3 seeds"),
        (
            _entry(difference_mean=None, difference_ci95=None),
            "soteacher-kd: 85.10 % [84.30, 85.90] over 3 seeds; no common seed with standard-kd: inconclusive",
        ),
    ],
)
def test_summary_sentence(entry: dict[str, Any], sentence: str) -> None:
    assert summary_sentence(entry) == sentence


def test_summary_table_names_its_baseline() -> None:
    table = summary_table({"summary": [BASELINE, _entry(), SINGLE]})
    assert table.columns == (
        "arm",
        "teacher accuracy, %",
        "student accuracy, % [95 % interval]",
        "seeds",
        "difference to standard-kd, points",
        "verdict",
    )
    assert table.rows == (
        ("standard-kd", "90.00", "85.10 [84.30, 85.90]", "3", "-", "-"),
        ("soteacher-kd", "90.00", "85.10 [84.30, 85.90]", "3", "+0.40 [-0.20, +1.00]", "inconclusive"),
        ("soteacher-kd", "90.00", "85.10", "1", "+0.40", "inconclusive"),
    )
    assert len(table.numeric) == len(table.columns)


def test_summary_table_names_several_baselines_in_their_rows() -> None:
    table = summary_table({"summary": [_entry(), _entry(baseline="standard-dkd", teacher_accuracy_mean=None)]})
    assert table.columns[4] == "difference to baseline, points"
    assert [row[4] for row in table.rows] == [
        "+0.40 [-0.20, +1.00] to standard-kd",
        "+0.40 [-0.20, +1.00] to standard-dkd",
    ]
    assert table.rows[1][1] == "-"


def test_summary_table_of_a_run_without_students() -> None:
    assert summary_table({"rows": []}).rows == ()


def test_signed_points_has_no_negative_zero() -> None:
    assert [signed_points(value) for value in (0.0, -0.00001, -0.0001, 0.125)] == ["+0.00", "+0.00", "-0.01", "+12.50"]


def test_amount_sets_thousands_apart() -> None:
    assert [amount(value) for value in (None, 12, 61.53, 2412.7, 2_243_546)] == [
        "-",
        "12",
        "61.5",
        "2,413",
        "2,243,546",
    ]


def test_teacher_table_holds_means_over_seeds(make_run: Callable[..., Path]) -> None:
    table = teacher_table(read_run(make_run()))
    assert table.rows == (
        ("standard", "wrn_40_2", "standard", "12", "3", "98.20", "88.20", "0.450", "0.031"),
        ("soteacher", "wrn_40_2", "soteacher", "12", "3", "97.20", "87.20", "0.450", "0.031"),
    )
    assert len(table.columns) == len(table.numeric) == 9


def test_network_table_has_a_line_for_every_network(make_run: Callable[..., Path]) -> None:
    folder = make_run(seeds=2, finished=False)
    (folder / "students/soteacher-kd/seed1/model.json").unlink()
    table = network_table(read_run(folder))
    assert [row[:3] for row in table.rows[:3]] == [
        ("teacher", "soteacher", "0"),
        ("teacher", "soteacher", "1"),
        ("teacher", "standard", "0"),
    ]
    assert ("student", "soteacher-kd", "1", *["-"] * 11) in table.rows
    assert table.rows[0][3:] == (
        *("wrn_40_2", "87.00", "87.30", "86.90", "97.00", "0.450", "0.031"),
        *("12", "61.5", "2,413", "2,243,546"),
    )
    assert len(table.columns) == len(table.numeric) == len(table.rows[0])


def _costs(arm: str, method: str, seconds: float | None, **more: Any) -> dict[str, Any]:
    row = {"role": "student", "arm": arm, "method": method, "accuracy_last": 0.5, "seconds_per_step": seconds}
    return {**row, "extra_parameters": 0, "peak_memory_bytes": None, **more}


def test_costs_are_means_over_seeds_beside_the_baselines() -> None:
    rows = [
        {"role": "teacher", "arm": "standard", "method": "standard", "seconds_per_step": 9.0},
        _costs("standard-kd", "kd", 0.1),
        _costs("standard-kd", "kd", 0.3),
        _costs("standard-crd", "crd", 0.5, extra_parameters=12345, peak_memory_bytes=3 * 2**20, accuracy_last=0.75),
    ]
    summary = [{"arm": "standard-kd", "baseline": None}, {"arm": "standard-crd", "baseline": "standard-kd"}]
    table = cost_table({"rows": rows, "summary": summary})
    assert table.rows == (
        ("standard-kd", "kd", "50.00", "200", "1.00", "0", "-"),
        ("standard-crd", "crd", "75.00", "500", "2.50", "12,345", "3.0"),
    )
    assert len(table.columns) == len(table.numeric) == 7


@pytest.mark.parametrize(
    "rows",
    [
        [],
        [_costs("a-kd", "kd", 0.1), _costs("b-kd", "kd", 0.2)],
        [_costs("a-kd", "kd", None), _costs("x", "alone", None)],
    ],
    ids=["nothing", "one method", "of an older version"],
)
def test_costs_are_left_out_where_there_is_nothing_to_compare(rows: list[dict[str, Any]]) -> None:
    assert cost_table({"rows": rows, "summary": []}).rows == ()
