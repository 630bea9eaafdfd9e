"""What a run shows: bars on a terminal, plain lines in a pipe, and the same lines in the run's ``log.txt``."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TextIO

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Table

from soteacher import report
from soteacher.jobs import Job, jobs_of
from soteacher.report import cost_table, published_numbers, read_run, summary_sentence, summary_table
from soteacher.report.series_tables import correlation_sentences, tally_table
from soteacher.run_folder import LOG, network_folder, read_config

SECONDS_BETWEEN_LINES = 5.0
"""In a pipe, a network's epochs are not told more often than this."""


class ProgressDisplay:
    """Takes the events of a study's networks; see :func:`soteacher.networks.train_network`."""

    def __init__(self, run: Path) -> None:
        self._run = run
        self._series = run
        self._point: str | None = None
        self._console = Console()
        self._log: TextIO | None = None
        self._tasks: dict[Job, TaskID] = {}
        self._told: dict[Job, float] = {}
        self._all: TaskID | None = None
        self._bars = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=12 if self._console.width < 110 else 30),
            TextColumn("{task.fields[figures]}"),
            TimeRemainingColumn(compact=True),
            console=self._console,
            disable=not self._console.is_terminal,
        )

    def __enter__(self) -> ProgressDisplay:
        return self

    def __exit__(self, *error: object) -> None:
        self._bars.stop()
        if self._log is not None:
            self._log.close()

    def __call__(self, job: Job, event: dict[str, Any]) -> None:
        """Show one event of one network; that of a series holds the ``point``, whose folder is then the run's."""
        if event.get("point", self._point) != self._point:
            self._go_to(event["point"], event["place"])
        if event["event"] == "step":
            self._step(job, event)
        elif event["event"] == "started":
            self._write(f"{job.name}: {_ways(event['how'])}")
        elif event["event"] == "epoch":
            self._epoch(job, event)
        elif event["event"] == "finished":
            self._finished(job, event["row"], counted=event.get("counted", True))

    def _go_to(self, point: str, place: str) -> None:
        """Turn to the next run of a series."""
        if self._log is not None:
            self._log.close()
        if self._all is not None:
            self._bars.remove_task(self._all)
        self._point, self._log, self._all = point, None, None
        self._run = self._series / "points" / point
        self._bars.console.print(f"point {point} ({place})", highlight=False, markup=False)

    def _step(self, job: Job, event: Mapping[str, Any]) -> None:
        total = event["epochs"] * event["steps_per_epoch"]
        self._bars.start()  # not before: a download has bars of its own, and a terminal shows one set at a time
        if job not in self._tasks:
            self._start_all()
            self._tasks[job] = self._bars.add_task(f"{job.arm}/{job.seed}", total=total, figures="")
        figures = (
            f"{_stage(event)}{event['epoch'] + 1}/{event['epochs']} loss {event['loss']:.2f} "
            f"acc {100 * event['accuracy']:.1f}% {event['images_per_second']:,.0f} img/s"
        )
        done = event["epoch"] * event["steps_per_epoch"] + event["step"]
        self._bars.update(self._tasks[job], total=total, completed=done, figures=figures)

    def _start_all(self) -> None:
        """Show how many networks of the study are finished."""
        if self._all is None:
            jobs = jobs_of(read_config(self._run))
            folders = (network_folder(self._run, job.role, job.arm, job.seed) for job in jobs)
            finished = sum((folder / "model.json").exists() for folder in folders)
            self._all = self._bars.add_task(
                f"all {len(jobs)} networks", total=len(jobs), completed=finished, figures=""
            )

    def _epoch(self, job: Job, event: Mapping[str, Any]) -> None:
        line = (
            f"{job.name}: {_stage(event)}epoch {event['epoch'] + 1}/{event['epochs']}, loss {event['train_loss']:.3f}, "
            f"accuracy {100 * event['train_accuracy']:.1f} % train, {_tested(event)}"
            f"{event['images_per_second']:,.0f} images/s"
        )
        now = time.monotonic()
        seldom = now - self._told.get(job, 0.0) >= SECONDS_BETWEEN_LINES
        if seldom and not self._console.is_terminal:
            self._told[job] = now
            print(line, flush=True)
        self._write(line)

    def _finished(self, job: Job, row: Mapping[str, Any], *, counted: bool) -> None:
        if job in self._tasks:
            self._bars.remove_task(self._tasks.pop(job))
        if self._all is not None and counted:
            self._bars.advance(self._all)
        line = (
            f"{job.name}: finished, test accuracy {100 * row['accuracy_last']:.2f} % "
            f"(train {100 * row['train_accuracy']:.2f} %), {row['train_seconds']:.0f} s"
        )
        if self._console.is_terminal:
            self._bars.console.print(line, highlight=False)
        else:
            print(line, flush=True)
        self._write(line)

    def _write(self, line: str) -> None:
        if self._log is None:
            self._log = (self._run / LOG).open("a", encoding="utf-8")
        self._log.write(line + "\n")
        self._log.flush()


