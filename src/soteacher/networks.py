"""One network of a study: put together from its settings, trained by the loop, evaluated and saved.

:func:`train_network` is the way through; the rest are its parts.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from hashlib import blake2b
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from soteacher.config import FileTeacher, SavedTeacher, Student, StudyConfig, TrainedTeacher, terms_of
from soteacher.data import DataSet, EvaluationLoader, TrainLoader
from soteacher.errors import InputError
from soteacher.files import read_json, write_tensors, write_text
from soteacher.models.classifier import Classifier, NetworkSpec, network_spec
from soteacher.models.taps import Tapped, resolve_taps
from soteacher.models.weights import load_weights, read_weights, save_classifier
from soteacher.models.zoo import build_network
from soteacher.objective import ObjectiveConfig
from soteacher.randomness import derive_seed
from soteacher.run_folder import network_folder
from soteacher.train.checkpoint import Checkpoint
from soteacher.train.config import TrainingConfig, epochs_at
from soteacher.train.evaluate import Evaluation, evaluate
from soteacher.train.logs import open_loggers
from soteacher.train.loop import StepReport, Trainee, fabric_for, fit
from soteacher.train.optimizer import build_optimizer
from soteacher.train.teacher_signal import LiveTeacher
from soteacher.types import Task

EVALUATION_BATCH = 128

NetworkFactory = Callable[[int, int], nn.Module]
"""``(num_classes, in_channels) -> network``: a network of the caller's own, by a name that the study uses."""
OnEvent = Callable[["Job", dict[str, Any]], None]


@dataclass(frozen=True, slots=True)
class Job:
    """One network of a study."""

    role: Literal["teacher", "student"]
    arm: str
    seed: int

    @property
    def name(self) -> str:
        """``student soteacher-kd/seed0``: how the network is called in messages."""
        return f"{self.role} {self.arm}/seed{self.seed}"


@dataclass(frozen=True)
class Study:
    """A study at work: its settings, its folder, its data."""

    config: StudyConfig
    folder: Path
    data: DataSet
    device: str
    factories: Mapping[str, NetworkFactory] = field(default_factory=dict[str, NetworkFactory])

    def folder_of(self, job: Job) -> Path:
        """Return where a network lies."""
        return network_folder(self.folder, job.role, job.arm, job.seed)

    def finished(self, job: Job) -> bool:
        """Return whether the network is trained: its ``model.json`` is written last."""
        return (self.folder_of(job) / "model.json").exists()


def jobs_of(config: StudyConfig) -> dict[Job, Job | None]:
    """Return the networks of a study in the order of their training, each with the one that it needs."""
    jobs: dict[Job, Job | None] = {}
    for seed in config.seeds:
        for name, teacher in config.teachers.items():
            source = Job("teacher", teacher.teacher, seed) if isinstance(teacher, SavedTeacher) else None
            jobs[Job("teacher", name, seed)] = source
    for seed in config.seeds:
        for arm in config.arms():
            jobs[Job("student", arm.name, seed)] = Job("teacher", arm.teacher, seed) if arm.teacher else None
    # A teacher that is an earlier state of another comes after it, wherever it stands in the settings.
    return dict(sorted(jobs.items(), key=lambda item: (item[0].role == "student", _depth(jobs, item[0]))))


def _depth(jobs: Mapping[Job, Job | None], job: Job) -> int:
    needed = jobs.get(job)
    return 0 if needed is None else 1 + _depth(jobs, needed)


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


