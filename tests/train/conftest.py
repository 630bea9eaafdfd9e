"""A training of a tiny network, with every part at hand."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from soteacher.data import AugmentConfig, ImageSplit, TrainLoader
from soteacher.models.classifier import Classifier
from soteacher.models.taps import Tapped
from soteacher.objective import Objective, Term
from soteacher.objectives import objective_config
from soteacher.train.checkpoint import Checkpoint
from soteacher.train.config import TrainingConfig
from soteacher.train.loop import StepReport, Trainee, fabric_for, fit
from soteacher.train.optimizer import build_optimizer
from soteacher.train.teacher_signal import LiveTeacher
from soteacher.types import Task


@dataclass
class Training:
    """A training that can be run, stopped and looked into."""

    trainee: Trainee
    batches: TrainLoader
    checkpoint: Checkpoint
    classifier: Classifier
    teacher: nn.Module | None
    reports: list[StepReport] = field(default_factory=list)

    def run(self, *, stop_after: int | None = None, measured: dict[str, float] | None = None) -> list[dict[str, Any]]:
        """Train to the end, or until so many steps are done."""
        asked = 0

        def should_stop() -> bool:
            nonlocal asked
            asked += 1
            return stop_after is not None and asked >= stop_after

        return fit(
            self.trainee, self.batches, measure=lambda: dict(measured or {"test_accuracy": 0.5}),
            checkpoint=self.checkpoint, on_epoch=lambda _: None, on_step=self.reports.append,
            should_stop=should_stop,
        )  # fmt: skip

    def state(self) -> dict[str, torch.Tensor]:
        """Return everything that a step changes, by name."""
        found = {f"network.{name}": value.clone() for name, value in self.trainee.network.state_dict().items()}
        for index, values in self.trainee.optimizer.optimizer.state_dict()["state"].items():
            found |= {f"optimizer.{index}.{name}": torch.as_tensor(value).clone() for name, value in values.items()}
        for term in self.trainee.terms:
            state = term.objective.state_dict()
            found |= {f"{term.objective.name}.{name}": value.clone() for name, value in state.items()}
        return found


@pytest.fixture
def tiny_split(tiny_arrays: dict[str, np.ndarray]) -> ImageSplit:
    return ImageSplit(
        images=torch.from_numpy(tiny_arrays["train_images"])[:, None],
        labels=torch.from_numpy(tiny_arrays["train_labels"]),
    )


@pytest.fixture
def make_training(
    tmp_path: Path, tiny_split: ImageSplit, tiny_network: Callable[[int, int], nn.Module]
) -> Callable[..., Training]:
    """Put a training together: three steps of 16, 16 and 8 examples an epoch."""

    def make(
        folder: str = "run",
        *,
        terms: dict[str, dict[str, Any]] | None = None,
        objectives: tuple[Objective[Any], ...] = (),
        distil: bool = False,
        fingerprint: str = "this one",
        seed: int = 0,
        device: str = "cpu",
        **settings: Any,
    ) -> Training:
        config = TrainingConfig.model_validate({"epochs": 2, "batch_size": 16} | settings)
        task = Task(num_examples=tiny_split.num_examples, num_classes=3)
        built = [objective_config(name)(**values).term(task) for name, values in (terms or {}).items()]
        built += [Term(objective=objective) for objective in objectives]
        torch.manual_seed(seed)
        classifier = Classifier(tiny_network(3, 1), mean=(0.4,), std=(0.3,))
        if config.channels_last is True:
            classifier.to(memory_format=torch.channels_last)
        fabric = fabric_for(device, config.precision)
        nn.ModuleList(term.objective for term in built).to(device)
        extra = [parameter for term in built for parameter in term.objective.parameters()]
        optimizer = build_optimizer(config.optimizer, [*classifier.parameters(), *extra])
        forward, optimizer = fabric.setup(Tapped(classifier, {}), optimizer)
        teacher = signal = None
        if distil:
            torch.manual_seed(99)
            teacher = Classifier(tiny_network(3, 1), mean=(0.4,), std=(0.3,)).to(device).eval().requires_grad_(False)
            signal = LiveTeacher(fabric.setup_module(Tapped(teacher, {})).eval())
        trainee = Trainee(
            network=classifier.network, forward=forward, terms=tuple(built), optimizer=optimizer, teacher=signal,
            fabric=fabric, config=config, seed=seed, channels_last=config.channels_last is True,
        )  # fmt: skip
        batches = TrainLoader(
            tiny_split, batch_size=config.batch_size, augment=AugmentConfig(crop_padding=1), seed=seed, device=device
        )
        checkpoint = Checkpoint(tmp_path / folder / "resume", fingerprint)
        return Training(trainee, batches, checkpoint, classifier, teacher)

    return make
