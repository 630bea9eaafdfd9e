"""Trains as much of SoTeacher's table 1 as fits, in one call or in several with the state carried from one to the next.

The first call measures the networks' steps, chooses pairs and number of seeds, and begins; each further call with the
same options goes on, until the table is whole. Every call leaves in time. In the state's folder are the plan
(``plan.json``), ordinary runs (``runs/TEACHER``, each with its ``results.json`` and ``report.html``) and the table so
far (``table1.md``); of networks that nothing waits for any more the weights are dropped.
"""

from __future__ import annotations

import argparse
import math
import signal
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu_plan import (
    RECIPES,
    choose,
    make_up_images,
    measure,
    state_bytes,
    table_studies,
)
from benchmarks.timing import run
from soteacher.config import StudyConfig
from soteacher.errors import InputError, InterruptedRunError
from soteacher.files import read_json, write_json, write_text
from soteacher.jobs import Job, jobs_of
from soteacher.models.weights import FACTS_FILE, WEIGHTS_FILE
from soteacher.reference import matching
from soteacher.run_folder import STATE, network_folder
from soteacher.studies import pick_device, report_again, run_study
from soteacher.terminal import ProgressDisplay

PLAN, MEASURED, TABLE = "plan.json", "measured.json", "table1.md"
SPARE_SECONDS = 20.0
"""For the last step, the state and the page."""
PAPER = "arXiv:2206.06661"


def main(words: Sequence[str] | None = None, clock: Callable[[], float] = time.monotonic) -> None:
    """Go on with the table until it is whole or the call's minutes are over."""
    given = _arguments(words)
    end = clock() + 60 * given.minutes
    device, state = pick_device(given.device), given.state
    if given.tiny:
        make_up_images(_images(given))
    plan = _plan(given, device)
    studies = _studies(given, plan["pairs"], plan["seeds"])
    finished = train(studies, state / "runs", given, device, Deadline(end - given.spare, plan["start_seconds"], clock))
    for teacher, config in studies.items():
        drop_spent_weights(config, state / "runs" / teacher)
    write_text(state / TABLE, table_of(studies, state / "runs"))
    print((state / TABLE).read_text(encoding="utf-8"))
    size = sum(path.stat().st_size for path in state.rglob("*") if path.is_file())
    print(f"{state}: {size / 1e6:.1f} MB; " + ("all is done" if finished else "go on with the same command"))


class Deadline:
    """Asks the study under way to stop when the time has come: it saves its state, as after SIGTERM.

    Args:
        end: by the clock.
        start_seconds: what a network takes to begin: with less left no further one is begun.
        clock: in seconds.
    """

    def __init__(self, end: float, start_seconds: float, clock: Callable[[], float]) -> None:
        self._end, self._start_seconds, self._clock = end, start_seconds, clock
        self._asked = False

    def over(self, *, before_a_start: bool = False) -> bool:
        """Return whether there is no time left, or none to begin a network in."""
        return self._clock() + (self._start_seconds if before_a_start else 0.0) > self._end

    def __call__(self, job: Job, event: Mapping[str, Any]) -> None:
        """Take in one event of one network."""
        del job
        if not self._asked and self.over(before_a_start=event["event"] == "finished"):
            self._asked = True
            signal.raise_signal(signal.SIGTERM)  # what the study listens to while it runs


