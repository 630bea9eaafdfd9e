"""A run's numbers as sentences and tables of text, the same for the page and the command line."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from soteacher.report.record import ROLES, NetworkRecord, RunRecord


@dataclass(frozen=True, slots=True, kw_only=True)
class Table:
    """Cells of text under column headings."""

    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    numeric: tuple[bool, ...]
    """For each column, whether it holds numbers, which are set to the right."""


def percent(value: float | None) -> str:
    """Return a fraction as per cent, two decimals, without the sign; ``-`` for None."""
    return "-" if value is None else f"{100 * value:.2f}"


def decimal(value: float | None) -> str:
    """Return a number with three decimals; ``-`` for None."""
    return "-" if value is None else f"{value:.3f}"


def amount(value: float | None) -> str:
    """Return a count, a rate or a duration with its thousands set apart; ``-`` for None."""
    if value is None:
        return "-"
    return f"{value:,.1f}" if isinstance(value, float) and abs(value) < 100 else f"{value:,.0f}"


def signed_points(value: float) -> str:
    """Return a difference of fractions in percentage points, with its sign."""
    return signed(100 * value)


def signed(value: float) -> str:
    """Return a number with its sign and two decimals."""
    text = f"{value:+.2f}"
    return "+0.00" if text == "-0.00" else text


def interval(ends: Sequence[float] | None, write: Callable[[float], str] = percent) -> str:
    """Return ``[lower, upper]`` with a blank before it; nothing for None."""
    return f" [{write(ends[0])}, {write(ends[1])}]" if ends else ""


def mean_of(rows: Sequence[Mapping[str, Any]], key: str) -> float | None:
    """Return the mean of the values that the rows have for a key; None where they have none."""
    values = [row[key] for row in rows if row.get(key) is not None]
    return fmean(values) if values else None


def _difference(entry: Mapping[str, Any]) -> str:
    """Return the difference and its interval, in points; ``-`` without one."""
    if entry["difference_mean"] is None:
        return "-"
    return signed_points(entry["difference_mean"]) + interval(entry["difference_ci95"], signed_points)


def summary_sentence(entry: Mapping[str, Any]) -> str:
    """Return one arm of the summary in plain words: its accuracy, its gain over the baseline and the verdict.

    Args:
        entry: an element of ``summary`` in ``results.json``.
    """
    count = len(entry["seeds"])
    seeds = "from 1 seed" if count == 1 else f"over {count} seeds"
    accuracy = f"{entry['arm']}: {percent(entry['accuracy_mean'])} %{interval(entry['accuracy_ci95'])} {seeds}"
    if entry["baseline"] is None:
        return accuracy
    if entry["difference_mean"] is None:
        return f"{accuracy}; no common seed with {entry['baseline']}: {entry['verdict']}"
    return f"{accuracy}; {_points(entry)} against {entry['baseline']}: {entry['verdict']}"


def _points(entry: Mapping[str, Any]) -> str:
    """Return the difference with its unit between the mean and the interval."""
    return f"{signed_points(entry['difference_mean'])} points{interval(entry['difference_ci95'], signed_points)}"


def summary_table(results: Mapping[str, Any]) -> Table:
    """Return the student arms: accuracy of teacher and student, difference to the baseline, verdict.

    Args:
        results: what ``results.json`` holds.
    """
    summary = results.get("summary", [])
    baselines = list(dict.fromkeys(entry["baseline"] for entry in summary if entry["baseline"] is not None))
    one_baseline = len(baselines) == 1
    rows = [
        (
            entry["arm"],
            percent(entry["teacher_accuracy_mean"]),
            percent(entry["accuracy_mean"]) + interval(entry["accuracy_ci95"]),
            str(len(entry["seeds"])),
            _difference(entry) + ("" if one_baseline or entry["baseline"] is None else f" to {entry['baseline']}"),
            entry["verdict"] or "-",
        )
        for entry in summary
    ]
    return Table(
        columns=(
            "arm",
            "teacher accuracy, %",
            "student accuracy, % [95 % interval]",
            "seeds",
            f"difference to {baselines[0] if one_baseline else 'baseline'}, points",
            "verdict",
        ),
        rows=tuple(rows),
        numeric=(False, *[True] * 4, False),
    )


def cost_table(results: Mapping[str, Any]) -> Table:
    """Return what each student arm cost: time of a step, also against its baseline's, parameters and memory.

    No rows where the arms all have one method, or were trained by a version that did not note it.

    Args:
        results: what ``results.json`` holds.
    """
    arms: dict[str, list[Mapping[str, Any]]] = {}
    for row in results.get("rows", []):
        if row["role"] == "student" and row.get("seconds_per_step"):
            arms.setdefault(row["arm"], []).append(row)
    baselines = {entry["arm"]: entry["baseline"] or entry["arm"] for entry in results.get("summary", [])}
    several = len({rows[0]["method"] for rows in arms.values()}) > 1
    return Table(
        columns=(
            "arm",
            "method",
            "accuracy, %",
            "ms a step",
            "step / baseline's",
            "parameters in training besides the network's",
            "peak memory, MiB",
        ),
        rows=tuple(_cost_cells(arm, arms, baselines) for arm in arms) if several else (),
        numeric=(False, False, *[True] * 5),
    )


def _cost_cells(
    arm: str, arms: Mapping[str, Sequence[Mapping[str, Any]]], baselines: Mapping[str, str]
) -> tuple[str, ...]:
    rows = arms[arm]
    seconds, memory = mean_of(rows, "seconds_per_step"), mean_of(rows, "peak_memory_bytes")
    other = mean_of(arms.get(baselines.get(arm, arm), ()), "seconds_per_step")
    return (
        arm,
        str(rows[0]["method"]),
        percent(mean_of(rows, "accuracy_last")),
        amount(1000 * seconds) if seconds else "-",
        f"{seconds / other:.2f}" if seconds and other else "-",
        amount(rows[0].get("extra_parameters")),
        amount(memory / 2**20) if memory is not None else "-",
    )


def teacher_table(record: RunRecord) -> Table:
    """Return the teacher arms: how well they fit the training images, and how good and calibrated they are on test."""
    rows: list[tuple[str, ...]] = []
    for arm, networks in record.of_role("teacher").items():
        done = [network.row for network in networks if network.row]
        if not done:
            continue
        rows.append(
            (
                arm,
                str(done[0].get("model") or "-"),
                str(done[0].get("method") or "-"),
                amount(done[0].get("epochs")),
                str(len(done)),
                percent(mean_of(done, "train_accuracy")),
                percent(mean_of(done, "accuracy_last")),
                decimal(mean_of(done, "nll")),
                decimal(mean_of(done, "ece")),
            )
        )
    return Table(
        columns=(
            "arm",
            "model",
            "method",
            "epochs",
            "seeds",
            "train accuracy, %",
            "test accuracy, %",
            "test NLL, nats",
            "test ECE",
        ),
        rows=tuple(rows),
        numeric=(False, False, False, *[True] * 6),
    )


_NETWORK_COLUMNS: tuple[tuple[str, str, Callable[[Any], str]], ...] = (
    ("accuracy_last", "accuracy last, %", percent),
    ("accuracy_best", "best on test, %", percent),
    ("accuracy_mean_last_10", "mean of last 10, %", percent),
    ("train_accuracy", "train accuracy, %", percent),
    ("nll", "NLL, nats", decimal),
    ("ece", "ECE", decimal),
    ("epochs", "epochs", amount),
    ("train_seconds", "seconds", amount),
    ("images_per_second", "images/s", amount),
    ("parameters", "parameters", amount),
)


def _network_cells(network: NetworkRecord) -> tuple[str, ...]:
    """Return one network's line; all ``-`` while it trains."""
    row = network.row or {}
    values = [write(row.get(key)) for key, _, write in _NETWORK_COLUMNS]
    return (network.role, network.arm, str(network.seed), str(row.get("model") or "-"), *values)


def network_table(record: RunRecord) -> Table:
    """Return every network of the run, a line each: teachers first, arm by arm."""
    ordered = [network for role in ROLES for group in record.of_role(role).values() for network in group]
    headings = tuple(heading for _, heading, _ in _NETWORK_COLUMNS)
    return Table(
        columns=("role", "arm", "seed", "model", *headings),
        rows=tuple(_network_cells(network) for network in ordered),
        numeric=(False, False, True, False, *[True] * len(headings)),
    )
