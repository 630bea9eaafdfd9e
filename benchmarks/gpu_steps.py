"""Training steps on one device, from the field's way to ours, one change after the other."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import chain, count
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from benchmarks.field import FieldStudent, FieldTeacher, field_loader, soteacher_regularizers
from benchmarks.field_losses import kd
from soteacher.assembly import assemble
from soteacher.config import StudyConfig, TrainedTeacher
from soteacher.data import DataSet, ImageSplit, TrainLoader
from soteacher.jobs import Job, Study
from soteacher.models.classifier import Classifier
from soteacher.models.zoo import build_network
from soteacher.networks import make_trainee
from soteacher.randomness import derive_seed
from soteacher.train.loop import CHECK_EVERY, Trainee, train_step
from soteacher.train.optimizer import learning_rate
from soteacher.types import Batch, Outputs

CLASSES = 100


@dataclass(frozen=True, slots=True)
class Cell:
    """One training whose steps are measured."""

    teacher: str
    """A network."""
    student: str | None
    """The network that is distilled by KD; none: the teacher itself is trained, by SoTeacher."""
    batch_size: int

    @property
    def name(self) -> str:
        """What tables call it."""
        training = f"{self.teacher}, SoTeacher" if self.student is None else f"{self.teacher} -> {self.student}, KD"
        return f"{training}, batch {self.batch_size}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Variant:
    """One way to train."""

    name: str
    field: bool = False
    """The field's way: the rest does not matter."""
    waits: bool = False
    """The optimiser is PyTorch's as it comes, and the host reads the figures of every step."""
    channels_last: bool = False
    precision: Literal["fp32", "bf16-mixed"] = "fp32"
    compiled: Literal["no", "code", "graphs"] = "no"
    """``code``: by ``torch.compile`` alone; ``graphs``: as the library does it, on a GPU replayed as CUDA graphs."""
    free: bool = False
    """PyTorch may take its fastest algorithms; otherwise those that give the same result each time."""

    @property
    def offered(self) -> bool:
        """Whether the library trains in this way, given the settings."""
        return not (self.field or self.waits or self.free or self.compiled == "code")


FIELD = Variant(name="the field's way", field=True, free=True)
VARIANTS = (
    FIELD,
    Variant(name="data on the device, eager, fp32", waits=True),
    Variant(name="+ fused SGD, no waiting"),
    Variant(name="+ channels last", channels_last=True),
    Variant(name="+ bf16-mixed", channels_last=True, precision="bf16-mixed"),
    Variant(name="+ compile", channels_last=True, precision="bf16-mixed", compiled="code"),
    Variant(name="+ CUDA graphs", channels_last=True, precision="bf16-mixed", compiled="graphs"),
    Variant(
        name="+ free choice of algorithms", channels_last=True, precision="bf16-mixed", compiled="graphs", free=True
    ),
)
"""Each adds one change to the one before. The library stops before the last: its runs are repeatable."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Training:
    """One of our trainings, ready for its next step."""

    step: Callable[[], None]
    trainee: Trainee
    loader: TrainLoader
    classifier: Classifier
    study: Study


def random_data(train: int, test: int) -> DataSet:
    """Return random images of CIFAR-100's shape: no figure here depends on what they show."""
    generator = torch.Generator().manual_seed(0)

    def split(size: int) -> ImageSplit:
        images = torch.randint(0, 256, (size, 3, 32, 32), dtype=torch.uint8, generator=generator)
        return ImageSplit(images=images, labels=torch.arange(size) % CLASSES)

    return DataSet(
        name="random", train=split(train), test=split(test), class_names=tuple(map(str, range(CLASSES))),
        mean=(0.5,) * 3, std=(0.25,) * 3, checksum="",
    )  # fmt: skip


def cell_study(cell: Cell, variant: Variant) -> dict[str, Any]:
    """Return the settings of a study that trains a cell's network in one of our ways."""
    training = {
        "batch_size": cell.batch_size, "precision": variant.precision, "channels_last": variant.channels_last,
        "compile": variant.compiled == "graphs",
    }  # fmt: skip
    tree: dict[str, Any] = {
        "data": {"source": "cifar100"}, "training": training, "seeds": [0],
        "teachers": {"soteacher": {"model": cell.teacher, "method": "soteacher"}},
    }  # fmt: skip
    if cell.student is not None:
        tree["students"] = {"kd": {"model": cell.student, "method": "kd"}}
    return tree


def own_cell(cell: Cell, variant: Variant, data: DataSet, device: str) -> Training:
    """Return a cell's training in one of our ways."""
    study = Study(StudyConfig.model_validate(cell_study(cell, variant)), Path(), data, device)
    role, name = ("teacher", "soteacher") if cell.student is None else ("student", "kd")
    return own_training(study, role, name, waits=variant.waits, compiles=variant.compiled == "code")


