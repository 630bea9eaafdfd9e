"""One network of a study: put together from its settings, trained by the loop, evaluated and saved.

:func:`train_network` is the way through; the rest are its parts.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Mapping
from dataclasses import asdict
from hashlib import blake2b
from pathlib import Path
from typing import Any

import torch
from torch import nn

from soteacher.assembly import Assembled, assemble
from soteacher.config import FileTeacher, SavedTeacher, Student, StudyConfig, TrainedTeacher
from soteacher.data import TrainLoader
from soteacher.environment import PeakMemory, environment
from soteacher.errors import InputError
from soteacher.files import read_json, write_tensors, write_text
from soteacher.jobs import (
    Job,
    OnEvent,
    Study,
    evaluation_batches,
    jobs_of,
    load_finished,
    load_teacher_file,
    restored,
    spec_of,
    weights_checksum,
)
from soteacher.models.classifier import Classifier, NetworkSpec
from soteacher.models.parts import Parts
from soteacher.models.taps import Tapped, resolve_taps
from soteacher.models.weights import save_classifier
from soteacher.objective import Stage
from soteacher.randomness import derive_seed
from soteacher.train.checkpoint import Checkpoint
from soteacher.train.config import TrainingConfig, epochs_at
from soteacher.train.evaluate import Evaluation, evaluate
from soteacher.train.logs import open_loggers
from soteacher.train.loop import StepReport, Trainee, fabric_for, fit
from soteacher.train.optimizer import backward_for, build_optimizer
from soteacher.train.teacher_signal import LiveTeacher

NO_COSTS: dict[str, Any] = dict.fromkeys(
    ("preparation_seconds", "seconds_per_step", "extra_parameters", "peak_memory_bytes")
)
"""Of a network that was not trained here."""


def train_network(study: Study, job: Job, *, on_event: OnEvent, should_stop: Callable[[], bool]) -> None:
    """Train one network of a study, from its start or from its last state, and save it."""
    spec = spec_of(study.config, job)
    if isinstance(spec, SavedTeacher):
        _take_saved(study, job, spec)
    elif isinstance(spec, FileTeacher):
        _take_file(study, job, spec)
    else:
        _train(study, job, spec, on_event=on_event, should_stop=should_stop)
    on_event(job, {"event": "finished", "row": read_json(study.folder_of(job) / "model.json")["row"]})


def _teacher_job(study: Study, job: Job) -> Job | None:
    return jobs_of(study.config)[job] if job.role == "student" else None


def _train(
    study: Study,
    job: Job,
    spec: TrainedTeacher | Student,
    *,
    on_event: OnEvent,
    should_stop: Callable[[], bool],
) -> None:
    """Put a network, its loss, its data and its teacher together, run the loop, save what comes out."""
    training, (teacher, title) = study.config.training_of(spec), _teacher(study, job)
    made = assemble(study, spec, role=job.role, seed=job.seed, teacher=teacher, teacher_name=title)
    fingerprint = _fingerprint(study, job, made, spec)
    resume = study.folder_of(job) / "resume"
    preparation = Checkpoint(resume / "preparation", fingerprint)
    checkpoint = Checkpoint(resume, fingerprint)
    memory = PeakMemory(study.device)
    before = _prepare(
        study, job, made, teacher, training, preparation, on_event=on_event, should_stop=should_stop
    )  # fmt: skip
    made.start_training()
    trainee = make_trainee(study, job, made, teacher, training, "training")
    batches = _batches(study, job, made, training, "training")
    history = _fit(
        study, job, trainee, batches, made.classifier, checkpoint, on_event=on_event, should_stop=should_stop
    )
    facts = {
        "method": spec.method,
        "terms": {name: config.model_dump(mode="json") for name, config in made.configs.items()},
        "training": training.model_dump(mode="json"),
        "fingerprint": fingerprint,
    }
    costs = {
        "preparation_seconds": sum(line["seconds"] for line in before),
        "seconds_per_step": sum(line["seconds"] for line in history) / (len(history) * batches.steps_per_epoch),
        "extra_parameters": made.extra_parameters(),
        "peak_memory_bytes": memory.bytes(),
    }
    _finish(study, job, made.classifier, made.network, history, facts, costs)
    preparation.remove()
    checkpoint.remove()


def _prepare(
    study: Study,
    job: Job,
    made: Assembled,
    teacher: Classifier | None,
    training: TrainingConfig,
    checkpoint: Checkpoint,
    *,
    on_event: OnEvent,
    should_stop: Callable[[], bool],
) -> list[dict[str, Any]]:
    """Run the stage before the training, if there is one, or take up what it has left; return its epochs' figures.

    A state that is finished stays until the network is: a resumed training begins from it again.
    """
    if not made.stage("preparation"):
        return []
    own = training.preparation()
    first = {name: tensor.clone() for name, tensor in made.classifier.state_dict().items()}
    trainee = make_trainee(study, job, made, teacher, own, "preparation")

    def on_epoch(line: dict[str, Any]) -> None:
        on_event(job, {"event": "epoch", "stage": "preparation", "epochs": own.epochs, **line})

    def on_step(report: StepReport) -> None:
        on_event(job, {"event": "step", "stage": "preparation", "epochs": own.epochs, **asdict(report)})

    history = fit(
        trainee, _batches(study, job, made, own, "preparation"), measure=dict[str, float],
        checkpoint=checkpoint, on_epoch=on_epoch, on_step=on_step, should_stop=should_stop,
    )  # fmt: skip
    _write_lines(study.folder_of(job) / "preparation.jsonl", history)
    if not any(term.objective.trains_network for term in trainee.terms):
        made.classifier.load_state_dict(first)  # batch normalisation has seen the batches; nothing else has changed
    return history


def _batches(study: Study, job: Job, made: Assembled, training: TrainingConfig, stage: Stage) -> TrainLoader:
    """Return the training set of one stage of a network."""
    purpose = "data" if stage == "training" else "preparation data"
    return TrainLoader(
        study.data.train, batch_size=training.batch_size, augment=study.config.data.augment,
        seed=derive_seed(job.seed, job.role, purpose), device=study.device, workers=torch.get_num_threads(),
        views=made.views(stage),
    )  # fmt: skip


def _teacher(study: Study, job: Job) -> tuple[Classifier | None, str]:
    """Return a student's trained teacher, frozen, and how messages call it; none for a network without a teacher."""
    teacher = _teacher_job(study, job)
    if teacher is None:
        return None, ""
    classifier, network = load_finished(study, teacher)
    return classifier.requires_grad_(False).eval(), f"teacher {network.model}"


