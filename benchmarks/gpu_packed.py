"""Trainings in processes of their own on one device: how fast one is, and how fast several are at once.

``python -m benchmarks.gpu_packed`` reads an order (see :func:`order`) from standard input, sets the training up and
says ``ready``; then it reads numbers of seconds, trains for each so long, and says how many steps that were.
"""

from __future__ import annotations

import json
import os
import queue
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory, TemporaryFile
from types import TracebackType
from typing import Any

import torch

from benchmarks.gpu_steps import Training, own_training, random_data, synchronise
from soteacher.config import StudyConfig
from soteacher.data import load_data
from soteacher.errors import InputError
from soteacher.jobs import Study, evaluation_batches
from soteacher.train.checkpoint import Checkpoint, Position
from soteacher.train.evaluate import evaluate

WARM_UP = 4
"""Steps before a training is ready: compiled code is made, tried and recorded in the first three."""
ROOT = Path(__file__).parents[1]


def order(
    study: Mapping[str, Any], role: str, name: str, *, device: str, threads: int,
    data_root: Path | None = None, random_images: tuple[int, int] | None = None, twice: bool = False,
) -> dict[str, Any]:  # fmt: skip
    """Return what a process is told to train.

    Args:
        study: the study's settings.
        role: ``teacher`` or ``student``.
        name: of the teacher or student in the study.
        device: ``cpu`` or ``cuda``.
        threads: of arithmetic.
        data_root: where data sets lie.
        random_images: numbers of training and test images that take the place of the study's data.
        twice: set the training up a second time, and say how long that takes: a process trains many networks, and only
            the first waits for what is loaded and compiled.
    """
    return {
        "study": dict(study), "role": role, "name": name, "device": device, "threads": threads,
        "data_root": None if data_root is None else str(data_root), "random_images": random_images,
        "twice": twice,
    }  # fmt: skip


class Packed:
    """Processes that stand ready to train, each one training; they end with the ``with`` block.

    Args:
        orders: what each is told; see :func:`order`.
    """

    def __init__(self, orders: Sequence[Mapping[str, Any]]) -> None:
        self._errors = [TemporaryFile("w+", encoding="utf-8") for _ in orders]  # noqa: SIM115 closed with the processes
        self._answers: list[queue.Queue[tuple[float, str]]] = [queue.Queue() for _ in orders]
        self._begun = time.monotonic()
        self._processes = [_start(told, errors) for told, errors in zip(orders, self._errors, strict=True)]
        for process, answers in zip(self._processes, self._answers, strict=True):
            threading.Thread(target=_listen, args=(process, answers), daemon=True).start()

    def __enter__(self) -> Packed:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for process in self._processes:
            with suppress(BrokenPipeError, ValueError):
                if process.stdin is not None:
                    process.stdin.close()
            if kind is not None:
                process.kill()
        for process in self._processes:
            process.wait()
        for file in self._errors:
            file.close()

    def ready(self, timeout: float) -> list[dict[str, Any]]:
        """Wait until all stand ready; return of each its :func:`costs` and how long getting ready took.

        ``start_seconds`` are all of it, and ``setup_seconds`` those of the training alone.

        Raises:
            InputError: one has ended, or not all are ready in time; the others are not waited for.
        """
        deadline = time.monotonic() + timeout
        answers = [self._answer(number, deadline - time.monotonic()) for number in range(len(self._processes))]
        return [{"start_seconds": arrived - self._begun, **answer} for arrived, answer in answers]

    def run(self, numbers: Sequence[int], seconds: float) -> list[dict[str, Any]]:
        """Let some of them train at the same time, and return the ``images`` and ``seconds`` of each.

        Raises:
            InputError: one has ended.
        """
        for number in numbers:
            stdin = self._processes[number].stdin
            assert stdin is not None
            with suppress(BrokenPipeError):  # it has ended: the answer that does not come says so
                stdin.write(f"{seconds}\n")
                stdin.flush()
        return [self._answer(number, 60 + 10 * seconds)[1] for number in numbers]

    def _answer(self, number: int, timeout: float) -> tuple[float, dict[str, Any]]:
        """Return when a process has answered, and what."""
        try:
            arrived, line = self._answers[number].get(timeout=max(timeout, 0.0))
        except queue.Empty:
            raise InputError(f"a measuring process did not answer within {max(timeout, 0.0):.0f} s") from None
        if not line:
            status = self._processes[number].wait()
            self._errors[number].seek(0)
            last = self._errors[number].read().strip().splitlines()[-1:] or ["it said nothing"]
            raise InputError(f"a measuring process ended with status {status}: {last[0]}")
        return arrived, json.loads(line)


