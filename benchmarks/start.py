"""How long until the first step? Starts trainings in fresh processes, not compiled and compiled, cold and warm.

Counted is from the start of Python to the end of the first step: imports, the networks, their compilation; images are
made up, so that none are read. Then a step is timed with and without compilation, side by side in one process. It is
worth it to compile from as many steps on as those seconds are what a step saves.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from tempfile import TemporaryDirectory
from typing import Any

from benchmarks import timing
from soteacher.errors import InputError

PAIR = "wrn_40_2:wrn_16_2"
TARGET = 15.0
"""Seconds to the first step that a compiled training may take where its code is kept from an earlier one."""
MARKS = ("imported", "made", "first step")
PLAIN, WARM, COLD = "not compiled", "compiled, warm", "compiled, cold"
CACHE = "TORCHINDUCTOR_CACHE_DIR"
BATCHES = 4
"""In an epoch of the images that are made up."""
TRAIN = "train"
"""Makes this program one of the processes."""


def main() -> None:
    """Measure, print tables and write the numbers to a JSON file if one is named."""
    given = _arguments()
    teacher, colon, student = given.pair.partition(":")
    if not colon:
        raise InputError(f"a pair is written TEACHER:STUDENT, got {given.pair!r}")
    found: dict[str, Any] = {}
    for role, method, title in (
        ("student", "kd", f"{teacher} -> {student}, kd"),
        ("teacher", "soteacher", f"{teacher}, soteacher"),
    ):
        case = [role, method, teacher, student, str(given.batch_size)]
        found[title] = measure(case, threads=given.threads, rounds=given.rounds, rounds_of_steps=given.steps)
        _show(f"{title}, batch {given.batch_size}, {given.threads} threads", found[title])
    settings = {"pair": given.pair, "batch_size": given.batch_size, "rounds": given.rounds, "steps": given.steps}
    timing.record(given.json, settings=settings, results={"target_seconds": TARGET, "cases": found},
                  threads=given.threads)  # fmt: skip


def measure(case: Sequence[str], *, threads: int, rounds: int, rounds_of_steps: int) -> dict[str, Any]:
    """Return the seconds to each mark by way, those of a step, and from how many steps on it is worth to compile.

    Args:
        case: what :func:`train` takes.
        threads: of arithmetic.
        rounds: counted starts, not compiled and with a warm cache; with a cold one there is one.
        rounds_of_steps: counted steps, with and without compilation.

    Raises:
        InputError: a process has died.
    """
    ways: dict[str, list[dict[str, float]]] = {PLAIN: [], WARM: [], COLD: []}
    with TemporaryDirectory() as folder, _variable(CACHE, folder):
        ways[COLD].append(start(case, compiled=True, threads=threads))
        calls: dict[str, Callable[[], object]] = {
            PLAIN: lambda: ways[PLAIN].append(start(case, compiled=False, threads=threads)),
            WARM: lambda: ways[WARM].append(start(case, compiled=True, threads=threads)),
        }
        timing.alternate(calls, rounds=rounds, warm_up=0)
        steps = step_seconds(case, rounds=rounds_of_steps)
    to_marks = {
        way: {mark: statistics.median(times[mark] for times in starts) for mark in MARKS}
        for way, starts in ways.items()
    }
    step = {way: statistics.median(times) for way, times in steps.items()}
    saved, first = step[PLAIN] - step[WARM], {way: times[MARKS[-1]] for way, times in to_marks.items()}
    return {
        "seconds_to": to_marks,
        "step_seconds": step,
        "step_times_as_fast": timing.ratio(steps, PLAIN, WARM),
        "steps_until_worth_it": {
            way: (first[way] - first[PLAIN]) / saved if saved > 0 else None for way in (WARM, COLD)
        },
        "meets_target": first[WARM] <= TARGET,
    }  # fmt: skip


def start(case: Sequence[str], *, compiled: bool, threads: int) -> dict[str, float]:
    """Return the seconds from the start of a process to each of its marks.

    Raises:
        InputError: it died before.
    """
    command = [sys.executable, "-m", "benchmarks.start", TRAIN, *case, json.dumps(compiled)]
    seconds: dict[str, float] = {}
    with _variable("OMP_NUM_THREADS", str(threads)):
        began = time.perf_counter()
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            for line in process.stdout:
                seconds[line.strip()] = time.perf_counter() - began
    if process.returncode or list(seconds) != list(MARKS):
        raise InputError(f"a process that was to train ended with status {process.returncode} after {list(seconds)}")
    return seconds


def train(role: str, method: str, teacher: str, student: str, batch_size: str, compiled: str) -> None:
    """Be one of the processes: take a step, and print each mark when it is reached."""
    take_step = _training(role, method, teacher, student, batch_size, compiled=json.loads(compiled), tell=_tell)
    _tell("made")
    take_step()
    _tell("first step")


def _tell(mark: str) -> None:
    print(mark, flush=True)


def step_seconds(case: Sequence[str], *, rounds: int) -> dict[str, list[float]]:
    """Return the seconds of each counted step, not compiled and compiled."""
    role, method, teacher, student, batch_size = case
    calls = {
        way: _training(role, method, teacher, student, batch_size, compiled=compiled)
        for way, compiled in ((PLAIN, False), (WARM, True))
    }
    return timing.alternate(calls, rounds=rounds)


def _training(
    role: Any,
    method: str,
    teacher: str,
    student: str,
    batch_size: str,
    *,
    compiled: bool,
    tell: Callable[[str], None] = lambda _: None,
) -> Callable[[], None]:
    """Return a function that takes the next step of a training."""
    from benchmarks.ours import assembled, batches, data_of, steps, study_of, trainee_of  # their time counts

    tell("imported")
    networks: dict[str, Any] = {
        "teachers": {"own": {"model": teacher, "method": method if role == "teacher" else "standard"}},
        "students": {"own": {"model": student, "method": method}} if role == "student" else {},
    }
    training = {"batch_size": int(batch_size), "epochs": 2, "compile": compiled}
    study = study_of(data_of(examples=BATCHES * int(batch_size)), **networks, training=training)
    made = assembled(study, role, "own")
    return steps(trainee_of(study, role, "own", made), batches(study, made.views("training")))


@contextmanager
def _variable(name: str, value: str) -> Generator[None, None, None]:
    """Set a variable of the environment for a while."""
    before = os.environ.get(name)
    os.environ[name] = value
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


def _show(title: str, found: Mapping[str, Any]) -> None:
    worth = found["steps_until_worth_it"]
    timing.table(
        title,
        ("way", *(f"s to {mark}" for mark in MARKS), "ms a step", "worth it from"),
        [
            (
                way, *(f"{seconds[mark]:.1f}" for mark in MARKS),
                f"{1000 * found['step_seconds'][way]:.0f}" if way in found["step_seconds"] else "",
                f"{worth[way]:,.0f} steps" if worth.get(way) is not None else "",
            )
            for way, seconds in found["seconds_to"].items()
        ],
        caption=f"medians; compiled steps are {timing.spread(found['step_times_as_fast'])} times as fast; "
        f"warm starts {'meet' if found['meets_target'] else 'MISS'} the target of {TARGET:g} s",
    )  # fmt: skip


def _arguments() -> argparse.Namespace:
    parser = timing.arguments(__doc__, rounds=5)
    parser.add_argument("--pair", default=PAIR, help="TEACHER:STUDENT, names of networks")
    parser.add_argument("--steps", type=int, default=20, help="counted steps, not compiled and compiled, at least 2")
    return timing.checked(parser)


if __name__ == "__main__":
    if sys.argv[1:2] == [TRAIN]:
        train(*sys.argv[2:])
    else:
        timing.run(main)
