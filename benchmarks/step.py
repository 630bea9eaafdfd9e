"""What do SoTeacher's regularisers cost? Times teacher training steps with and without them.

Two copies of one network train side by side in one process, a step of the one and a step of the other in turn, so that
whatever else the machine does falls on both alike. Reported are medians over the rounds, of wall-clock time and of the
processor time of all threads; where other programs run, the second is the steadier.
"""

from __future__ import annotations

import argparse
import statistics
import time
from itertools import repeat
from typing import Any

from benchmarks import timing
from benchmarks.ours import UNACCELERATED, assembled, batches, data_of, steps, study_of, trainee_of

METHODS = ("standard", "soteacher")


def main() -> None:
    """Measure, print a table and write the numbers to a JSON file if one is named."""
    given = _arguments()
    seconds = measure(given.model, batch_size=given.batch_size, rounds=given.rounds)
    result = {
        "images_per_second": {
            name: given.batch_size / statistics.median(times) for name, times in seconds["wall"].items()
        },
        "time_ratio": {clock: timing.ratio(times, "soteacher", "standard") for clock, times in seconds.items()},
    }
    _print(result, title=f"{given.model}, batch {given.batch_size}, training step on the CPU")
    settings = {"model": given.model, "batch_size": given.batch_size, "rounds": given.rounds}
    timing.record(given.json, settings=settings, results={**result, "step_seconds": seconds}, threads=given.threads)


def measure(model: str, *, batch_size: int, rounds: int) -> dict[str, dict[str, list[float]]]:
    """Return the seconds of every counted step, by clock and method; all steps are on one batch."""
    study = study_of(
        data_of(),
        teachers={name: {"model": model, "method": name} for name in METHODS},
        students={"alone": {"model": model, "method": "alone"}},
        training={"batch_size": batch_size, **UNACCELERATED},
    )
    batch = next(batches(study))
    variants = {
        name: steps(trainee_of(study, "teacher", name, assembled(study, "teacher", name)), repeat(batch))
        for name in METHODS
    }
    clocks = {"wall": time.perf_counter, "processor": time.process_time}
    return timing.alternate_clocks(variants, clocks, rounds=rounds)


def _print(result: dict[str, Any], *, title: str) -> None:
    shown = [
        f"{found['median']:.3f} x ({found['quartile_low']:.3f} to {found['quartile_high']:.3f})"
        for found in result["time_ratio"].values()
    ]
    timing.table(
        title,
        ("method", "images / s", "wall time of a step", "processor time of a step"),
        [
            (name, f"{result['images_per_second'][name]:.1f}", *cells)
            for name, cells in zip(METHODS, (["1", "1"], shown), strict=True)
        ],
        caption="median (quartiles) over pairs of steps",
    )


def _arguments() -> argparse.Namespace:
    parser = timing.arguments(__doc__, rounds=20)
    parser.add_argument("--model", default="wrn_40_2", help="name of the teacher's network")
    return timing.checked(parser)


if __name__ == "__main__":
    timing.run(main)
