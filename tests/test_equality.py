"""Speed never changes what is computed: each way to run faster against the plain one, for every method.

Fifty steps of every stage of every method, in float32, are made from the same weights on the same batches with the same
random numbers, the plain way and each faster way; the losses of every term at every step must agree. Compiled networks
are compared in ``tests/train/test_train_acceleration.py``: what is compiled is the network alone, and not the method.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from itertools import chain, count, islice
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

from soteacher import networks
from soteacher.assembly import Assembled, assemble
from soteacher.config import Student, StudyConfig, TeacherCacheConfig, TrainedTeacher
from soteacher.data import DataSet, EvaluationLoader, ImageSplit, TrainLoader
from soteacher.jobs import Job, Study, new_classifier, spec_of
from soteacher.models.classifier import Classifier
from soteacher.models.family import FamilyNetwork, Tap
from soteacher.networks import make_trainee
from soteacher.objective import Stage
from soteacher.objectives import METHODS, OBJECTIVES
from soteacher.randomness import derive_seed
from soteacher.teacher_answers import why_live
from soteacher.train.config import TrainingConfig
from soteacher.train.loop import train_step
from soteacher.types import Batch

STEPS, BATCH, EXAMPLES, CLASSES = 50, 8, 60, 5
"""Eight steps an epoch, the last of four images."""
LEARNING_RATE = 1e-5
"""Small, so that fifty steps carry a difference of rounding along and do not multiply it: at a usual rate training is
chaotic, and two runs that differ in one last bit part for good. The weights still move by a thousand times as much."""
SAME, SAME_WEIGHTS = 1e-4, 1e-5
"""Of the largest value of a term; and of weights about 0.3 large: the same numbers added up in another order."""
ROUNDED = 5e-3
"""The same where the teacher's logits are rounded to float16, by up to a 2048th, and differences of them are taken."""
NEEDS: dict[str, dict[str, Any]] = {  # what has to be said besides the method
    "assistant": {"teacher": "standard"},
    "mcmi": {"start": "standard"},
    "mcmi_frozen": {"start": "standard"},
    "sftn": {"terms": {"sftn": {"student": "narrow"}}},
}
EQUAL_CHANNELS = ("fsp", "kdsvd")
"""Methods that compare maps of equally many channels."""
TRAINING: dict[str, Any] = {
    "epochs": 8, "batch_size": BATCH, "schedule": {"name": "constant"}, "preparation_epochs": 7, "compile": False,
}  # fmt: skip


class SmallNetwork(FamilyNetwork):
    """A stem and three stages of a convolution, with all the features that methods read."""

    feature_modules: ClassVar[Mapping[str, str]] = {
        "stem": "stem", "stage1": "stage1", "stage2": "stage2", "stage3": "stage3",
    }  # fmt: skip
    classifier_module: ClassVar[str] = "fc"

    def __init__(self, num_classes: int, in_channels: int, widths: tuple[int, ...]) -> None:
        super().__init__()
        inputs, strides = (in_channels, *widths), (1, 1, 2, 2)
        for number, name in enumerate(self.feature_modules):
            convolution = nn.Conv2d(inputs[number], widths[number], 3, strides[number], padding=1, bias=False)
            setattr(self, name, nn.Sequential(convolution, nn.BatchNorm2d(widths[number]), nn.ReLU()))
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(widths[-1], num_classes)
        with torch.no_grad():
            self.fc.weight.mul_(5)  # logits as different as those of a trained network: nothing is divided by about 0

    def forward(self, images: Tensor) -> Tensor:
        for name in self.feature_modules:
            images = self.get_submodule(name)(images)
        return self.fc(self.avgpool(images).flatten(1))

    def preactivations(self) -> dict[str, Tap]:
        return {f"preactivation{number}": Tap(f"stage{number}.2", "input") for number in (1, 2, 3)}


FACTORIES = {
    "narrow": lambda classes, channels: SmallNetwork(classes, channels, (4, 4, 6, 8)),
    "wide": lambda classes, channels: SmallNetwork(classes, channels, (6, 6, 8, 12)),
}


@cache
def data() -> DataSet:
    source = torch.Generator().manual_seed(0)
    labels = torch.arange(EXAMPLES) % CLASSES
    images = torch.randint(0, 200, (EXAMPLES, 3, 8, 8), generator=source)
    images += 10 * labels[:, None, None, None]
    split = ImageSplit(images=images.to(torch.uint8), labels=labels)
    return DataSet(
        name="random", train=split, test=split, class_names=tuple(map(str, range(CLASSES))), mean=(0.4,) * 3,
        std=(0.25,) * 3, checksum="",
    )  # fmt: skip


def study(name: str, folder: Path, *, kept: bool = False, **how: Any) -> Study:
    """Return a study of one method."""
    method = METHODS[name]
    optimizer = {"name": "sgd", **method.training.get("optimizer", {}), "learning_rate": LEARNING_RATE}
    training = TRAINING | {"optimizer": optimizer} | how
    own = {"optimizer": optimizer, "schedule": {"name": "constant"}, "epochs": TRAINING["epochs"]}
    own |= {"preparation_epochs": TRAINING["preparation_epochs"]}
    spec = {"method": name, "training": own, **NEEDS.get(name, {})}
    teachers: dict[str, Any] = {"standard": {"model": model_of_teacher(name), "method": "standard"}}
    if method.role == "teacher":
        teachers |= {name: {"model": "wide", **spec}}
    students = {name: {"model": "narrow", **spec}} if method.role == "student" else {}
    config = StudyConfig.model_validate(
        {
            "data": {"source": "cifar100", "augment": {"crop_padding": 1}}, "teachers": teachers,
            "students": students, "training": training, "teacher_cache": {} if kept else None,
        }
    )  # fmt: skip
    return Study(config, folder, data(), "cpu", FACTORIES)


