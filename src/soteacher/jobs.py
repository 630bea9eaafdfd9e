"""A study at work: its networks, in which order they are trained, and how each is made."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from soteacher.config import FileTeacher, SavedTeacher, Student, StudyConfig, TrainedTeacher
from soteacher.data import DataSet, EvaluationLoader, ImageSplit, held_out_rows
from soteacher.errors import InputError
from soteacher.models.classifier import Classifier, NetworkSpec, build_classifier, classifier_of, network_spec
from soteacher.models.weights import FACTS_FILE, WEIGHTS_FILE, load_weights, read_facts, read_weights
from soteacher.randomness import derive_seed
from soteacher.run_folder import CONFIG, network_folder, read_config
from soteacher.settings import parse

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
        return (self.folder_of(job) / FACTS_FILE).exists()


def teacher_job(config: StudyConfig, name: str, seed: int) -> Job:
    """Return the network of a teacher that a seed's student learns from: one that exists already is one for all."""
    return Job("teacher", name, 0 if isinstance(config.teachers[name], FileTeacher) else seed)


def jobs_of(config: StudyConfig) -> dict[Job, Job | None]:
    """Return the networks of a study in the order of their training, each with the one that it needs."""
    jobs: dict[Job, Job | None] = {}
    for seed in config.seeds:
        for name in config.teachers:
            needed = config.needed_by(name)
            jobs[teacher_job(config, name, seed)] = teacher_job(config, needed, seed) if needed else None
    for seed in config.seeds:
        for arm in config.arms():
            jobs[Job("student", arm.name, seed)] = teacher_job(config, arm.teacher, seed) if arm.teacher else None
    # A teacher that needs another one comes after it, wherever it stands in the settings.
    return dict(sorted(jobs.items(), key=lambda item: (item[0].role == "student", _depth(jobs, item[0]))))


def in_turn(config: StudyConfig, jobs: Mapping[Job, Job | None]) -> dict[Job, Job | None]:
    """Return networks of a study in the order in which they are best trained.

    Where answers are kept, students go arm by arm: side by side, those of one seed would ask their teacher the same.
    """
    if config.teacher_cache is None:
        return dict(jobs)
    arms = [arm.name for arm in config.arms()]
    return dict(sorted(jobs.items(), key=lambda item: arms.index(item[0].arm) if item[0].role == "student" else -1))


def _depth(jobs: Mapping[Job, Job | None], job: Job) -> int:
    needed = jobs.get(job)
    return 0 if needed is None else 1 + _depth(jobs, needed)


def teacher_of(config: StudyConfig, job: Job) -> Job | None:
    """Return the network that another one learns from; ``None`` for one that learns from the labels alone."""
    spec = spec_of(config, job)
    if isinstance(spec, TrainedTeacher):
        return teacher_job(config, spec.teacher, job.seed) if spec.teacher else None
    return jobs_of(config)[job] if isinstance(spec, Student) else None


def start_of(config: StudyConfig, job: Job) -> Job | None:
    """Return the network whose weights another one goes on from; ``None`` for one with new weights."""
    spec = spec_of(config, job)
    start = spec.start if isinstance(spec, TrainedTeacher) else None
    return teacher_job(config, start, job.seed) if start else None


def spec_of(config: StudyConfig, job: Job) -> TrainedTeacher | SavedTeacher | FileTeacher | Student:
    """Return the settings of a network of a study."""
    if job.role == "teacher":
        return config.teachers[job.arm]
    return config.students[next(arm.student for arm in config.arms() if arm.name == job.arm)]


def rows_of(study: Study, job: Job) -> tuple[Tensor, Tensor | None]:
    """Return the training examples that a network is trained on, and those that it holds out, if any."""
    spec = spec_of(study.config, job)
    if isinstance(spec, SavedTeacher):
        return rows_of(study, Job("teacher", spec.teacher, job.seed))
    share = 0.0 if isinstance(spec, FileTeacher) else study.config.training_of(spec).held_out
    return split_rows(study.data, share, job.seed)


def split_rows(data: DataSet, held_out: float, seed: int) -> tuple[Tensor, Tensor | None]:
    """Return the training examples that networks of a seed are trained on, and those that they hold out, if any."""
    if not held_out:
        return torch.arange(data.train.num_examples), None
    return held_out_rows(data.train.labels, held_out, derive_seed(seed, "held out"))


def evaluation_batches(split: ImageSplit, device: torch.device | str) -> EvaluationLoader:
    """Return a split's batches for evaluation; as many processes as there are threads decode images in files."""
    return EvaluationLoader(split, batch_size=EVALUATION_BATCH, device=device, workers=torch.get_num_threads())