def own_training(
    study: Study, role: Literal["teacher", "student"], name: str, *, waits: bool = False, compiles: bool = False
) -> Training:
    """Return a network of a study in training, step by step as the training loop does it.

    Args:
        study: nothing is written for it.
        role: of the network.
        name: of the teacher or student in the study; a student learns from the first teacher, untrained.
        waits: take PyTorch's optimiser as it comes, and let the host read the figures of every step.
        compiles: let the networks go through ``torch.compile`` here, whatever the study says.
    """
    spec: Any = study.config.teachers[name] if role == "teacher" else study.config.students[name]
    teachers = [] if role == "teacher" else [_untrained_teacher(study)]
    made = assemble(
        study, spec, role=role, seed=0, teacher=teachers[0] if teachers else None, teacher_name="teacher"
    )  # fmt: skip
    made.start_training()
    if compiles:
        for classifier in (made.classifier, *teachers):
            classifier.compile(dynamic=False)
    training = study.config.training_of(spec)
    trainee = make_trainee(study, Job(role, name, 0), made, teachers, training, "training")
    if waits:
        own: Any = trainee.optimizer.optimizer
        trainee = replace(trainee, optimizer=trainee.fabric.setup_optimizers(_plain_sgd(own)))
    trainee.forward.train()
    loader = TrainLoader(
        study.data.train, batch_size=training.batch_size, augment=study.config.data.augment, seed=0,
        device=study.device, views=made.views("training"),
    )  # fmt: skip
    step = _steps(trainee, loader, waits=waits)
    return Training(step=step, trainee=trainee, loader=loader, classifier=made.classifier, study=study)


def _untrained_teacher(study: Study) -> Classifier:
    spec = next(iter(study.config.teachers.values()))
    assert isinstance(spec, TrainedTeacher)
    torch.manual_seed(1)
    network = build_network(spec.model, num_classes=study.data.num_classes, in_channels=study.data.in_channels)
    return Classifier(network, mean=study.data.mean, std=study.data.std).eval().requires_grad_(False)


def _plain_sgd(fused: torch.optim.Optimizer) -> torch.optim.SGD:
    """Return PyTorch's optimiser as it comes, for the same weights and with the same settings."""
    (group,) = fused.param_groups
    settings = {key: group[key] for key in ("lr", "momentum", "nesterov", "weight_decay")}
    return torch.optim.SGD(group["params"], **settings)


def _steps(trainee: Trainee, loader: TrainLoader, *, waits: bool) -> Callable[[], None]:
    """Return a function that takes the next step: all that the loop does in one, the loading of the batch included."""
    batches, pending = _numbered(loader), list[Tensor]()

    def take_step() -> None:
        step, batch = next(batches)
        seed = derive_seed(trainee.seed, "step", 1, step)
        torch.manual_seed(seed)
        rate = learning_rate(trainee.config, epoch=1, step=step, steps_per_epoch=loader.steps_per_epoch)
        for group in trainee.optimizer.param_groups:
            group["lr"] = rate
        losses, right = train_step(trainee, batch, epoch=1, progress=0.5, seed=seed)
        pending.append(torch.cat([losses.double() * len(batch.labels), right.double().reshape(1)]))
        if waits or len(pending) == CHECK_EVERY:
            torch.stack(pending).cpu()
            pending.clear()

    return take_step


def _numbered(loader: TrainLoader) -> Iterator[tuple[int, Batch]]:
    return chain.from_iterable(enumerate(loader.epoch(epoch)) for epoch in count(1))


def field_steps(cell: Cell, data: DataSet, device: str, *, workers: int) -> Callable[[], None]:
    """Return a function that takes the next step of a cell's training the field's way.

    Args:
        cell: what is trained.
        data: the images.
        device: ``cpu`` or ``cuda``; for a GPU the loader pins its batches.
        workers: processes that augment images.
    """
    loader = field_loader(data.train, data.mean, data.std, batch_size=cell.batch_size, workers=workers, seed=0)
    loader.pin_memory = device == "cuda"
    batches = chain.from_iterable(loader for _ in count())
    training = _field_training(cell, data, device)

    def take_step() -> None:
        training.step(*next(batches))

    return take_step


def _field_training(cell: Cell, data: DataSet, device: str) -> FieldTeacher | FieldStudent:
    torch.manual_seed(1)
    teacher = build_network(cell.teacher, num_classes=data.num_classes).to(device)
    if cell.student is None:
        examples, classes = data.train.num_examples, data.num_classes
        return FieldTeacher(teacher, soteacher_regularizers(examples, classes, ramp=0.5, device=device))

    def divergence(student: Outputs, teacher: Outputs, labels: Tensor, indices: Tensor) -> Tensor:
        del labels, indices
        return kd(student.logits, teacher.logits, temperature=4.0)

    student = build_network(cell.student, num_classes=data.num_classes).to(device)
    return FieldStudent(student, teacher, divergence, label_weight=0.1, distillation_weight=0.9)


def choose_algorithms(device: str, *, free: bool) -> None:
    """Let PyTorch take any algorithm on a GPU, as the field does, or only repeatable ones, as the library does."""
    if device == "cuda":
        torch.use_deterministic_algorithms(not free, warn_only=True)
        torch.backends.cudnn.benchmark = free


def synchronise(device: str) -> None:
    """Wait until a GPU has done all that it was given."""
    if device == "cuda":
        torch.cuda.synchronize()