def model_of_teacher(name: str) -> str:
    return "narrow" if name in EQUAL_CHANNELS else "wide"


def job_of(there: Study, name: str) -> Job:
    if METHODS[name].role == "teacher":
        return Job("teacher", name, 0)
    return Job("student", next(arm.name for arm in there.config.arms() if arm.student == name), 0)


def teacher(there: Study, name: str, number: int) -> Classifier:
    """Return a teacher like a trained one; routes have several."""
    torch.manual_seed(100 + number)
    model = model_of_teacher(name)
    classifier = new_classifier(there, model, pretrained=False)[0].train()
    images = next(iter(EvaluationLoader(data().train, batch_size=40, device="cpu"))).images
    with torch.no_grad():
        for _ in range(5):
            classifier(images)
    return classifier.eval().requires_grad_(False)


@dataclass
class Trained:
    """What fifty steps of each stage of a method leave."""

    losses: dict[Stage, Tensor]
    """``[steps, terms]``."""
    weights: dict[str, Tensor]
    keeps: bool
    """Whether its teacher's answers can be kept."""


def trained(name: str, folder: Path, *, kept: bool = False, **how: Any) -> Trained:
    """Train the network of a method."""
    there = study(name, folder, kept=kept, **how)
    job = job_of(there, name)
    spec = spec_of(there.config, job)
    assert isinstance(spec, Student | TrainedTeacher)
    training = there.config.training_of(spec)
    distils = any(OBJECTIVES[term]().needs_teacher for term in METHODS[name].terms)
    teachers = [teacher(there, name, number) for number in range(1 + len(training.route))] if distils else []
    start = None
    if name in NEEDS and "start" in NEEDS[name]:
        start = teacher(there, name, 9).requires_grad_(True), new_classifier(there, "wide", pretrained=False)[1]
    made = assemble(
        there, spec, role=job.role, seed=0, teacher=teachers[-1] if teachers else None, teacher_name="teacher",
        start=start,
    )  # fmt: skip
    losses: dict[Stage, Tensor] = {}
    if made.stage("preparation"):
        losses["preparation"] = fifty_steps(there, job, made, teachers[-1:], training.preparation(), "preparation")
    made.start_training()
    losses["training"] = fifty_steps(there, job, made, teachers, training, "training")
    weights = {key: value.float() for key, value in made.classifier.state_dict().items()}
    keeping = there.config.model_copy(update={"teacher_cache": TeacherCacheConfig()})
    why = why_live(keeping, training, made.teacher_features("training"))
    return Trained(losses, weights, keeps=made.reads_teacher("training") and why is None)


def fifty_steps(
    there: Study, job: Job, made: Assembled, teachers: list[Classifier], training: TrainingConfig, stage: Stage
) -> Tensor:
    """Return the losses of fifty steps of a stage, made as the loop makes them: ``[steps, terms]``."""
    trainee = make_trainee(there, job, made, teachers, training, stage)
    if stage == "training":
        networks._survey(there, job, made, trainee)
    trainee.forward.train()
    losses: list[Tensor] = []
    for epoch, number, batch in islice(_batches(there, job, made, training, stage), STEPS):
        seed = derive_seed(trainee.seed, "step", epoch, number)
        torch.manual_seed(seed)
        progress = (epoch + number / 8) / training.epochs
        losses.append(train_step(trainee, batch, epoch=epoch, progress=progress, seed=seed)[0])
    return torch.stack(losses)


def _batches(
    there: Study, job: Job, made: Assembled, training: TrainingConfig, stage: Stage
) -> Iterator[tuple[int, int, Batch]]:
    loader: TrainLoader = networks._batches(there, job, made, training, stage)
    return chain.from_iterable(
        ((epoch, number, batch) for number, batch in enumerate(loader.epoch(epoch))) for epoch in count()
    )


@cache
def plainly(name: str) -> Trained:
    return trained(name, Path(), channels_last=False)


def assert_same_losses(found: Trained, wanted: Trained, tolerance: float) -> None:
    assert found.losses.keys() == wanted.losses.keys()
    for stage, values in wanted.losses.items():
        assert len(values) == STEPS
        assert values.isfinite().all()
        parted = (found.losses[stage] - values).abs().amax(0) / values.abs().amax(0)
        assert parted.max() <= tolerance, f"{stage}: the terms differ by {parted.tolist()} of their largest values"


LOGITS_ONLY = [
    "assistant", "kd", "kd_standardized", "dkd", "dkd_standardized", "nkd", "dist", "ctkd", "ctkd_standardized", "ttm",
    "wttm", "mlkd", "mlkd_standardized", "rld", "crld", "wkd_logit", "ofa", "dot",
]  # fmt: skip


"""Methods whose teacher's answers are kept."""


@pytest.mark.parametrize("name", METHODS)
def test_channels_last_changes_no_method(name: str) -> None:
    plain, found = plainly(name), trained(name, Path(), channels_last=True)
    assert_same_losses(found, plain, SAME)
    for key, value in plain.weights.items():
        assert torch.allclose(found.weights[key], value, rtol=0, atol=SAME_WEIGHTS), key
    assert plain.keeps == (name in LOGITS_ONLY)


@pytest.mark.parametrize("name", LOGITS_ONLY)
def test_kept_answers_change_no_method(name: str, tmp_path: Path) -> None:
    found = trained(name, tmp_path, kept=True, channels_last=False)
    assert list(tmp_path.rglob("answers.values"))
    assert_same_losses(found, plainly(name), ROUNDED)
    assert not torch.equal(found.losses["training"], plainly(name).losses["training"])
