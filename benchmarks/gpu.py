"""How fast do networks train on one GPU? The field's way beside ours, each change's gain in a row of its own.

All ways of one training stand ready in one process and take turns, a block of steps each; reported are medians over the
rounds. What a step computes and moves is counted (see ``benchmarks/gpu_counts.py``) and set against what the same GPU
reaches in a large product of bfloat16 matrices and in a large copy. Rows for which the time is too short are left out
and named. Images are random; the field's loader, our augmentation and all else are as in a training.
"""

from __future__ import annotations

import argparse
import gc
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu_cells import EPOCHS, Clock, Plan, measure_cell, measure_packed
from benchmarks.gpu_counts import peaks
from benchmarks.gpu_steps import VARIANTS, Cell, Variant, random_data
from benchmarks.timing import record, run, spread, table
from soteacher.errors import InputError
from soteacher.pool import available_cores
from soteacher.studies import pick_device

PAIR, TEACHER = Cell("wrn_40_2", "wrn_16_2", 64), Cell("wrn_40_2", None, 64)
CELLS = (
    PAIR, TEACHER, Cell("resnet32x4", "shufflenet_v2", 64), Cell("resnet32x4", None, 64),
    Cell("wrn_40_2", "wrn_16_2", 512), Cell("wrn_40_2", None, 512),
    Cell("wrn_16_2", None, 64), Cell("shufflenet_v2", None, 64),
    Cell("resnet32x4", "shufflenet_v2", 512), Cell("resnet32x4", None, 512),
    Cell("wrn_16_2", None, 512), Cell("shufflenet_v2", None, 512),
)  # fmt: skip
"""What is measured, the most wanted first."""
TINY = (Cell("resnet8", "resnet8", 16), Cell("resnet8", None, 16))
EXAMPLES, TEST_EXAMPLES = 50_176, 10_000
"""Whole batches of 64 and of 512, near CIFAR-100's 50,000."""
OFFERED = tuple(variant.name for variant in VARIANTS if variant.offered)
TIMES_FASTER, MINUTES_OF_EPOCHS = 8.0, 5.0
"""What is expected of the pair's steps beside the field's, and of the teacher's whole training."""


def main(words: Sequence[str] | None = None) -> None:
    """Measure until the time is up, printing a table for each training."""
    given = _arguments(words)
    clock = Clock(time.monotonic() + 60 * given.minutes)
    device = pick_device(given.device)
    if device != "cuda" and not given.tiny:
        raise InputError("this measures a GPU, and PyTorch finds none here; --tiny --device cpu tries it out")
    torch.set_num_threads(given.threads)
    plan = _plan(given, device)
    cells = TINY if given.tiny else [CELLS[number - 1] for number in given.cells]
    peak = peaks(device, size=256 if given.tiny else 8192, copied_bytes=2**20 if given.tiny else 2**31)
    results: dict[str, Any] = {"peak": peak, "cells": {}, "packed": {}, "expectations": []}
    for number, cell in enumerate(cells):
        found = measure_cell(plan, cell, _variants(number, tiny=given.tiny), clock, peak)
        results["cells"][cell.name] = found
        _show(cell, found)
        _forget(device)
        if cell == (TINY[1] if given.tiny else TEACHER):
            results["packed"] = measure_packed(plan, cell, _fastest(found), clock)
            print(_packed_sentence(results["packed"]), flush=True)
        results["expectations"] = expectations(results["cells"])
        settings = {key: value for key, value in vars(given).items() if key != "json"}
        record(given.json, settings=settings, results=results, threads=given.threads, device=device)
    for expectation in results["expectations"]:
        print(_sentence(expectation))


