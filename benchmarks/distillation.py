"""How fast is distillation? Times a frozen teacher alone, and whole steps with their input, beside the field's way.

All variants of a measurement train or answer side by side in one process, in turn, and ours again in a second one that
keeps the pages which a step frees, as the processes of a study do. Kept answers are read from a store that another
student of the same seed has filled before.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import timing
from benchmarks.apart import KEPT, Apart
from benchmarks.field import FieldStudent, field_loader
from benchmarks.field_losses import kd
from benchmarks.ours import assembled, batches, data_of, frozen_teacher, steps, study_of
from soteacher.data import DataSet
from soteacher.errors import InputError
from soteacher.jobs import Job, Study
from soteacher.models.classifier import Classifier
from soteacher.models.taps import Tapped
from soteacher.networks import make_trainee
from soteacher.train.acceleration import Compiled
from soteacher.train.loop import Trainee

PAIRS = ("wrn_40_2:wrn_16_2", "resnet20:resnet8")
TEACHERS = ("wrn_40_2", "resnet56")
FIELD = "field"
FORWARD_WAYS: dict[str, dict[str, bool]] = {
    FIELD: {"channels_last": False, "compiled": False},
    "channels last": {"channels_last": True, "compiled": False},
    "compiled": {"channels_last": False, "compiled": True},
    "channels last, compiled": {"channels_last": True, "compiled": True},
}
"""How a frozen teacher is run; ``compiled`` means that its weights are constants. All normalise the images, which is a
part of the field's input and not of its network, but takes next to no time."""
STEP_WAYS: dict[str, dict[str, Any]] = {
    "live": {"channels_last": False, "compile": False},
    "live, channels last": {"channels_last": True, "compile": False},
    "live, channels last, compiled": {"channels_last": True, "compile": True},
    "kept answers, channels last": {"channels_last": True, "compile": False},
    "kept answers, channels last, compiled": {"channels_last": True, "compile": True},
}
"""Training settings of our students; the field's stand beside them, as :func:`field_name` calls them."""
ANSWERS = "kept answers"
FIELD_WORKERS = (0, 2)
"""Processes that make the field's input."""
WEIGHT, TEMPERATURE = 0.5, 4.0
"""Of both terms of ``kd``, and of its softening, as the study has them."""


def main() -> None:
    """Measure, print tables and write the numbers to a JSON file if one is named."""
    given = _arguments()
    peak = timing.matrix_peak()
    data = data_of(given.data_root)
    size, rounds, speed = given.batch_size, given.rounds, peak["operations_per_second"]
    forward_ways, step_ways = FORWARD_WAYS, STEP_WAYS
    if given.uncompiled:
        forward_ways = {name: way for name, way in FORWARD_WAYS.items() if not way["compiled"]}
        step_ways = {name: way for name, way in STEP_WAYS.items() if not way["compile"]}
    teachers: dict[str, Any] = {}
    for model in given.teachers:
        teachers[model] = measure_forward(model, forward_ways, batch_size=size, rounds=rounds, peak=speed)
        _show(f"frozen {model}, batch {size}, {given.threads} threads", teachers[model], peak)
    pairs: dict[str, Any] = {}
    for pair in given.pairs:
        pairs[pair] = measure_steps(
            pair, data, step_ways, batch_size=size, rounds=rounds, steps_a_round=given.steps, peak=speed,
            with_kept_pages=list(step_ways),
        )  # fmt: skip
        _show(f"kd {pair}, batch {size}, {given.threads} threads, input included", pairs[pair], peak)
    settings = {"data": data.name, "batch_size": size, "rounds": rounds, "steps_a_round": given.steps}
    results = {"matrix_peak": peak, "teacher_forward": teachers, "distillation": pairs}
    timing.record(given.json, settings=settings, results=results, threads=given.threads)


def measure_forward(
    model: str, ways: Mapping[str, Mapping[str, bool]], *, batch_size: int, rounds: int, peak: float
) -> dict[str, Any]:
    """Return the figures of a frozen teacher's answers to a batch, by way.

    Args:
        model: name of the network.
        ways: those of :data:`FORWARD_WAYS`, of which ``field`` is one.
        batch_size: images of a batch.
        rounds: counted calls of each way.
        peak: operations a second that this machine reaches at most.

    Raises:
        InputError: two ways do not give the same answers.
    """
    study = study_of(data_of(examples=batch_size), teachers={"teacher": {"model": model}})
    images = torch.rand(batch_size, 3, 32, 32)
    calls = {name: _answering(study, images, **way) for name, way in ways.items()}
    _check_equal({name: call() for name, call in calls.items()})
    operations = _operations(calls[FIELD])
    return _figures(timing.alternate(calls, rounds=rounds), [FIELD], dict.fromkeys(calls, operations), batch_size, peak)