def spec_of(config: StudyConfig, job: Job) -> TrainedTeacher | SavedTeacher | FileTeacher | Student:
    """Return the settings of a network of a study."""
    if job.role == "teacher":
        return config.teachers[job.arm]
    return config.students[next(arm.student for arm in config.arms() if arm.name == job.arm)]


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
    folder, training = study.folder_of(job), study.config.training_of(spec)
    terms = {name: config.term(task_of(study.data)) for name, config in terms_of(spec).items()}
    features = sorted({name for term in terms.values() for name in term.objective.features})
    torch.manual_seed(derive_seed(job.seed, job.role, "weights"))  # arms of one seed start from the same weights
    classifier, network = new_classifier(study, spec.model, pretrained=spec.pretrained)
    fabric = fabric_for(study.device, training.precision)
    if training.channels_last:
        classifier.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue] an overload torch lacks
    forward = Tapped(classifier, resolve_taps(classifier, features))
    objectives = nn.ModuleList(term.objective for term in terms.values()).to(fabric.device)
    optimizer: Any = build_optimizer(training.optimizer, [*classifier.parameters(), *objectives.parameters()])
    called, optimizer = fabric.setup(_compiled(forward, training), optimizer)
    teacher_job = _teacher_job(study, job)
    teacher = None
    if teacher_job is not None:
        teacher_network = _load_finished(study, teacher_job)[0].to(fabric.device).eval().requires_grad_(False)
        if training.channels_last:
            teacher_network.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue] as above
        tapped = Tapped(teacher_network, resolve_taps(teacher_network, features)).eval()
        teacher = LiveTeacher(fabric.setup_module(_compiled(tapped, training)))
    trainee = Trainee(
        network=classifier.network, forward=called, terms=tuple(terms.values()), optimizer=optimizer,
        teacher=teacher, fabric=fabric, config=training, seed=derive_seed(job.seed, job.role, "training"),
    )  # fmt: skip
    batches = TrainLoader(
        study.data.train, batch_size=training.batch_size, augment=study.config.data.augment,
        seed=derive_seed(job.seed, job.role, "data"), device=fabric.device,
    )  # fmt: skip
    fingerprint = _fingerprint(study, job, network, terms_of(spec), training, teacher_job)
    checkpoint = Checkpoint(folder / "resume", fingerprint)
    history = _fit(study, job, trainee, batches, classifier, checkpoint, on_event=on_event, should_stop=should_stop)
    facts = {
        "method": spec.method,
        "terms": {name: config.model_dump(mode="json") for name, config in terms_of(spec).items()},
        "training": training.model_dump(mode="json"),
        "fingerprint": fingerprint,
    }
    _finish(study, job, classifier, network, history, facts)
    checkpoint.remove()


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
    test = EvaluationLoader(study.data.test, batch_size=EVALUATION_BATCH, device=trainee.fabric.device)

    def measure() -> dict[str, float]:
        result = evaluate(classifier, test)
        return {"test_accuracy": result.accuracy, "test_nll": result.nll, "test_ece": result.ece}

    def on_epoch(line: dict[str, Any]) -> None:
        lines.append(line)
        _write_lines(folder / "metrics.jsonl", lines)
        if len(lines) in wanted:
            _save_weights(_epoch_weights(folder, len(lines)), trainee.network)
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
) -> None:
    """Evaluate a trained network once more and write it with its row of the results."""
    classifier.to(study.device)
    loaders = {
        split: EvaluationLoader(
            getattr(study.data, split), batch_size=EVALUATION_BATCH, device=torch.device(study.device)
        )
        for split in ("test", "train")
    }
    figures = {split: evaluate(classifier, loader) for split, loader in loaders.items()}
    row = _row(study, job, network, history, figures, method=facts["method"], parameters=_count(classifier))
    everything = {
        "role": job.role, "arm": job.arm, "seed": job.seed, "row": row, **facts,
        "data": study.config.data.model_dump(mode="json"),
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
    source = Job("teacher", spec.teacher, job.seed)
    trained = study.config.teachers[spec.teacher]
    assert isinstance(trained, TrainedTeacher)
    epochs = epochs_at(spec.after, study.config.training_of(trained).epochs)
    folder = study.folder_of(source)
    path = _epoch_weights(folder, epochs)
    facts = read_json(folder / "model.json")
    history = _read_lines(folder / "metrics.jsonl")[:epochs]
    if epochs == len(_read_lines(folder / "metrics.jsonl")):
        path = folder / "model.safetensors"
    if not path.exists():
        kept = sorted(int(other.stem.removeprefix("after-")) for other in path.parent.glob("after-*.safetensors"))
        raise InputError(
            f"the weights of {source.name} after {epochs} epochs were not kept; kept: {kept or 'none'}; "
            "set save_every in its training and train it anew"
        )
    network = NetworkSpec(**facts["network"])
    classifier = _classifier(study, network)
    load_weights(classifier.network, read_weights(path), source=str(path))
    _write_lines(study.folder_of(job) / "metrics.jsonl", history)
    kept_facts = {key: facts[key] for key in ("method", "terms", "training")}
    fingerprint = f"{facts['fingerprint']}-after-{epochs}"
    _finish(study, job, classifier, network, history, {**kept_facts, "fingerprint": fingerprint})


def _take_file(study: Study, job: Job, spec: FileTeacher) -> None:
    """Make a teacher of a file."""
    classifier, network = load_teacher_file(study, spec)
    checksum = blake2b(digest_size=16)
    for name, tensor in sorted(classifier.network.state_dict().items()):
        checksum.update(name.encode() + tensor.detach().cpu().numpy().tobytes())
    _write_lines(study.folder_of(job) / "metrics.jsonl", [])
    _finish(study, job, classifier, network, [], {"method": "file", "fingerprint": checksum.hexdigest()})


def load_teacher_file(study: Study, spec: FileTeacher) -> tuple[Classifier, NetworkSpec]:
    """Return a teacher from a run folder, a network's folder, a ``model.safetensors`` or a foreign checkpoint.

    Raises:
        InputError: nothing usable there, or a teacher for other classes than the data's.
    """
    path = find_network(spec.file)
    facts = path.parent / "model.json"
    if path.name == "model.safetensors" and facts.exists():
        network = NetworkSpec(**read_json(facts)["network"])
        if spec.model is not None:
            network = network.model_copy(update={"model": spec.model})
    elif spec.model is None:
        raise InputError(f"{path} does not say which network it is; name it: model=NAME (see soteacher models)")
    else:
        network = _network_spec(study, spec.model, pretrained=False)
    if network.num_classes != study.data.num_classes:
        raise InputError(
            f"the teacher {path} knows {network.num_classes} classes, and the data {study.data.name} has "
            f"{study.data.num_classes}"
        )
    if network.in_channels != study.data.in_channels:
        raise InputError(
            f"the teacher {path} wants images of {network.in_channels} channels, and {study.data.name} has "
            f"{study.data.in_channels}"
        )
    classifier = _classifier(study, network)
    load_weights(classifier.network, read_weights(path), source=str(path))
    return classifier, network


def find_network(path: Path, roles: Sequence[Literal["teacher", "student"]] = ("teacher",)) -> Path:
    """Return the weights file that a path means: itself, or the one in a network's folder or in a run.

    Args:
        path: the file or folder.
        roles: which networks of a run are meant: the first role of which it has any.

    Raises:
        InputError: nothing there, or more than one network of the role.
    """
    if path.is_file():
        return path
    if (path / "model.safetensors").exists():
        return path / "model.safetensors"
    for role in roles:
        found = sorted(path.glob(f"{role}s/*/*/model.safetensors"))
        if len(found) == 1:
            return found[0]
        if found:
            names = ", ".join(str(other.parent) for other in found[:4])
            more = " ..." if len(found) > 4 else ""
            raise InputError(f"{path} holds {len(found)} {role}s; name one: {names}{more}")
    raise InputError(f"no network at {path}: wanted a run folder, a model.safetensors or a checkpoint")


def _compiled(module: nn.Module, training: TrainingConfig) -> nn.Module:
    compiled: Any = torch.compile(module) if training.compile else module
    return compiled


def task_of(data: DataSet) -> Task:
    """Return what an objective may need to know of a data set."""
    return Task(num_examples=data.train.num_examples, num_classes=data.num_classes)


def _network_spec(study: Study, model: str, *, pretrained: bool) -> NetworkSpec:
    data = study.data
    facts: dict[str, Any] = {
        "num_classes": data.num_classes, "in_channels": data.in_channels, "mean": data.mean, "std": data.std,
        "class_names": data.class_names,
    }  # fmt: skip
    if model in study.factories:
        return NetworkSpec(model=model, **facts)
    return network_spec(model, image_size=data.image_size, pretrained=pretrained, **facts)


def _classifier(study: Study, network: NetworkSpec, *, pretrained: bool = False) -> Classifier:
    """Return a classifier with fresh weights: of the zoo, or of the caller's factories."""
    if network.model in study.factories:
        made = study.factories[network.model](network.num_classes, network.in_channels)
    else:
        made = build_network(
            network.model, num_classes=network.num_classes, in_channels=network.in_channels, pretrained=pretrained
        )
    return Classifier(made, mean=network.mean, std=network.std, input_size=network.input_size)


def new_classifier(study: Study, model: str, *, pretrained: bool) -> tuple[Classifier, NetworkSpec]:
    """Return an untrained network of the study, and what it is built from."""
    network = _network_spec(study, model, pretrained=pretrained)
    return _classifier(study, network, pretrained=pretrained), network


def _load_finished(study: Study, job: Job) -> tuple[Classifier, NetworkSpec]:
    """Return a finished network of the study."""
    folder = study.folder_of(job)
    network = NetworkSpec(**read_json(folder / "model.json")["network"])
    classifier = _classifier(study, network)
    load_weights(classifier.network, read_weights(folder / "model.safetensors"), source=str(folder))
    return classifier, network


def _fingerprint(
    study: Study,
    job: Job,
    network: NetworkSpec,
    terms: Mapping[str, ObjectiveConfig],
    training: TrainingConfig,
    teacher: Job | None,
) -> str:
    """Return the checksum of everything that decides a network's numbers."""
    facts = {
        "data": study.data.checksum, "augment": study.config.data.augment.model_dump(mode="json"),
        "seed": job.seed, "role": job.role,
        "network": network.model_dump(mode="json"), "training": training.model_dump(mode="json"),
        "terms": {name: config.model_dump(mode="json") for name, config in terms.items()},
        "teacher": read_json(study.folder_of(teacher) / "model.json")["fingerprint"] if teacher else None,
    }  # fmt: skip
    return blake2b(json.dumps(facts, sort_keys=True).encode(), digest_size=16).hexdigest()


def _wanted_epochs(config: StudyConfig, job: Job, training: TrainingConfig) -> set[int]:
    """Return the numbers of finished epochs whose weights are kept."""
    every = training.save_every
    wanted = set(range(every, training.epochs + 1, every)) if every else set[int]()
    for other in config.teachers.values() if job.role == "teacher" else ():
        if isinstance(other, SavedTeacher) and other.teacher == job.arm:
            wanted.add(epochs_at(other.after, training.epochs))
    return wanted


def _epoch_weights(folder: Path, finished: int) -> Path:
    """Return where a network's weights after so many finished epochs are kept."""
    return folder / "epochs" / f"after-{finished}.safetensors"


def _save_weights(path: Path, network: nn.Module) -> None:
    """Write a network's weights atomically."""
    tensors = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in network.state_dict().items()}
    write_tensors(path, tensors)


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