def make_trainee(
    study: Study, job: Job, made: Assembled, teacher: Classifier | None, training: TrainingConfig, stage: Stage
) -> Trainee:
    """Set a network up for its device and precision, with one stage's objectives, its optimiser and its teacher."""
    fabric, terms, classifier = fabric_for(study.device, training.precision), made.stage(stage), made.classifier
    objectives = nn.ModuleList(term.objective for term in terms).to(fabric.device)
    forward = _callable(classifier, {name for term in terms for name in term.objective.features}, training)
    optimizer: Any = build_optimizer(training.optimizer, [*classifier.parameters(), *objectives.parameters()])
    called, optimizer = fabric.setup(forward, optimizer)
    signal = None
    if teacher is not None and made.reads_teacher(stage):
        taps = {name for term in terms for name in term.objective.teacher_features}
        signal = LiveTeacher(fabric.setup_module(_callable(teacher, taps, training).eval()), Parts(teacher))
    return Trainee(
        network=classifier.network, forward=called, parts=Parts(classifier), terms=terms, optimizer=optimizer,
        backward=backward_for(training.optimizer), teacher=signal, fabric=fabric, config=training,
        seed=derive_seed(job.seed, job.role, stage),
    )  # fmt: skip


def _callable(classifier: Classifier, features: Collection[str], training: TrainingConfig) -> nn.Module:
    """Return a classifier as the loop calls it: it gives logits and features, and may be compiled."""
    if training.channels_last:
        classifier.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue] an overload torch lacks
    tapped = Tapped(classifier, resolve_taps(classifier, sorted(features)))
    compiled: Any = torch.compile(tapped) if training.compile else tapped
    return compiled