def _start(told: Mapping[str, Any], errors: Any) -> subprocess.Popen[str]:
    environment = dict(os.environ) | {"OMP_NUM_THREADS": str(told["threads"])}
    process = subprocess.Popen(
        [sys.executable, "-m", "benchmarks.gpu_packed"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors,
        text=True, cwd=ROOT, env=environment,
    )  # fmt: skip
    assert process.stdin is not None
    process.stdin.write(json.dumps(told) + "\n")
    process.stdin.flush()
    return process


def _listen(process: subprocess.Popen[str], answers: queue.Queue[tuple[float, str]]) -> None:
    assert process.stdout is not None
    with process.stdout as lines:
        for line in lines:
            answers.put((time.monotonic(), line))
    answers.put((time.monotonic(), ""))


def main() -> None:
    """Set a training up as ordered, and train as long as told, until standard input ends."""
    out = os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # whatever a library prints must not mix with the answers

    def answer(figures: Mapping[str, Any]) -> None:
        out.write(json.dumps(figures) + "\n")
        out.flush()

    told = json.loads(sys.stdin.readline())
    torch.set_num_threads(told["threads"])
    study = _study(told)
    training, seconds = _ready(study, told)
    if told["twice"]:
        training, seconds = _ready(study, told)
    answer({"setup_seconds": seconds, **costs(training)})
    for line in sys.stdin:
        answer(_train(training, told["device"], float(line)))


def _study(told: Mapping[str, Any]) -> Study:
    config = StudyConfig.model_validate(told["study"])
    root = None if told["data_root"] is None else Path(told["data_root"])
    data = random_data(*told["random_images"]) if told["random_images"] else load_data(config.data, root)
    return Study(config, Path(), data, told["device"])


def _ready(study: Study, told: Mapping[str, Any]) -> tuple[Training, float]:
    """Set the training up and warm it up; return it and the seconds that this took."""
    start = time.perf_counter()
    training = own_training(study, told["role"], told["name"])
    for _ in range(WARM_UP):
        training.step()
    synchronise(study.device)
    return training, time.perf_counter() - start


def costs(training: Training) -> dict[str, Any]:
    """Return what a training needs beside its steps, and its size.

    Returns:
        ``evaluation_seconds`` of the test images, ``saving_seconds`` of the state, ``epoch_start_seconds`` until the
        first batch of an epoch is there, ``steps_per_epoch``, ``parameters``, ``num_examples`` and ``num_classes``.
    """
    study = training.study
    batches = evaluation_batches(study.data.test, study.device)
    evaluations = [_seconds_of(lambda: evaluate(training.classifier, batches), study.device) for _ in range(2)]
    with TemporaryDirectory() as folder:
        checkpoint, state = Checkpoint(Path(folder), ""), training.trainee.state()
        savings = [_seconds_of(lambda: checkpoint.save(Position(), **state), study.device) for _ in range(2)]
    starts = [_seconds_of(partial(next, training.loader.epoch(epoch)), study.device) for epoch in (0, 1)]
    return {
        "evaluation_seconds": evaluations[-1], "saving_seconds": savings[-1], "epoch_start_seconds": starts[-1],
        "steps_per_epoch": training.loader.steps_per_epoch,
        "parameters": sum(parameter.numel() for parameter in training.classifier.parameters()),
        "num_examples": study.data.train.num_examples, "num_classes": study.data.num_classes,
    }  # fmt: skip


def _seconds_of(call: Callable[[], object], device: str) -> float:
    synchronise(device)
    start = time.perf_counter()
    call()
    synchronise(device)
    return time.perf_counter() - start


def _train(training: Training, device: str, seconds: float) -> dict[str, float]:
    """Take steps for so many seconds and return how many images and seconds they were."""
    steps, start = 0, time.perf_counter()
    while time.perf_counter() - start < seconds:
        training.step()
        steps += 1
    synchronise(device)
    batch_size = training.study.config.training.batch_size
    return {"images": steps * batch_size, "steps": steps, "seconds": time.perf_counter() - start}


if __name__ == "__main__":
    main()