def _answering(study: Study, images: Tensor, *, channels_last: bool, compiled: bool) -> Callable[[], Tensor]:
    teacher = frozen_teacher(study)
    layout = torch.channels_last if channels_last else torch.contiguous_format
    teacher.to(memory_format=layout)  # pyright: ignore[reportCallIssue] an overload torch lacks
    own: nn.Module = Tapped(teacher, {})
    if compiled:
        own = Compiled(own, batch_size=len(images), frozen=True, required=True)
    own.eval()
    taken = images.contiguous(memory_format=layout)

    @torch.no_grad()
    def answer() -> Tensor:
        return own(taken)[0]

    return answer


def _check_equal(answers: Mapping[str, Tensor]) -> None:
    """Refuse to compare what does not compute the same."""
    for name, logits in answers.items():
        distance = (logits - answers[FIELD]).abs().max().item()
        if distance > 1e-3 * answers[FIELD].abs().max().item():
            raise InputError(f"{name}: the answers are {distance:.2g} away from the field's; wanted the same")


def measure_steps(
    pair: str,
    data: DataSet,
    ways: Mapping[str, Mapping[str, Any]],
    *,
    batch_size: int,
    rounds: int,
    steps_a_round: int,
    peak: float,
    field_workers: Sequence[int] = FIELD_WORKERS,
    with_kept_pages: Sequence[str] = (),
) -> dict[str, Any]:
    """Return the figures of a student's whole steps, by way; the field's are among them.

    Args:
        pair: ``TEACHER:STUDENT``, names of networks.
        data: whose training images are distilled on.
        ways: of :data:`STEP_WAYS`.
        batch_size: images of a batch.
        rounds: counted calls of each way.
        steps_a_round: in a call.
        peak: operations a second that this machine reaches at most.
        field_workers: numbers of processes for the field's input; each is a way.
        with_kept_pages: ways that are measured in a process that keeps freed pages as well.

    Raises:
        InputError: ``pair`` is none.
    """
    teacher, colon, student = pair.partition(":")
    if not colon:
        raise InputError(f"a pair is written TEACHER:STUDENT, got {pair!r}")
    taken = (timing.WARM_UP + rounds) * steps_a_round
    with TemporaryDirectory() as folder, ExitStack() as open_ones:
        settings = _settings(teacher, student, batch_size, Path(folder))
        plain = study_of(data, **settings)
        alone, beside = _step_operations(plain, batch_size)
        calls = {
            field_name(workers): _repeated(_field_steps(plain, batch_size, workers), steps_a_round)
            for workers in field_workers
        }
        calls |= _our_calls(data, settings, ways, taken, steps_a_round)
        if with_kept_pages:
            again = {name: ways[name] for name in with_kept_pages}
            process = open_ones.enter_context(Apart(_our_calls, data, settings, again, taken, steps_a_round))
            calls |= {name + KEPT: call for name, call in process.calls().items()}
        seconds = timing.alternate(calls, rounds=rounds)
    of_steps = {name: [time / steps_a_round for time in times] for name, times in seconds.items()}
    operations = {name: alone if name.startswith(ANSWERS) else beside for name in calls}
    return _figures(of_steps, [field_name(workers) for workers in field_workers], operations, batch_size, peak)


def _our_calls(
    data: DataSet, settings: Mapping[str, Any], ways: Mapping[str, Mapping[str, Any]], taken: int, steps_a_round: int
) -> dict[str, Callable[[], object]]:
    """Return functions that take our next steps, by way, where none takes more than ``taken``."""
    calls: dict[str, Callable[[], object]] = {}
    for name, way in ways.items():
        study = study_of(data, **{**settings, "training": {**settings["training"], **way}})
        trainee = _trainee(study if name.startswith(ANSWERS) else _without_cache(study))
        if name.startswith(ANSWERS):
            _fill(trainee, islice(batches(study), taken))
        calls[name] = _repeated(steps(trainee, batches(study)), steps_a_round)
    return calls


def field_name(workers: int) -> str:
    """Return how the field's way with so many processes for its input is called."""
    return f"{FIELD}, {workers} workers"


def _settings(teacher: str, student: str, batch_size: int, folder: Path) -> dict[str, Any]:
    return {
        "teachers": {"teacher": {"model": teacher}},
        "students": {"kd": {"model": student, "method": "kd"}},
        "training": {"batch_size": batch_size, "epochs": 2, "channels_last": False, "compile": False},
        "teacher_cache": {"folder": str(folder)},
    }