def _plan(given: argparse.Namespace, device: str) -> dict[str, Any]:
    """Return what is trained: as an earlier call has chosen, or chosen now."""
    wanted = {
        "pairs": given.pairs, "seeds": given.seeds, "epochs": given.epochs, "whole": given.whole, "set": given.set,
        "workers": given.workers, "device": device, "tiny": given.tiny,
    }  # fmt: skip
    path = given.state / PLAN
    if path.exists():
        plan = read_json(path)
        changed = [key for key, value in wanted.items() if plan["wanted"][key] != value]
        if changed:
            raise InputError(
                f"{path} was made with {changed[0]} {plan['wanted'][changed[0]]}, and {wanted[changed[0]]} came; give "
                f"the same options, or another --state"
            )
        return plan
    start = time.monotonic()
    measured = _measured(given, device, wanted)
    total, longest_start = (
        given.total_minutes or given.minutes,
        max(cost["start_seconds"] for cost in measured.values()),
    )
    calls = math.ceil(total / given.minutes)  # in each the networks under way are set up anew
    seconds = 60 * total - (time.monotonic() - start) - calls * (given.spare + longest_start)
    pairs, seeds, needed = choose(
        given.pairs, measured, seconds=seconds, seeds=given.seeds, epochs=given.epochs, workers=given.workers,
        **_options(given),
    )  # fmt: skip
    studies = _studies(given, pairs, seeds).values()
    plan: dict[str, Any] = {
        "wanted": wanted, "pairs": pairs, "seeds": seeds, "seconds": needed,
        "start_seconds": longest_start,
        "state_bytes": sum(state_bytes(config, measured, workers=given.workers) for config in studies),
    }  # fmt: skip
    write_json(path, plan)
    print(
        f"plan: {', '.join(pairs)}, {seeds} seeds, {given.epochs} epochs: about {needed / 60:.0f} minutes; the state "
        f"may grow to {plan['state_bytes'] / 1e6:.0f} MB",
        flush=True,
    )
    return plan


def _measured(given: argparse.Namespace, device: str, wanted: Mapping[str, Any]) -> dict[str, Any]:
    """Return what each network costs, measured now, or by an earlier call for a plan that did not fit."""
    path, settings = given.state / MEASURED, {key: wanted[key] for key in ("pairs", "set", "workers", "device", "tiny")}
    if path.exists() and (found := read_json(path))["settings"] == settings:
        return found["costs"]
    measured = measure(
        _studies(given, given.pairs, 1), device=device, workers=given.workers, threads=torch.get_num_threads(),
        data_root=given.data_root,
    )  # fmt: skip
    write_json(path, {"settings": settings, "costs": measured})
    return measured


def _studies(given: argparse.Namespace, pairs: Sequence[str], seeds: int) -> dict[str, StudyConfig]:
    return table_studies(pairs, seeds=seeds, epochs=given.epochs, **_options(given))


def _options(given: argparse.Namespace) -> dict[str, Any]:
    return {"whole": given.whole, "settings": given.set, "tiny": _images(given) if given.tiny else None}


def _images(given: argparse.Namespace) -> Path:
    return given.state / "images.npz"


def train(
    studies: Mapping[str, StudyConfig], runs: Path, given: argparse.Namespace, device: str, deadline: Deadline
) -> bool:
    """Run the studies, or go on with them, until all are finished or the deadline has come; return whether they are."""
    for teacher, config in studies.items():
        if deadline.over():
            return False
        try:
            with ProgressDisplay(runs / teacher) as display:

                def tell(job: Job, event: dict[str, Any], display: ProgressDisplay = display) -> None:
                    display(job, event)
                    deadline(job, event)

                run_study(
                    config, runs / teacher, data_root=given.data_root, device=device, resume=True,
                    workers=given.workers, on_event=tell,
                )  # fmt: skip
        except InterruptedRunError:
            report_again(runs / teacher)
            return False
    return True


def drop_spent_weights(config: StudyConfig, folder: Path) -> None:
    """Remove the weights of finished networks that no unfinished one needs; their figures stay."""
    needs = jobs_of(config)

    def folder_of(job: Job) -> Path:
        return network_folder(folder, job.role, job.arm, job.seed)

    waited_for = {needed for job, needed in needs.items() if not (folder_of(job) / FACTS_FILE).exists()}
    for job in needs:
        if (folder_of(job) / FACTS_FILE).exists() and job not in waited_for:
            for path in (folder_of(job) / WEIGHTS_FILE, *folder_of(job).glob("epochs/*.safetensors")):
                path.unlink(missing_ok=True)