def _fit(
    study: Study,
    job: Job,
    trainee: Trainee,
    batches: TrainLoader,
    classifier: Classifier,
    checkpoint: Checkpoint,
    *,
    on_event: OnEvent,
    should_stop: Callable[[], bool],
) -> list[dict[str, Any]]:
    """Run the loop for one network, keeping its curves, its wanted epochs and its progress."""
    folder, epochs = study.folder_of(job), trainee.config.epochs
    wanted = _wanted_epochs(study.config, job, trainee.config)
    lines = checkpoint.history()  # not those of metrics.jsonl: a kill may have come between the two
    name = f"{study.config.name}/{study.folder.name}/{job.role}s/{job.arm}/seed{job.seed}"
    loggers = open_loggers(study.config.logging, folder, name, start_epoch=len(lines))
    test = evaluation_batches(study.data.test, trainee.fabric.device)

    def measure() -> dict[str, float]:
        result = evaluate(classifier, test)
        return {"test_accuracy": result.accuracy, "test_nll": result.nll, "test_ece": result.ece}

    def on_epoch(line: dict[str, Any]) -> None:
        lines.append(line)
        _write_lines(folder / "metrics.jsonl", lines)
        if len(lines) in wanted:
            write_tensors(_epoch_weights(folder, len(lines)), trainee.network.state_dict())
        for logger in loggers:
            logger.log(_figures(line), epoch=line["epoch"])
        on_event(job, {"event": "epoch", "epochs": epochs, **line})

    def on_step(report: StepReport) -> None:
        on_event(job, {"event": "step", "epochs": epochs, **asdict(report)})

    try:
        return fit(
            trainee, batches, measure=measure, checkpoint=checkpoint, on_epoch=on_epoch, on_step=on_step,
            should_stop=should_stop,
        )  # fmt: skip
    finally:
        for logger in loggers:
            logger.close()


def _finish(
    study: Study,
    job: Job,
    classifier: Classifier,
    network: NetworkSpec,
    history: list[dict[str, Any]],
    facts: Mapping[str, Any],
    costs: Mapping[str, Any] | None = None,
) -> None:
    """Evaluate a trained network once more and write it with its row of the results."""
    classifier.to(study.device)
    splits = {"test": study.data.test, "train": study.data.train}
    figures = {name: evaluate(classifier, evaluation_batches(split, study.device)) for name, split in splits.items()}
    row = _row(study, job, network, history, figures, method=facts["method"], parameters=_count(classifier))
    row |= costs or NO_COSTS
    everything = {
        "role": job.role, "arm": job.arm, "seed": job.seed, "row": row, **facts,
        "data": study.config.data.model_dump(mode="json"),
        "environment": environment(study.device, torch.get_num_threads()),
        "reliability": {split: figure.reliability for split, figure in figures.items()},
    }  # fmt: skip
    save_classifier(study.folder_of(job), classifier, network, everything)


def _row(
    study: Study,
    job: Job,
    network: NetworkSpec,
    history: list[dict[str, Any]],
    figures: Mapping[str, Evaluation],
    *,
    method: str,
    parameters: int,
) -> dict[str, Any]:
    """Return the line of ``results.json`` for a network. The last epoch is the headline; the best selects nothing."""
    teacher = _teacher_job(study, job)
    accuracies = [line["test_accuracy"] for line in history] or [figures["test"].accuracy]
    seconds = sum(line["seconds"] for line in history)
    images = sum(line["images_per_second"] * line["seconds"] for line in history)
    return {
        "role": job.role,
        "arm": job.arm,
        "teacher_arm": teacher.arm if teacher else None,
        "method": method,
        "model": network.model,
        "data": study.data.name,
        "seed": job.seed,
        "epochs": len(history),
        "accuracy_last": figures["test"].accuracy,
        "accuracy_best": max(accuracies),
        "accuracy_mean_last_10": sum(accuracies[-10:]) / len(accuracies[-10:]),
        "train_accuracy": figures["train"].accuracy,
        "nll": figures["test"].nll,
        "ece": figures["test"].ece,
        "train_seconds": seconds,
        "images_per_second": images / seconds if seconds else None,
        "parameters": parameters,
    }


def _take_saved(study: Study, job: Job, spec: SavedTeacher) -> None:
    """Make a teacher of an earlier state of another one."""
    source, epochs, path = _saved(study, job, spec)
    folder = study.folder_of(source)
    facts = read_json(folder / "model.json")
    history = _read_lines(folder / "metrics.jsonl")[:epochs]
    network = NetworkSpec(**facts["network"])
    classifier = restored(study, network, path)
    _write_lines(study.folder_of(job) / "metrics.jsonl", history)
    kept_facts = {key: facts[key] for key in ("method", "terms", "training")}
    fingerprint = f"{facts['fingerprint']}-after-{epochs}"
    _finish(study, job, classifier, network, history, {**kept_facts, "fingerprint": fingerprint})


