"""Do networks side by side use the cores better? Times SoTeacher's teachers in one process and in two.

Each variant's processes are started once and then take turns on command: those of one variant train a few steps, input
included, while those of all others wait. Reported are medians of the images that all processes of a variant train on in
a second.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from types import TracebackType
from typing import Any

from benchmarks import timing
from benchmarks.ours import assembled, batches, data_of, steps, study_of, trainee_of
from soteacher.environment import KEPT_PAGES
from soteacher.errors import InputError
from soteacher.pool import available_cores, cores_of_workers

MODELS = ("resnet8", "wrn_16_2")
READY, DONE = "ready", "done"
SERVE = "serve"
"""Makes this program one of the processes."""
EXAMPLES = 10_000
"""Images of each process."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Way:
    """How networks share the machine."""

    processes: int
    """Networks side by side."""
    threads: int | None
    """Of arithmetic in each process; ``None``: what PyTorch chooses, which is all cores for each."""
    pinned: bool = False
    """Whether each process stays on its own cores."""
    keeps_pages: bool = True
    """Whether freed memory is kept."""


def ways_of(cores: int) -> dict[str, Way]:
    """Return what is compared on so many cores; pinned processes are among it where the system lets them be pinned."""
    ways = {
        "one process, one thread": Way(processes=1, threads=1),
        f"one process, {cores} threads": Way(processes=1, threads=cores),
        f"{cores} processes, pinned": Way(processes=cores, threads=1, pinned=True),
        f"{cores} processes, not pinned": Way(processes=cores, threads=1),
        f"{cores} processes, PyTorch's threads": Way(processes=cores, threads=None, keeps_pages=False),
    }
    return {name: way for name, way in ways.items() if not way.pinned or cores_of_workers(way.processes, 1)}


class Processes:
    """The processes of one way, which train when they are told to; they end with the context.

    Args:
        way: how they share the machine.
        command: starts one; it writes ``ready``, and ``done`` for each line that it reads and has trained for.
    """

    def __init__(self, way: Way, command: Sequence[str]) -> None:
        pinned = cores_of_workers(way.processes, way.threads or 1) if way.pinned else []
        variables = _variables(way)
        self._processes: list[subprocess.Popen[str]] = []
        for number in range(way.processes):
            process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=variables
            )  # fmt: skip
            if pinned:
                os.sched_setaffinity(process.pid, pinned[number])
            self._processes.append(process)

    def __enter__(self) -> Processes:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for process in self._processes:
            process.communicate()  # the end of its input is the end of its work

    def wait(self) -> None:
        """Wait until all processes can train."""
        self._wait_for(READY)

    def train(self) -> None:
        """Let all processes train for a while at the same time."""
        for process in self._processes:
            assert process.stdin is not None
            with suppress(BrokenPipeError):  # it has died: the end of its answers says so
                process.stdin.write("train\n")
                process.stdin.flush()
        self._wait_for(DONE)

    def _wait_for(self, word: str) -> None:
        for process in self._processes:
            assert process.stdout is not None
            line = process.stdout.readline().strip()
            if line != word:
                raise InputError(f"a process answered {line!r}, wanted {word!r}: it has died, and says above why")


def _variables(way: Way) -> dict[str, str]:
    """Return the environment of a way's processes."""
    counts = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")
    variables = {name: value for name, value in os.environ.items() if name not in (*counts, *KEPT_PAGES)}
    if way.keeps_pages:
        variables |= {name: str(value) for name, value in KEPT_PAGES.items()}
    return variables if way.threads is None else variables | dict.fromkeys(counts, str(way.threads))


def main() -> None:
    """Measure, print tables and write the numbers to a JSON file if one is named."""
    given = _arguments()
    cores = given.threads
    found: dict[str, Any] = {}
    for model in given.models:
        found[model] = measure(
            model, ways_of(cores), batch_size=given.batch_size, num_steps=given.steps, rounds=given.rounds
        )
        ways = found[model]["ways"]
        timing.table(
            f"{model}, soteacher's teacher, batch {given.batch_size}, {cores} cores",
            ("way", "images / s", "times one thread", f"times {cores} threads"),
            [
                (name, f"{row['images_per_second']:,.0f}", *map(timing.spread, row["times_as_fast_as"].values()))
                for name, row in ways.items()
            ],
            caption="medians (quartiles), input included; images of all processes together",
        )
    settings = {"batch_size": given.batch_size, "rounds": given.rounds, "steps": given.steps, "cores": cores}
    timing.record(given.json, settings=settings, results={"models": found}, threads=cores)


def measure(
    model: str, ways: Mapping[str, Way], *, batch_size: int, num_steps: int, rounds: int
) -> dict[str, dict[str, Any]]:
    """Return the figures of each way to train a network.

    Args:
        model: name of the network.
        ways: by name; the first two are what the others are compared with.
        batch_size: images of a batch.
        num_steps: that each process takes when it is its turn.
        rounds: counted turns of each way.

    Returns:
        ``ways``, by name ``images_per_second`` and ``times_as_fast_as``, the ratios to the first two.

    Raises:
        InputError: a process has died.
    """
    command = [sys.executable, "-m", "benchmarks.side_by_side", SERVE, model, str(batch_size), str(num_steps)]
    with ExitStack() as stack:
        running = {name: stack.enter_context(Processes(way, command)) for name, way in ways.items()}
        for processes in running.values():
            processes.wait()
        turns: dict[str, Callable[[], None]] = {name: processes.train for name, processes in running.items()}
        seconds = timing.alternate(turns, rounds=rounds)
    images = {name: way.processes * num_steps * batch_size for name, way in ways.items()}
    an_image = {name: [time / images[name] for time in times] for name, times in seconds.items()}
    bases = list(ways)[:2]
    return {
        "ways": {
            name: {
                "images_per_second": 1 / statistics.median(times),
                "times_as_fast_as": {base: timing.ratio(an_image, base, name) for base in bases},
            }
            for name, times in an_image.items()
        }
    }


def serve(model: str, batch_size: int, num_steps: int) -> None:
    """Be one of the processes: train so many steps for each line of standard input.

    Threads, cores and pages are set from outside.
    """
    study = study_of(
        data_of(examples=EXAMPLES), teachers={"soteacher": {"model": model, "method": "soteacher"}},
        training={"batch_size": batch_size, "compile": False},
    )  # fmt: skip
    made = assembled(study, "teacher", "soteacher")
    take_step = steps(trainee_of(study, "teacher", "soteacher", made), batches(study))
    take_step()
    print(READY, flush=True)
    for _ in sys.stdin:
        for _ in range(num_steps):
            take_step()
        print(DONE, flush=True)


def _arguments() -> argparse.Namespace:
    parser = timing.arguments(__doc__, rounds=20, threads=available_cores())
    parser.add_argument("--models", nargs="+", default=MODELS, help="networks, one after the other")
    parser.add_argument("--steps", type=int, default=20, help="steps of each process in its turn")
    return timing.checked(parser)


if __name__ == "__main__":
    if sys.argv[1:2] == [SERVE]:
        serve(sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))
    else:
        timing.run(main)