def _drawn(table: report.Table) -> Table:
    """Return a table of the report as the terminal draws it."""
    drawn = Table()
    for column, numeric in zip(table.columns, table.numeric, strict=True):
        drawn.add_column(column, justify="right" if numeric else "left", overflow="fold")
    for row in table.rows:
        drawn.add_row(*row)
    return drawn


def _ways(how: Mapping[str, Any]) -> str:
    """Return in words how a network is run."""
    ways = [
        "channels last" if how["channels_last"] else "channels first",
        "compiled" if how["compiled"] else "not compiled",
        f"{how['threads']} threads" if how["threads"] > 1 else "1 thread",
    ]
    return ", ".join([*ways, f"teacher {how['teacher']}"] if "teacher" in how else ways)


def _stage(event: Mapping[str, Any]) -> str:
    """Return the stage of an event where it is not the training itself."""
    return f"{event['stage']}, " if "stage" in event else ""


def _tested(event: Mapping[str, Any]) -> str:
    """Return the accuracy on the test images, which is measured in the training only."""
    return f"{100 * event['test_accuracy']:.1f} % test, " if "test_accuracy" in event else ""


class DownloadBar:
    """Takes the progress of a download, or of files that are read: name, how much is done, and of how much if known."""

    def __init__(self) -> None:
        self._console = Console()
        self._bars = Progress(console=self._console, disable=not self._console.is_terminal, transient=True)
        self._tasks: dict[str, TaskID] = {}

    def __enter__(self) -> DownloadBar:
        return self

    def __exit__(self, *error: object) -> None:
        self._bars.stop()

    def __call__(self, name: str, done: int, total: int | None) -> None:
        """Show how far a download has come."""
        if name not in self._tasks:
            self._tasks[name] = self._bars.add_task(name, total=total)
            if not self._console.is_terminal:
                print(name, flush=True)
        self._bars.start()
        self._bars.update(self._tasks[name], completed=done, total=total)
        if self._bars.finished:
            self._bars.stop()


def print_results(results: dict[str, Any], run: Path) -> None:
    """Print the table of a study, a sentence for each comparison, and where everything lies."""
    console = Console(width=None if Console().is_terminal else 160)
    if results.get("kind") == "series":
        _print_series(results, run, console)
        return
    teachers = [row for row in results["rows"] if row["role"] == "teacher"]
    if results["summary"]:
        published = published_numbers(read_run(run))
        tables = [summary_table(results), cost_table(results), *([published.table] if published else [])]
        for table in tables:
            if table.rows:
                console.print(_drawn(table))
        for entry in results["summary"]:
            if entry["baseline"] is not None:
                console.print(summary_sentence(entry), highlight=False, markup=False)
    else:
        for row in teachers:
            accuracy = f"{100 * row['accuracy_last']:.2f} %"
            console.print(f"{row['arm']}/seed{row['seed']}: test accuracy {accuracy}", highlight=False, markup=False)
    skipped = results["skipped_images"]
    if skipped:
        more = " ..." if len(skipped) > 3 else ""
        line = f"left out {len(skipped)} images that cannot be read: {', '.join(skipped[:3])}{more}"
        console.print(line, highlight=False, soft_wrap=True, markup=False)
    networks = f"networks: {run}/{'students' if results['summary'] else 'teachers'}/ARM/seedN/model.safetensors"
    for line in (networks, f"report: {run / 'report.html'}"):
        console.print(line, highlight=False, soft_wrap=True, markup=False)


def _print_series(results: dict[str, Any], run: Path, console: Console) -> None:
    """Print how often each teacher of a series and its students were better, and where the page is."""
    tally = tally_table(results)
    if tally.rows:
        console.print(_drawn(tally))
    for entry in correlation_sentences(results):
        console.print(f"{entry['reason']} {entry['verdict']}", highlight=False, markup=False)
    for line in (f"points: {run}/points/NAME", f"report: {run / 'report.html'}"):
        console.print(line, highlight=False, soft_wrap=True, markup=False)
