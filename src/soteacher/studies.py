"""A study: from its settings to trained teachers and students, results and the page.

:func:`run_study` reads from top to bottom; what happens to each network is in ``networks.py``.
"""

from __future__ import annotations

import json
import signal
import sys
import threading
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from hashlib import blake2b
from pathlib import Path
from types import FrameType
from typing import Any

import torch

import soteacher
from soteacher.config import FileTeacher, Student, StudyConfig, TrainedTeacher
from soteacher.data import load_data
from soteacher.diagnostics.card_config import FoldConfig
from soteacher.environment import environment, keep_pages
from soteacher.errors import InputError, InterruptedRunError
from soteacher.files import read_json, write_json
from soteacher.finished import lacks_card, write_missing_card
from soteacher.jobs import (
    Job,
    NetworkFactory,
    OnEvent,
    Study,
    in_turn,
    jobs_of,
    new_classifier,
    spec_of,
)
from soteacher.kept_epochs import check_saved
from soteacher.networks import train_network
from soteacher.out_of_fold import out_of_fold_predictions
from soteacher.pool import Work, available_cores, default_workers, run_side_by_side
from soteacher.report import write_report
from soteacher.run_folder import LOG, STATE, claim, locked, network_folder, read_config
from soteacher.statistics import summarise
from soteacher.study_checks import check_cards, check_names, check_networks, check_out_of_fold
from soteacher.teacher_answers import check_answers, remove_answers

SCHEMA = 1


