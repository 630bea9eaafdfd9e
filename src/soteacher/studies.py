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
from torch import nn

import soteacher
from soteacher.assembly import assemble, examples_of, look_at
from soteacher.config import FileTeacher, SavedTeacher, Student, StudyConfig, TrainedTeacher
from soteacher.data import load_data
from soteacher.diagnostics.card_config import FoldConfig
from soteacher.environment import environment
from soteacher.errors import InputError, InterruptedRunError
from soteacher.files import read_json, write_json
from soteacher.jobs import (
    Job,
    NetworkFactory,
    OnEvent,
    Study,
    jobs_of,
    load_teacher_file,
    new_classifier,
    rows_of,
    spec_of,
)
from soteacher.kept_epochs import check_saved
from soteacher.models.classifier import Classifier
from soteacher.models.parts import Parts
from soteacher.models.temperature import divide_logits
from soteacher.models.zoo import check_network
from soteacher.networks import train_network, write_missing_card
from soteacher.out_of_fold import fold_studies, out_of_fold_predictions
from soteacher.pool import Work, available_cores, default_workers, run_side_by_side
from soteacher.report import write_report
from soteacher.run_folder import LOG, STATE, claim, locked, network_folder, read_config
from soteacher.statistics import summarise
from soteacher.train.logs import check_loggers

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
    _check_names(config, factories or {})
    study = Study(config, folder, load_data(config.data, data_root, progress=on_download), device, factories or {})
    _check_networks(study)
    check_saved(study)
    _check_out_of_fold(study)
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
            if config.folds is not None and any(job.role == "teacher" for job in waiting):
                _predict_out_of_fold(study, config.folds, plan["threads"], on_event=report, should_stop=should_stop)
            given = {job: None for job in waiting if isinstance(spec_of(config, job), FileTeacher)}
            _run_here(study, given, threads=plan["threads"], on_event=report, should_stop=should_stop)
            waiting = {job: needed for job, needed in waiting.items() if job not in given}
            if plan["workers"] == 1 or len(waiting) == 1:
                _run_here(study, waiting, threads=plan["threads"], on_event=report, should_stop=should_stop)
            elif waiting:
                _run_beside(study, waiting, plan, lock.fileno(), data_root, on_event=report, should_stop=should_stop)
            _make_missing_cards(study)
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


def _check_out_of_fold(study: Study) -> None:
    """Find what the networks of the folds would fail at before anything is trained."""
    if study.config.folds is None:
        return
    for part in fold_studies(
        study.config.folds, study.config.data, study.data, study.folder, study.device, study.factories
    ):
        _check_networks(part)


def _make_missing_cards(study: Study) -> None:
    """Make the cards of teachers that were finished before the study asked for any."""
    if study.config.card is not None:
        for job in jobs_of(study.config):
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


def _check_names(config: StudyConfig, factories: Mapping[str, NetworkFactory]) -> None:
    """Find misspelt networks and missing packages before a data set is downloaded for them."""
    check_loggers(config.logging)
    for spec in (*config.teachers.values(), *config.students.values(), *([config.folds] if config.folds else [])):
        model = None if isinstance(spec, SavedTeacher) else spec.model
        if model is not None and model not in factories:
            check_network(model)


def _shapes_checksum(study: Study, model: str) -> str:
    """Return a checksum of the names and shapes of the weights of one of the caller's own networks."""
    state = new_classifier(study, model, pretrained=False)[0].network.state_dict()
    shapes = sorted((name, list(tensor.shape)) for name, tensor in state.items())
    return blake2b(json.dumps(shapes).encode(), digest_size=16).hexdigest()


def _check_networks(study: Study) -> None:
    """Build every network and its loss, so that what cannot work fails before anything is written."""
    teachers = {name: _untrained(study, name) for name in study.config.teachers}
    for name, classifier in teachers.items():
        look_at(study, classifier, _title(study, name))
    for arm in study.config.arms():
        student, teacher = study.config.students[arm.student], None if arm.teacher is None else teachers[arm.teacher]
        title = "" if arm.teacher is None else _title(study, arm.teacher)
        made = assemble(study, student, role="student", seed=0, teacher=teacher, teacher_name=title)
        made.start_training()
        _check_training(study, Job("student", arm.name, study.config.seeds[0]), student, made.classifier)


def _title(study: Study, teacher: str) -> str:
    """Return how messages call a teacher: by its network, where the settings say it."""
    spec = study.config.teachers[teacher]
    return f"teacher {teacher if isinstance(spec, SavedTeacher) or spec.model is None else spec.model}"


def _untrained(study: Study, teacher: str) -> Classifier:
    """Return a teacher of the study as it is before its training."""
    spec = study.config.teachers[teacher]
    if isinstance(spec, SavedTeacher):
        return _untrained(study, spec.teacher)
    if isinstance(spec, FileTeacher):
        return load_teacher_file(study, spec)[0]
    start = None if spec.start is None else study.config.teachers[spec.start]
    if isinstance(start, FileTeacher) and (model := load_teacher_file(study, start)[1].model) != spec.model:
        raise InputError(
            f"teachers.{teacher}.start: {spec.start} is a {model}, and a {spec.model} was to go on from it"
        )
    other = None if spec.teacher is None else _untrained(study, spec.teacher)
    title = "" if spec.teacher is None else _title(study, spec.teacher)
    made = assemble(study, spec, role="teacher", seed=0, teacher=other, teacher_name=title)
    made.start_training()
    _check_training(study, Job("teacher", teacher, study.config.seeds[0]), spec, made.classifier)
    return made.classifier


def _check_training(study: Study, job: Job, spec: TrainedTeacher | Student, classifier: Classifier) -> None:
    """Find what would fail in the last batch of an epoch, or only after the last epoch."""
    _check_last_batch(study, spec, classifier, examples=len(rows_of(study, job)[0]))
    if study.config.training_of(spec).calibrate:
        try:
            nn.init.normal_(
                Parts(classifier).classifier.weight
            )  # a head that begins with zeros would hide what follows
            divide_logits(classifier, 2.0, examples_of(study, classifier))
        except InputError as error:
            raise InputError(f"{job.role}s.{job.arm}: calibrate: {error}") from None


@torch.no_grad()
def _check_last_batch(study: Study, spec: TrainedTeacher | Student, classifier: Classifier, *, examples: int) -> None:
    """Make sure that a network can be trained on the last batch of an epoch where that is a single example."""
    size = study.config.training_of(spec).batch_size
    if examples % size != 1 and size != 1:
        return
    data = study.data
    try:
        classifier.train()(torch.full((1, data.in_channels, data.image_size, data.image_size), 0.5))
    except ValueError as error:
        raise InputError(
            f"{spec.model} cannot be trained on a batch of one example, and {examples} examples in batches of {size} "
            f"leave one: choose another batch_size ({error})"
        ) from error


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
