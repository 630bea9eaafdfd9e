import copy
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from soteacher.models.classifier import Classifier
from soteacher.models.inspection import inspect_network
from soteacher.models.parts import Parts
from soteacher.models.takeover import take_over_classifier
from soteacher.models.taps import Tapped, resolve_taps
from soteacher.models.zoo import build_network
from soteacher.objective import Objective, ObjectiveConfig
from soteacher.types import BuiltNetwork, DistillStep, Outputs, Task, View

GOLDEN = Path(__file__).parents[1] / "data" / "golden"


@pytest.fixture
def golden() -> Callable[[str], dict[str, Tensor]]:
    """Reference values by name, computed with the authors' released code; see ``tests/data/golden``."""

    def read(name: str) -> dict[str, Tensor]:
        with np.load(GOLDEN / f"{name}.npz") as arrays:
            return {key: torch.from_numpy(arrays[key]) for key in arrays.files}

    return read


@pytest.fixture
def task() -> Task:
    return Task(num_examples=12, num_classes=5)


@pytest.fixture
def network() -> nn.Module:
    """A network with one layer of each kind, whose running statistics and weights differ from their initial ones."""
    torch.manual_seed(0)
    network = nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1, bias=False),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(4, 5),
    )
    for parameter in network.parameters():
        nn.init.normal_(parameter)
    network(torch.randn(16, 3, 6, 6))
    return network


@pytest.fixture
def make_step() -> Callable[..., DistillStep]:
    """Build a step around a network's outputs for a seeded batch; it serves teacher and student objectives alike."""

    def make(
        network: nn.Module,
        *,
        seed: int = 0,
        indices: tuple[int, ...] = (1, 3, 5, 7),
        dtype: torch.dtype = torch.float32,
        logits: Tensor | None = None,
        epoch: int = 0,
        num_epochs: int = 4,
        features: Mapping[str, Tensor] | None = None,
        teacher_features: Mapping[str, Tensor] | None = None,
        **more: Any,
    ) -> DistillStep:
        generator = torch.Generator().manual_seed(seed)
        images = torch.rand(len(indices), 3, 6, 6, generator=generator)
        student = network(images) if logits is None else logits
        teacher = torch.randn(student.shape, generator=generator)
        return DistillStep(
            images=images,
            labels=torch.randint(0, student.shape[1], (len(indices),), generator=generator),
            indices=torch.tensor(indices),
            outputs=Outputs(logits=student.to(dtype), features=dict(features or {})),
            model=network,
            epoch=epoch,
            num_epochs=num_epochs,
            progress=epoch / num_epochs,
            teacher=Outputs(logits=teacher.to(dtype), features=dict(teacher_features or {})),
            **more,
        )

    return make


@dataclass(frozen=True)
class Pair:
    """A real student and a real, frozen teacher, with what a study knows of them."""

    student: Classifier
    teacher: Classifier
    task: Task

    def step(
        self, *objectives: Objective[Any], seed: int = 0, batch: int = 8, dtype: torch.dtype = torch.float32
    ) -> DistillStep:
        """Run both on a seeded batch and give the objectives all that they declare; ``dtype`` as autocast would."""
        generator = torch.Generator().manual_seed(seed)
        images = torch.rand(batch, 3, IMAGE_SIZE, IMAGE_SIZE, generator=generator)
        views: dict[View, Tensor] = {
            "second": images.flip(3),
            "strong": images.flip(2),
            "rotated": torch.cat([images.rot90(turns, (2, 3)) for turns in (1, 2, 3)]),
        }
        wanted = {view for objective in objectives for view in objective.views}
        features = {name for objective in objectives for name in objective.features}
        teacher_features = {name for objective in objectives for name in objective.teacher_features}
        self.student.train()
        student, teacher = run(self.student, features, dtype), run(self.teacher, teacher_features, dtype)
        with torch.no_grad():
            answer = teacher(images)
            answers = {view: teacher(views[view]) for view in wanted}
        return DistillStep(
            images=images,
            labels=torch.randint(0, CLASSES, (batch,), generator=generator),
            indices=torch.randperm(EXAMPLES, generator=generator)[:batch],
            outputs=student(images),
            views={view: student(views[view]) for view in wanted},
            model=self.student.network,
            parts=Parts(self.student),
            epoch=1,
            num_epochs=4,
            progress=0.25,
            seed=seed,
            teacher=answer,
            teacher_views=answers,
            teacher_parts=Parts(self.teacher),
        )


def run(classifier: Classifier, features: Collection[str], dtype: torch.dtype) -> Callable[[Tensor], Outputs]:
    """Return the network as the training loop calls it."""

    def outputs(images: Tensor) -> Outputs:
        tapped = Tapped(classifier, resolve_taps(classifier, features))
        try:
            logits, values = tapped(images)
        finally:
            tapped.close()
        return Outputs(logits=logits.to(dtype), features={name: value.to(dtype) for name, value in values.items()})

    return outputs


IMAGE_SIZE, CLASSES, EXAMPLES = 32, 5, 24
IMAGES = torch.rand(2, 3, IMAGE_SIZE, IMAGE_SIZE, generator=torch.Generator().manual_seed(0))
PAIRS = {  # teacher, student
    "same family": ("wrn_16_1", "wrn_10_1"),
    "wider teacher": ("wrn_10_2", "wrn_10_1"),
    "other family": ("vgg8", "resnet8"),
    "transformer teacher": ("timm/test_vit", "resnet8"),
    "transformer student": ("resnet8x2", "timm/test_vit"),
}


@pytest.fixture(scope="session")
def make_pair() -> Callable[..., Pair]:
    """Build a pair by its name, always with the same weights; the networks are the caller's own."""

    def classifier(name: str, seed: int) -> Classifier:
        torch.manual_seed(seed)
        size = 160 if name.startswith("timm/") else None
        return Classifier(build_network(name, num_classes=CLASSES), mean=[0.5] * 3, std=[0.25] * 3, input_size=size)

    @cache
    def original(pair: str) -> Pair:
        teacher_name, student_name = PAIRS[pair]
        student, teacher = classifier(student_name, 0), classifier(teacher_name, 1).eval().requires_grad_(False)
        Parts(teacher).classifier.weight.mul_(20)  # as sure of some examples as a trained one
        task = Task(
            num_examples=EXAMPLES,
            num_classes=CLASSES,
            labels=torch.arange(EXAMPLES) % CLASSES,
            network=inspect_network(student, IMAGES, name=f"student {student_name}"),
            teacher=inspect_network(teacher, IMAGES, name=f"teacher {teacher_name}"),
            build_network=build,
        )
        return Pair(student, teacher, task)

    def build(name: str) -> BuiltNetwork:
        made = Classifier(build_network(name, num_classes=CLASSES), mean=[0.5] * 3, std=[0.25] * 3)
        return BuiltNetwork(classifier=made, parts=Parts(made), facts=inspect_network(made, IMAGES, name=name))

    def make(pair: str, config: ObjectiveConfig | None = None) -> Pair:
        found = original(pair)
        student, teacher = copy.deepcopy(found.student), copy.deepcopy(found.teacher)
        reuse = None if config is None else config.reuse()
        if reuse is None:
            return Pair(student, teacher, found.task)
        assert found.task.network is not None
        assert found.task.teacher is not None
        names = (found.task.network.name, found.task.teacher.name)
        torch.manual_seed(2)
        take_over_classifier(student, teacher, IMAGES, reduction=reuse.reduction, names=names)
        facts = inspect_network(student, IMAGES, name=names[0])
        return Pair(student, teacher, replace(found.task, network=facts))

    return make