def new_classifier(study: Study, model: str, *, pretrained: bool) -> tuple[Classifier, NetworkSpec]:
    """Return an untrained network of the study, and what it is built from."""
    network = _network_spec(study, model, pretrained=pretrained)
    return _classifier(study, network, pretrained=pretrained), network


def restored(study: Study, network: NetworkSpec, weights: Path) -> Classifier:
    """Return a network of the study with the weights of a file."""
    classifier = _classifier(study, network)
    load_weights(classifier.network, read_weights(weights), source=str(weights))
    return classifier


def load_finished(study: Study, job: Job) -> tuple[Classifier, NetworkSpec]:
    """Return a finished network of the study."""
    folder = study.folder_of(job)
    network = read_facts(folder)[0]
    return restored(study, network, folder / WEIGHTS_FILE), network


def load_teacher_file(study: Study, spec: FileTeacher) -> tuple[Classifier, NetworkSpec]:
    """Return a teacher from a run folder, a network's folder, a ``model.safetensors`` or a foreign checkpoint.

    Raises:
        InputError: nothing usable there, or a teacher for other classes than the data's.
    """
    path = find_network(spec.file)
    if path.name == WEIGHTS_FILE and (path.parent / FACTS_FILE).exists():
        network = read_facts(path)[0]
        if spec.model is not None:
            network = network.model_copy(update={"model": spec.model})
    elif spec.model is None:
        raise InputError(
            f"{path} does not say which network it is: name its model (in a command --model or --teacher-model; see "
            "soteacher models)"
        )
    else:
        network = _network_spec(study, spec.model, pretrained=False)
        own: dict[str, Any] = {"mean": spec.mean or network.mean, "std": spec.std or network.std}
        network = parse(NetworkSpec, network.model_dump() | own, place=str(path))
    if network.num_classes != study.data.num_classes:
        raise InputError(
            f"the network {path} knows {network.num_classes} classes, and the data {study.data.name} has "
            f"{study.data.num_classes}"
        )
    if network.in_channels != study.data.in_channels:
        raise InputError(
            f"the network {path} wants images of {network.in_channels} channels, and {study.data.name} has "
            f"{study.data.in_channels}"
        )
    different = [pair for pair in zip(network.class_names, study.data.class_names, strict=False) if pair[0] != pair[1]]
    if different:
        raise InputError(
            f"the network {path} and the data {study.data.name} differ in a class: {different[0][0]!r} of the network "
            f"is {different[0][1]!r} in the data"
        )
    return restored(study, network, path), network


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
    if (path / WEIGHTS_FILE).exists():
        return path / WEIGHTS_FILE
    for role in roles:
        found = _made_for_nobody_else(path, role, sorted(path.glob(f"{role}s/*/*/model.safetensors")))
        if len(found) == 1:
            return found[0]
        if found:
            names = ", ".join(str(other.parent) for other in found[:4])
            more = " ..." if len(found) > 4 else ""
            raise InputError(f"{path} holds {len(found)} {role}s; name one: {names}{more}")
    raise InputError(f"no network at {path}: wanted a run folder, a model.safetensors or a checkpoint")


def _made_for_nobody_else(run: Path, role: str, found: list[Path]) -> list[Path]:
    """Leave out teachers that another one of the run goes on from or learns from: they were made for that one."""
    if role != "teacher" or len(found) < 2 or not (run / CONFIG).exists():
        return found
    teachers = read_config(run).teachers.values()
    needed = {name for one in teachers if isinstance(one, TrainedTeacher) for name in (one.start, one.teacher)}
    return [path for path in found if path.parent.parent.name not in needed] or found


def _classifier(study: Study, network: NetworkSpec, *, pretrained: bool = False) -> Classifier:
    """Return a classifier with fresh weights: of the zoo, or of the caller's factories."""
    if network.model not in study.factories:
        return build_classifier(network, pretrained=pretrained)
    made = study.factories[network.model](network.num_classes, network.in_channels)
    return classifier_of(made, network)


def _network_spec(study: Study, model: str, *, pretrained: bool) -> NetworkSpec:
    data = study.data
    facts: dict[str, Any] = {
        "num_classes": data.num_classes, "in_channels": data.in_channels, "mean": data.mean, "std": data.std,
        "class_names": data.class_names,
    }  # fmt: skip
    if model in study.factories:
        return NetworkSpec(model=model, **facts)
    return network_spec(model, image_size=data.image_size, pretrained=pretrained, **facts)