def table_of(studies: Mapping[str, StudyConfig], runs: Path) -> str:
    """Return the table so far as Markdown, with what it depends on and the paper's numbers."""
    lines = ["# SoTeacher's table 1", ""]
    for teacher, config in studies.items():
        if not (runs / teacher / "results.json").exists():
            continue
        results, machine = read_json(runs / teacher / "results.json"), read_json(runs / teacher / STATE)["environment"]
        done, training = len(results["rows"]), config.training
        lines += [
            f"{machine['device']}, torch {machine['torch']}, commit {machine['commit']}; seeds "
            f"{', '.join(map(str, config.seeds))}; {training.epochs} epochs, batch {training.batch_size}, "
            f"{training.precision}; {done} of {len(jobs_of(config))} networks.",
            "",
            "| networks | teacher | teacher accuracy, % | student accuracy, % [95 % interval] | seeds "
            "| difference to the standard teacher, points [95 % interval] | verdict | the paper's, % |",
            "|---|---|---:|---:|---:|---:|---|---:|",
            *_lines(results, teacher, config),
            "",
        ]
    return "\n".join(lines)


def _lines(results: Mapping[str, Any], teacher: str, config: StudyConfig) -> Iterator[str]:
    for arm in results["summary"]:
        student = arm["arm"].partition("-")[2] or arm["arm"]
        student = student.partition("_")[2]
        paper = [] if arm["teacher_arm"] is None else [
            f"{100 * row.accuracy:.2f}{' (from memory)' if 'memory' in row.note else ''}"
            for row in matching(data="cifar100", teacher=teacher, student=student, method=arm["method"],
                                teacher_method=arm["teacher_arm"])
            if PAPER in row.source and config.data.source == "cifar100"
        ]  # fmt: skip
        cells = (
            f"{teacher} -> {student}", arm["teacher_arm"] or "none", _per_cent(arm["teacher_accuracy_mean"]),
            _per_cent(arm["accuracy_mean"], arm["accuracy_ci95"]), str(len(arm["seeds"])),
            _per_cent(arm["difference_mean"], arm["difference_ci95"], sign="+"), arm["verdict"] or "-",
            ", ".join(paper) or "-",
        )  # fmt: skip
        yield f"| {' | '.join(cells)} |"


def _per_cent(value: float | None, interval: Sequence[float] | None = None, *, sign: str = "") -> str:
    if value is None:
        return "-"
    shown = f"{100 * value:{sign}.2f}"
    return shown if interval is None else f"{shown} [{', '.join(f'{100 * end:{sign}.2f}' for end in interval)}]"


def _arguments(words: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--state", type=Path, required=True, help="folder that is carried from call to call")
    parser.add_argument("--minutes", type=float, default=9.0, help="time for this call")
    parser.add_argument("--total-minutes", type=float, help="time for all calls together; by default for this one")
    parser.add_argument("--data-root", type=Path, help="folder of CIFAR-100")
    parser.add_argument("--pairs", nargs="+", choices=list(RECIPES), default=list(RECIPES))
    parser.add_argument("--seeds", type=int, default=3, help="of each network, at most")
    parser.add_argument("--epochs", type=int, default=240, help="of each network; the schedule is scaled")
    parser.add_argument("--whole", action="store_true", help="the ablations, controls and students alone too")
    parser.add_argument("--workers", type=int, default=1, help="networks side by side")
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="settings over the recipes'")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    parser.add_argument("--tiny", action="store_true", help="a small network on made-up images, to try everything out")
    given = parser.parse_args(words)
    if min(given.minutes, given.total_minutes or 1, given.seeds, given.epochs, given.workers) <= 0:
        parser.error("needs --minutes, --total-minutes, --seeds, --epochs and --workers above 0")
    given.spare = min(SPARE_SECONDS, 60 * given.minutes / 10)
    return given


if __name__ == "__main__":
    run(main)