def _saved(study: Study, job: Job, spec: SavedTeacher) -> tuple[Job, int, Path]:
    """Return the teacher that a saved one is a state of, after how many epochs, and where its weights of then lie."""
    source, trained = Job("teacher", spec.teacher, job.seed), study.config.teachers[spec.teacher]
    assert isinstance(trained, TrainedTeacher)
    total = study.config.training_of(trained).epochs
    epochs, folder = epochs_at(spec.after, total), study.folder_of(source)
    return source, epochs, folder / "model.safetensors" if epochs == total else _epoch_weights(folder, epochs)


def check_saved(study: Study) -> None:
    """Make sure that the earlier states that teachers are made of were or will be kept.

    Raises:
        InputError: a teacher is finished, and its weights of that time were not kept.
    """
    for job in jobs_of(study.config):
        spec = spec_of(study.config, job)
        if not isinstance(spec, SavedTeacher) or study.finished(job):
            continue
        source, epochs, path = _saved(study, job, spec)
        if study.finished(source) and not path.exists():
            others = study.folder_of(source).glob("epochs/after-*.safetensors")
            kept = sorted(int(other.stem.removeprefix("after-")) for other in others)
            raise InputError(
                f"{job.name}: the weights of {source.name} after {epochs} epochs were not kept; kept: "
                f"{kept or 'none'}; set save_every in its training and train it anew"
            )


def _take_file(study: Study, job: Job, spec: FileTeacher) -> None:
    """Make a teacher of a file."""
    classifier, network = load_teacher_file(study, spec)
    _write_lines(study.folder_of(job) / "metrics.jsonl", [])
    facts = {"method": "file", "fingerprint": weights_checksum(classifier.network)}
    _finish(study, job, classifier, network, [], facts)


def _fingerprint(study: Study, job: Job, made: Assembled, spec: TrainedTeacher | Student) -> str:
    """Return the checksum of everything that decides a network's numbers."""
    teacher = _teacher_job(study, job)
    facts = {
        "data": study.data.checksum, "augment": study.config.data.augment.model_dump(mode="json"),
        "seed": job.seed, "role": job.role,
        "network": made.network.model_dump(mode="json"), "start": weights_checksum(made.classifier.network),
        "training": study.config.training_of(spec).model_dump(mode="json"),
        "terms": {name: config.model_dump(mode="json") for name, config in made.configs.items()},
        "teacher": read_json(study.folder_of(teacher) / "model.json")["fingerprint"] if teacher else None,
    }  # fmt: skip
    return blake2b(json.dumps(facts, sort_keys=True).encode(), digest_size=16).hexdigest()


def _wanted_epochs(config: StudyConfig, job: Job, training: TrainingConfig) -> set[int]:
    """Return the numbers of finished epochs whose weights are kept beside those of the end."""
    every = training.save_every
    wanted = set(range(every, training.epochs, every)) if every else set[int]()
    for other in config.teachers.values() if job.role == "teacher" else ():
        if isinstance(other, SavedTeacher) and other.teacher == job.arm:
            wanted.add(epochs_at(other.after, training.epochs))
    return wanted - {training.epochs}


def _epoch_weights(folder: Path, finished: int) -> Path:
    """Return where a network's weights after so many finished epochs are kept."""
    return folder / "epochs" / f"after-{finished}.safetensors"


def _count(classifier: nn.Module) -> int:
    return sum(parameter.numel() for parameter in classifier.parameters())


def _figures(line: Mapping[str, Any]) -> dict[str, float]:
    losses = {f"losses/{name}": value for name, value in line["losses"].items()}
    return {key: value for key, value in line.items() if isinstance(value, float)} | losses


def _write_lines(path: Path, lines: list[dict[str, Any]]) -> None:
    write_text(path, "".join(json.dumps(line, allow_nan=False) + "\n" for line in lines))


def _read_lines(path: Path) -> list[dict[str, Any]]:
    """Return the figures of each epoch of a network."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