def _without_cache(study: Study) -> Study:
    return Study(study.config.model_copy(update={"teacher_cache": None}), study.folder, study.data, study.device)


def _trainee(study: Study) -> Trainee:
    """Return the student in training under the name that the study gives it, by which its answers are found."""
    made = assembled(study, "student", "kd")
    training = study.config.training_of(study.config.students["kd"])
    job = Job("student", next(study.config.arms()).name, 0)
    trainee = make_trainee(study, job, made, [frozen_teacher(study)], training, "training")
    trainee.forward.train()
    return trainee


def _fill(trainee: Trainee, source: Iterator[Any]) -> None:
    """Ask the teacher all that a training will ask it, as another student would have."""
    assert trainee.teacher is not None
    for batch in source:
        trainee.teacher.at(0.0)(batch)


def _field_steps(study: Study, batch_size: int, workers: int) -> Callable[[], object]:
    """Return a function that takes the field's next step, its input included."""
    data = study.data
    student = FieldStudent(
        assembled(study, "student", "kd").classifier.network, frozen_teacher(study).network,
        lambda own, teacher, labels, indices: kd(own.logits, teacher.logits, temperature=TEMPERATURE),  # noqa: ARG005
        label_weight=WEIGHT, distillation_weight=WEIGHT,
    )  # fmt: skip
    loader = field_loader(data.train, data.mean, data.std, batch_size=batch_size, workers=workers, seed=0)
    source = _endless(loader)
    return lambda: student.step(*next(source))


def _endless(loader: DataLoader[Any]) -> Iterator[Any]:
    while True:
        yield from loader


def _repeated(call: Callable[[], object], times: int) -> Callable[[], None]:
    def run() -> None:
        for _ in range(times):
            call()

    return run


def _step_operations(study: Study, batch_size: int) -> tuple[int, int]:
    """Return the operations of a student's step: of its own, and with those of its teacher."""
    student, teacher = assembled(study, "student", "kd").classifier, frozen_teacher(study)
    images = torch.rand(batch_size, 3, 32, 32)
    alone = _operations(lambda: student.train()(images).sum().backward())
    return alone, alone + _operations(torch.no_grad()(lambda: _answer(teacher, images)))


def _answer(teacher: Classifier, images: Tensor) -> Tensor:
    return teacher(images)


def _operations(call: Callable[[], object]) -> int:
    """Return the operations of convolutions and matrix products; a multiplication and an addition are two."""
    with FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops()


def _figures(
    seconds: Mapping[str, Sequence[float]],
    field: Sequence[str],
    operations: Mapping[str, int],
    batch_size: int,
    peak: float,
) -> dict[str, Any]:
    """Return what is known of each way; the field's is that of its ways which is the fastest here."""
    best = min(field, key=lambda name: statistics.median(seconds[name]))
    ways = {
        name: {
            "milliseconds": 1000 * statistics.median(times),
            "images_per_second": batch_size / statistics.median(times),
            "share_of_matrix_peak": operations[name] / statistics.median(times) / peak,
            "times_as_fast_as_field": timing.ratio(seconds, best, name),
        }
        for name, times in seconds.items()
    }
    return {"fastest_of_the_field": best, "operations": dict(operations), "ways": ways}


def _show(title: str, found: Mapping[str, Any], peak: Mapping[str, Any]) -> None:
    timing.table(
        title,
        ("way", "ms", "images / s", "share of the peak", "times as fast as the field"),
        [
            (
                name, f"{row['milliseconds']:.1f}", f"{row['images_per_second']:,.0f}",
                f"{row['share_of_matrix_peak']:.0%}", timing.spread(row["times_as_fast_as_field"]),
            )
            for name, row in found["ways"].items()
        ],
        caption=f"medians (quartiles); the peak is {peak['operations_per_second'] / 1e9:.0f} billion operations a "
        f"second, by a {peak['reached_by']}",
    )  # fmt: skip


def _arguments() -> argparse.Namespace:
    parser = timing.arguments(__doc__, rounds=20)
    parser.add_argument("--teachers", nargs="*", default=TEACHERS, help="networks that answer alone")
    parser.add_argument("--pairs", nargs="*", default=PAIRS, help="TEACHER:STUDENT, networks that distil")
    parser.add_argument("--steps", type=int, default=5, help="steps in a call")
    parser.add_argument("--uncompiled", action="store_true", help="leave the compiled ways out: they take minutes")
    parser.add_argument("--data-root", type=Path, help="folder of CIFAR-100; random images where it is left out")
    return timing.checked(parser)


if __name__ == "__main__":
    timing.run(main)