def _plan(given: argparse.Namespace, device: str) -> Plan:
    tiny = given.tiny
    packed = tuple(count for count in ((1, 2) if tiny else (1, 2, 4)) if count <= given.processes)
    return Plan(
        data=random_data(256, 64) if tiny else random_data(EXAMPLES, TEST_EXAMPLES), device=device,
        workers=given.workers, rounds=given.rounds, block_seconds=0.02 if tiny else 0.3, packed=packed,
        packed_seconds=0.2 if tiny else 2.0, threads=max(1, available_cores() // max(packed)),
    )  # fmt: skip


def _variants(number: int, *, tiny: bool) -> list[Variant]:
    """Return the ways in which a training is measured: all of them for the first two only, as compiling takes long."""
    if tiny:
        return [variant for variant in VARIANTS if variant.compiled == "no"]
    return [variant for variant in VARIANTS if number < 2 or variant.field or variant.waits or variant.offered]


def _fastest(found: Mapping[str, Any]) -> Variant:
    """Return the library's fastest way of a measured training, or its first where none was."""
    offered = [variant for variant in VARIANTS if variant.offered]
    measured = [variant for variant in offered if variant.name in found["rows"]]
    return min(measured, key=lambda one: found["rows"][one.name]["seconds_per_step"], default=offered[0])


def _forget(device: str) -> None:
    """Let go of what was set up and compiled for a training."""
    gc.collect()
    if device == "cuda":
        torch.compiler.reset()
        torch.cuda.empty_cache()


def expectations(cells: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return what was expected, what was found, and whether that meets it: ``None`` where it was not measured.

    Only ways count that the library offers: its runs are repeatable.

    Args:
        cells: what :func:`~benchmarks.gpu_cells.measure_cell` has found, by the cells' names.
    """
    rows: Mapping[str, Any] = cells.get(PAIR.name, {}).get("rows", {})
    beside = [row["times_the_field"] for name, row in rows.items() if name in OFFERED and row["times_the_field"]]
    times = max((figures["median"] for figures in beside), default=None)
    whole = cells.get(TEACHER.name, {}).get("whole_training")
    minutes = None if whole is None else whole["seconds"] / 60
    return [
        {
            "what": f"{PAIR.name}: times as fast as the field's way", "wanted": f"at least {TIMES_FASTER:g}",
            "found": times, "met": None if times is None else times >= TIMES_FASTER,
        },
        {
            "what": f"{TEACHER.name}: minutes for {EPOCHS} epochs, each tested and saved",
            "wanted": f"under {MINUTES_OF_EPOCHS:g}", "found": minutes,
            "met": None if minutes is None else minutes < MINUTES_OF_EPOCHS,
        },
    ]  # fmt: skip


def _sentence(expectation: Mapping[str, Any]) -> str:
    verdict = {True: "met", False: "not met", None: "not measured"}[expectation["met"]]
    found = "" if expectation["found"] is None else f", found {expectation['found']:.2f}"
    return f"{expectation['what']}: wanted {expectation['wanted']}{found}: {verdict}"


def _packed_sentence(found: Mapping[str, Any]) -> str:
    if "skipped" in found:
        return f"several at once: left out ({found['skipped']})"
    rates = [
        f"{count}: {rate:,.0f} ({found['gain'][count]:.2f} x)" for count, rate in found["images_per_second"].items()
    ]
    return f"processes at once, images a second of all ({found['way']}): {', '.join(rates)}"


def _show(cell: Cell, found: Mapping[str, Any]) -> None:
    rows = [
        (
            name, f"{1000 * row['seconds_per_step']:.2f}", f"{row['images_per_second']:,.0f}",
            spread(row["gain"]) if row["gain"] else "-",
            f"{row['times_the_field']['median']:.2f}" if row["times_the_field"] else "-",
            _per_cent(row, "share_of_bf16_peak"), _per_cent(row, "share_of_bandwidth"),
        )
        for name, row in found["rows"].items()
    ]  # fmt: skip
    columns = (
        "way",
        "ms a step",
        "images / s",
        "times the row above",
        "times the field",
        "of bf16 peak",
        "of bandwidth",
    )
    table(cell.name, columns, rows, caption="medians (quartiles)", width=140)
    for name, why in found["skipped"].items():
        print(f"left out: {name} ({why})")
    if (whole := found.get("whole_training")) is not None:
        parts = {"steps": "steps", "starts of epochs": "epoch_starts", "tests": "tests", "saving": "saving"}
        shown = ", ".join(f"{name} {whole[f'{key}_seconds'] / 60:.1f}" for name, key in parts.items())
        minutes = whole["seconds"] / 60
        print(f"{whole['epochs']} epochs by {whole['way']}: {minutes:.1f} minutes ({shown})", flush=True)


def _per_cent(row: Mapping[str, Any], key: str) -> str:
    return f"{100 * row[key]:.1f} %" if key in row else "-"


def _arguments(words: Sequence[str] | None) -> argparse.Namespace:
    listed = "; ".join(f"{number} {cell.name}" for number, cell in enumerate(CELLS, start=1))
    numbers = range(1, len(CELLS) + 1)
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--minutes", type=float, default=8.0, help="time for everything")
    parser.add_argument(
        "--cells", type=int, nargs="+", choices=numbers, default=list(numbers), metavar="N", help=listed
    )
    parser.add_argument("--rounds", type=int, default=7, help="counted blocks of each way at most, at least 2")
    parser.add_argument(
        "--workers", type=int, default=min(8, available_cores()), help="processes of the field's loader"
    )
    parser.add_argument("--processes", type=int, default=4, help="trainings at once, at most")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    parser.add_argument("--tiny", action="store_true", help="a small network on 256 images, to try everything out")
    parser.add_argument("--json", type=Path, help="file to write the numbers to")
    given = parser.parse_args(words)
    if given.minutes <= 0 or given.rounds < 2 or given.workers < 0 or given.processes < 1 or given.threads < 1:
        parser.error("needs --minutes above 0, --rounds of at least 2 and --processes and --threads of at least 1")
    return given


if __name__ == "__main__":
    run(main)