def run_study(
    config: StudyConfig,
    folder: Path,
    *,
    data_root: Path | None = None,
    device: str = "auto",
    resume: bool = False,
    workers: int | None = None,
    factories: Mapping[str, NetworkFactory] | None = None,
    on_event: OnEvent | None = None,
    on_download: Any = None,
) -> dict[str, Any]:
    """Train every network of a study that is not trained yet, and write ``results.json`` and ``report.html``.

    Args:
        config: the study.
        folder: the run's folder; made, or gone on in with ``resume``.
        data_root: where data sets lie; see :func:`soteacher.data.data_root`.
        device: ``auto``, ``cpu`` or ``cuda``.
        resume: go on in a folder that holds this run.
        workers: networks trained side by side; by default one a core on a CPU, one on a GPU, and as many as before in
            a run that goes on.
        factories: networks of the caller's own by name; the study is then trained in this process.
        on_event: told of every network's progress.
        on_download: told of a download's progress; see :func:`soteacher.data.load_data`.

    Returns:
        What ``results.json`` holds.

    Raises:
        InputError: something in the settings, the data or the folder cannot be used.
        InterruptedRunError: Ctrl-C or SIGTERM; every network's state is saved.
        WorkerDiedError: a worker process was killed.
    """
    device, workers = pick_device(device), _checked_workers(workers, factories)
    check_names(config, factories or {})
    study = Study(config, folder, load_data(config.data, data_root, progress=on_download), device, factories or {})
    check_networks(study)
    check_saved(study)
    check_cards(study)
    check_out_of_fold(study)
    check_answers(study)
    cores = available_cores()
    plan = default_workers(cores, _width(config), device)
    if workers is not None:
        plan = {"workers": workers, "threads": max(1, cores // workers)}
    with locked(folder) as lock:
        state = {
            "data_checksum": study.data.checksum, "device": device, **plan,
            "environment": environment(device, plan["threads"]), "skipped_images": list(map(str, study.data.skipped)),
            "own_networks": {name: _shapes_checksum(study, name) for name in study.factories},
        }  # fmt: skip
        plan = claim(folder, config, state, resume=resume)  # a resumed run keeps its threads: they decide the last bit
        plan = plan if workers is None else {**plan, "workers": workers}
        waiting = {job: needed for job, needed in jobs_of(study.config).items() if not study.finished(job)}
        report = on_event or _ignore
        with stop_requested() as should_stop:
            if config.folds is not None and any(lacks_card(study, job) for job in jobs_of(config)):
                _predict_out_of_fold(study, config.folds, plan["threads"], on_event=report, should_stop=should_stop)
            given = {job: None for job in waiting if isinstance(spec_of(config, job), FileTeacher)}
            _run_here(study, given, threads=plan["threads"], on_event=report, should_stop=should_stop)
            waiting = in_turn(config, {job: needed for job, needed in waiting.items() if job not in given})
            if plan["workers"] == 1 or len(waiting) == 1:
                _run_here(study, waiting, threads=plan["threads"], on_event=report, should_stop=should_stop)
            elif waiting:
                _run_beside(study, waiting, plan, lock.fileno(), data_root, on_event=report, should_stop=should_stop)
            _make_missing_cards(study)
        remove_answers(study)
        return _write_results(config, folder, plan)


def _predict_out_of_fold(
    study: Study, config: FoldConfig, threads: int, *, on_event: OnEvent, should_stop: Callable[[], bool]
) -> None:
    """Train the networks whose predictions the teachers' cards compare with."""

    def tell(fold: int, job: Job, event: dict[str, Any]) -> None:
        # They are none of the study's networks, which are counted.
        on_event(Job("teacher", f"without_fold_{fold + 1}", job.seed), {**event, "counted": False})

    with threads_set(threads):
        out_of_fold_predictions(
            config, study.config.data, study.data, study.folder, device=study.device, factories=study.factories,
            on_event=tell, should_stop=should_stop,
        )  # fmt: skip


def _make_missing_cards(study: Study) -> None:
    """Make the cards of teachers that were finished before the study asked for any."""
    if study.config.card is not None:
        for job in jobs_of(study.config):
            if lacks_card(study, job):
                write_missing_card(study, job)


@contextmanager
def threads_set(threads: int) -> Generator[None, None, None]:
    """Let PyTorch use so many threads for a while."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _width(config: StudyConfig) -> int:
    """Return how many networks of a study can be trained at the same time: its teachers, or its students."""
    trained = [job.role for job in jobs_of(config) if isinstance(spec_of(config, job), (TrainedTeacher, Student))]
    return max(trained.count("teacher"), trained.count("student"), 1)


def _checked_workers(workers: int | None, factories: Mapping[str, NetworkFactory] | None) -> int | None:
    if workers is not None and workers < 1:
        raise InputError(f"workers must be at least 1, got {workers}")
    if factories and workers not in (None, 1):
        raise InputError(
            f"networks of your own are trained in this process: workers must be 1 or left out, got {workers}"
        )
    return 1 if factories else workers


def pick_device(device: str) -> str:
    """Return ``cpu`` or ``cuda`` for a device's name.

    Raises:
        InputError: an unknown name, or a GPU that is not there.
    """
    if device not in ("auto", "cpu", "cuda"):
        raise InputError(f"unknown device {device!r}; known: auto, cpu, cuda")
    there = torch.cuda.is_available()
    if device == "cuda" and not there:
        raise InputError("device cuda was asked for, and PyTorch finds no CUDA device here; use --device cpu")
    return "cuda" if there and device != "cpu" else "cpu"


def _run_here(
    study: Study,
    jobs: Mapping[Job, Job | None],
    *,
    threads: int,
    on_event: OnEvent,
    should_stop: Callable[[], bool],
) -> None:
    """Train networks one after the other in this process."""
    keep_pages()
    with threads_set(threads):
        for job in jobs:
            if should_stop():
                raise InterruptedRunError("stopped between two networks")
            try:
                train_network(study, job, on_event=on_event, should_stop=should_stop)
            except InputError as error:
                raise InputError(f"{job.name}: {error}") from error


def _run_beside(
    study: Study,
    jobs: Mapping[Job, Job | None],
    plan: Mapping[str, Any],
    lock: int,
    data_root: Path | None,
    *,
    on_event: OnEvent,
    should_stop: Callable[[], bool],
) -> None:
    """Train networks side by side in worker processes."""
    works = [Work(job.name, job, asdict(job), needed if needed in jobs else None) for job, needed in jobs.items()]
    root = [] if data_root is None else ["--data-root", str(data_root)]
    command = [
        sys.executable, "-m", "soteacher.worker", str(study.folder), "--device", study.device,
        "--threads", str(plan["threads"]), *root,
    ]  # fmt: skip
    run_side_by_side(
        works,
        command,
        workers=plan["workers"],
        threads=plan["threads"],
        log=study.folder / LOG,
        keep=lock,
        on_event=lambda key, event: on_event(key, event),  # pyright: ignore[reportArgumentType] the keys are jobs
        should_stop=should_stop,
    )


@contextmanager
def stop_requested() -> Generator[Callable[[], bool], None, None]:
    """Give a function that says whether Ctrl-C or SIGTERM has come. A second Ctrl-C ends the process at once."""
    if threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return
    asked = threading.Event()
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def ask(number: int, frame: FrameType | None) -> None:
        del frame
        asked.set()
        signal.signal(number, signal.SIG_DFL)

    for number in before:
        signal.signal(number, ask)
    try:
        yield asked.is_set
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _ignore(job: Job, event: dict[str, Any]) -> None:
    del job, event


def _shapes_checksum(study: Study, model: str) -> str:
    """Return a checksum of the names and shapes of the weights of one of the caller's own networks."""
    state = new_classifier(study, model, pretrained=False)[0].network.state_dict()
    shapes = sorted((name, list(tensor.shape)) for name, tensor in state.items())
    return blake2b(json.dumps(shapes).encode(), digest_size=16).hexdigest()


def collect_results(config: StudyConfig, folder: Path, state: Mapping[str, Any]) -> dict[str, Any]:
    """Return what ``results.json`` holds: the rows of all finished networks, and the summary of the student arms.

    Args:
        config: the study.
        folder: the run's folder.
        state: what was written at the run's first start; see :func:`soteacher.run_folder.claim`.
    """
    paths = [network_folder(folder, job.role, job.arm, job.seed) / "model.json" for job in jobs_of(config)]
    rows = [read_json(path)["row"] for path in paths if path.exists()]
    return {
        "schema": SCHEMA,
        "soteacher_version": soteacher.__version__,
        "recipe": config.name,
        "environment": state["environment"],
        "skipped_images": state["skipped_images"],
        "rows": rows,
        "summary": summarise(rows, {arm.name: arm.baseline for arm in config.arms()}),
    }


def report_again(folder: Path) -> dict[str, Any]:
    """Write ``results.json`` and the page of a run anew from the networks that are finished, also of a stopped run.

    Raises:
        InputError: the folder holds no run.
    """
    config = read_config(folder)
    if not (folder / STATE).exists():
        raise InputError(f"{folder} holds a run that has not started: there is no {STATE} in it")
    return _write_results(config, folder, read_json(folder / STATE))


def _write_results(config: StudyConfig, folder: Path, state: Mapping[str, Any]) -> dict[str, Any]:
    results = collect_results(config, folder, state)
    write_json(folder / "results.json", results)
    write_report(folder)
    return results
