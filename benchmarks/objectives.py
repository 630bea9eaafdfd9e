"""What do the objectives themselves cost? Times each beside the field's way of writing it, networks left out.

The features of a student and a teacher for one batch of random images are computed once. Then our objective and its
counterpart of :mod:`benchmarks.field_losses` take turns: the loss, its gradients by features, logits and layers of the
objective, and what it remembers of the step. Of the field's ``crd`` the draw of negatives on the host is a part, which
loaders do in other processes while there are cores for them; ``crd, given negatives`` leaves it out, of the field's
way only.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, cast

import torch
from torch import Tensor, nn

from benchmarks import field_losses
from benchmarks.timing import alternate, arguments, checked, ratio, record, run, spread, table
from soteacher.models.classifier import Classifier
from soteacher.models.inspection import inspect_network
from soteacher.models.taps import Tapped, resolve_taps
from soteacher.models.zoo import build_network
from soteacher.objective import Objective
from soteacher.objectives import objective_config
from soteacher.objectives.features import as_maps
from soteacher.types import DistillStep, Outputs, Task

CLASSES, EXAMPLES = 100, 50_000
"""CIFAR-100's training set, as far as memories are concerned."""
LEAST_SECONDS = 0.01
"""A counted call repeats what is shorter than this until it is not."""
GIVEN = "crd, given negatives"

Loss = Callable[[DistillStep], Tensor]


@dataclass(frozen=True, slots=True, kw_only=True)
class Counterpart:
    """The field's way of computing an objective."""

    loss: Loss
    """A step to the scalar; what has a memory takes the step in."""
    layers: nn.Module = field(default_factory=nn.Module)
    """What is trained with the student."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Material:
    """What losses are computed from: a student's and a teacher's features of one batch, and the facts about both."""

    task: Task
    step: DistillStep

    def leaves(self) -> list[Tensor]:
        """Return what gradients are computed for, besides an objective's own layers."""
        outputs = self.step.outputs
        return [outputs.logits, *outputs.features.values(), *self.step.model.parameters()]

    def channels_last(self) -> Material:
        """Return the same with the features in the layout in which our training on the CPU has them."""
        outputs, teacher = (_channels_last(side) for side in (self.step.outputs, self.step.teacher))
        return replace(self, step=replace(self.step, outputs=outputs, teacher=teacher))


def _channels_last(outputs: Outputs) -> Outputs:
    features = {
        tap: value.detach().contiguous(memory_format=torch.channels_last).requires_grad_(value.requires_grad)
        if value.ndim == 4
        else value
        for tap, value in outputs.features.items()
    }
    return Outputs(logits=outputs.logits, features=features)


def make_material(
    student: str, teacher: str, *, batch_size: int, num_examples: int = EXAMPLES, num_classes: int = CLASSES
) -> Material:
    """Return the features that two untrained networks have of random images of CIFAR's size.

    Args:
        student: name of a network.
        teacher: name of another one; it is the network in training of objectives that train teachers.
        batch_size: B.
        num_examples: N of the training set that the batch is from.
        num_classes: K.
    """
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(batch_size, 3, 32, 32, generator=generator)
    labels = torch.randint(0, num_classes, (num_examples,), generator=generator)
    indices = torch.randperm(num_examples, generator=generator)[:batch_size]
    networks = {name: _network(name, num_classes, seed) for seed, name in enumerate((student, teacher))}
    facts = {name: inspect_network(network, images[:2], name=name) for name, network in networks.items()}
    own, wanted = (_outputs(networks[name], images, list(facts[name].taps)) for name in (student, teacher))
    for leaf in (own.logits, *own.features.values()):
        leaf.requires_grad_()
    step = DistillStep(
        images=images, labels=labels[indices], indices=indices, outputs=own, model=networks[teacher].network,
        epoch=1, num_epochs=4, progress=0.25, teacher=wanted,
    )  # fmt: skip
    task = Task(
        num_examples=num_examples, num_classes=num_classes, labels=labels, network=facts[student],
        teacher=facts[teacher],
    )  # fmt: skip
    return Material(task=task, step=step)


def _network(name: str, num_classes: int, seed: int) -> Classifier:
    torch.manual_seed(seed)
    return Classifier(build_network(name, num_classes=num_classes), mean=(0.5,) * 3, std=(0.25,) * 3).eval()


@torch.no_grad()
def _outputs(network: Classifier, images: Tensor, taps: Sequence[str]) -> Outputs:
    tapped = Tapped(network, resolve_taps(network, taps))
    try:
        logits, features = tapped(images)
    finally:
        tapped.close()
    return Outputs(logits=logits.clone(), features={name: value.clone() for name, value in features.items()})


def counterpart(objective: Any, task: Task, *, negatives: Tensor | None = None) -> Counterpart:
    """Return the field's way of computing an objective, with the weights and memories that the objective has now.

    Args:
        objective: ours, by one of the names in :data:`COMPARED`.
        task: what it was built for.
        negatives: ``[B, M]`` rows that ``crd`` takes in every step; its own draw if ``None``.
    """
    name: str = objective.name
    if name == "crd":
        return _crd(objective, task, negatives)
    if name in LAYERS:
        return LAYERS[name](objective)
    if name == "consistency":
        memory = field_losses.Consistency(task.num_examples, task.num_classes)
        return Counterpart(loss=lambda step: memory(step.outputs.logits, step.indices))
    return Counterpart(loss=lambda step: PLAIN[name](objective, step))


def _both(objective: Any, step: DistillStep) -> tuple[list[Tensor], list[Tensor]]:
    """Return the features that an objective compares: the student's and the teacher's."""
    own = [step.outputs.features[tap] for tap in objective.features]
    return own, [step.teacher.features[tap] for tap in objective.teacher_features]


def _pair(objective: Any, step: DistillStep) -> tuple[Tensor, Tensor]:
    (own,), (wanted,) = _both(objective, step)
    return own, wanted


def _logits(step: DistillStep) -> tuple[Tensor, Tensor]:
    return step.outputs.logits, step.teacher.logits


def _settings(objective: Any, *names: str) -> dict[str, Any]:
    return {name: getattr(objective.config, name) for name in names}


PLAIN: dict[str, Callable[[Any, DistillStep], Tensor]] = {
    "kd": lambda ours, step: field_losses.kd(*_logits(step), **_settings(ours, "temperature")),
    "dkd": lambda ours, step: field_losses.dkd(
        *_logits(step), step.labels, **_settings(ours, "temperature", "target_weight", "non_target_weight")
    ),
    "dist": lambda ours, step: field_losses.dist(
        *_logits(step), **_settings(ours, "temperature", "inter_class_weight", "intra_class_weight")
    ),
    "attention": lambda ours, step: field_losses.attention(*_both(ours, step)),
    "nst": lambda ours, step: field_losses.nst(*_both(ours, step)),
    "similarity": lambda ours, step: field_losses.similarity(*_pair(ours, step)),
    "rkd": lambda ours, step: field_losses.rkd(
        *_pair(ours, step), **_settings(ours, "distance_weight", "angle_weight")
    ),
    "pkt": lambda ours, step: field_losses.pkt(*_pair(ours, step)),
    "lipschitz": lambda _, step: field_losses.lipschitz(step.model),
}
"""Losses without layers or memories of their own."""


def _correlation(ours: Any) -> Counterpart:
    embeddings = ours.student_embeddings[0], ours.teacher_embeddings[0]
    loss = field_losses.Correlation(*(layer.in_features for layer in embeddings), dimension=embeddings[0].out_features)
    _copy_parameters(ours, loss)
    return Counterpart(loss=lambda step: loss(*_pair(ours, step)), layers=loss)


def _fitnet(ours: Any) -> Counterpart:
    loss = field_losses.FitNet(ours.pairs[0].student_shape[0], ours.pairs[0].teacher_shape[0])
    _copy_parameters(ours, loss)
    return Counterpart(loss=lambda step: loss(*_pair(ours, step)), layers=loss)


def _vid(ours: Any) -> Counterpart:
    losses = nn.ModuleList(field_losses.VID(pair.student_shape[0], pair.teacher_shape[0]) for pair in ours.pairs)
    for loss, regressor in zip(losses, ours.regressors, strict=True):
        _copy_parameters(regressor, cast("field_losses.VID", loss).regressor)

    def total(step: DistillStep) -> Tensor:
        stages = [loss(*maps) for loss, *maps in zip(losses, *_both(ours, step), strict=True)]
        return torch.stack(stages).sum()

    return Counterpart(loss=total, layers=losses)


def _review(ours: Any) -> Counterpart:
    channels = [[shape[0] for shape in (pair.student_shape, pair.teacher_shape)] for pair in ours.pairs]
    own, wanted = zip(*channels, strict=True)
    loss = field_losses.Review(own, wanted, channels=min(ours.config.most_channels, own[-1]))
    _copy_parameters(ours, loss)

    def levels(step: DistillStep) -> Tensor:
        return loss(*([as_maps(feature) for feature in side] for side in _both(ours, step)))

    return Counterpart(loss=levels, layers=loss)


LAYERS: dict[str, Callable[[Any], Counterpart]] = {
    "correlation": _correlation, "fitnet": _fitnet, "vid": _vid, "review": _review,
}  # fmt: skip
"""Losses with layers of their own, which are given the weights of ours."""


def _crd(ours: Any, task: Task, negatives: Tensor | None) -> Counterpart:
    assert task.labels is not None, "crd was built with them"
    settings = _settings(ours, "embedding_size", "num_negatives", "temperature", "momentum")
    sizes = ours.student_embedding.in_features, ours.teacher_embedding.in_features
    loss = field_losses.CRD(task.labels.numpy(), *sizes, **settings)
    _copy_parameters(ours, loss)
    loss.student_memory.copy_(ours.student_memory)
    loss.teacher_memory.copy_(ours.teacher_memory)

    def contrast(step: DistillStep) -> Tensor:
        drawn = loss.draw(step.labels) if negatives is None else negatives
        return loss(*_pair(ours, step), step.indices, drawn)

    return Counterpart(loss=contrast, layers=loss)


@torch.no_grad()
def _copy_parameters(ours: nn.Module, theirs: nn.Module) -> None:
    for own, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        other.copy_(own)


COMPARED = (*PLAIN, *LAYERS, "crd", GIVEN, "consistency")


def main() -> None:
    """Measure, print a table and write the numbers to a JSON file if one is named."""
    given = _arguments()
    material = make_material(given.student, given.teacher, batch_size=given.batch_size)
    ours = material.channels_last() if given.channels_last else material
    found = {name: measure(name, material, ours, rounds=given.rounds) for name in given.objectives}
    pair = f"{given.teacher} -> {given.student}"
    table(
        f"{pair}, batch {given.batch_size}: loss, gradients and memory, {given.threads} thread(s) of the CPU",
        ["objective", "the field's, ms", "ours, ms", "times as fast (quartiles)"],
        [
            [name, *(f"{figures['milliseconds'][way]:.2f}" for way in ("field", "ours")), spread(figures["ratio"])]
            for name, figures in found.items()
        ],
        caption="medians",
    )
    settings = {
        "pair": pair, "batch_size": given.batch_size, "rounds": given.rounds, "channels_last": given.channels_last,
    }  # fmt: skip
    record(given.json, settings=settings, results={"objectives": found}, threads=given.threads)


def measure(name: str, material: Material, ours: Material, *, rounds: int) -> dict[str, Any]:
    """Return the median milliseconds of both ways, and how many times as fast ours is, pair by pair.

    Args:
        name: one of :data:`COMPARED`.
        material: what the field's loss is computed from.
        ours: what ours is computed from: the same, maybe in another layout.
        rounds: counted calls of each.
    """
    torch.manual_seed(0)
    objective = objective_config("crd" if name == GIVEN else name)().build(material.task)
    ways = {"field": _field_call(name, objective, material), "ours": _our_call(objective, ours)}
    repeats = max(1, round(LEAST_SECONDS / min(_second_call(call) for call in ways.values())))
    seconds = alternate({way: _repeated(call, repeats) for way, call in ways.items()}, rounds=rounds)
    return {
        "milliseconds": {way: 1000 * statistics.median(times) / repeats for way, times in seconds.items()},
        "ratio": ratio(seconds, "field", "ours"),
    }


def _field_call(name: str, objective: Any, material: Material) -> Callable[[], None]:
    labels = material.step.labels
    size = (len(labels), objective.config.num_negatives) if name == GIVEN else ()
    negatives = torch.randint(material.task.num_examples, size) if name == GIVEN else None
    theirs = counterpart(objective, material.task, negatives=negatives)
    leaves = [*material.leaves(), *theirs.layers.parameters()]

    def call() -> None:
        theirs.loss(material.step).backward()
        _forget(leaves)

    return call


def _our_call(objective: Objective[Any], material: Material) -> Callable[[], None]:
    leaves = [*material.leaves(), *objective.parameters()]

    def call() -> None:
        objective(material.step).backward()
        objective.update(material.step)
        _forget(leaves)

    return call


def _forget(leaves: Sequence[Tensor]) -> None:
    for leaf in leaves:
        leaf.grad = None


def _second_call(call: Callable[[], None]) -> float:
    """Return the seconds of a call that is not the first."""
    call()
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def _repeated(call: Callable[[], None], times: int) -> Callable[[], None]:
    def calls() -> None:
        for _ in range(times):
            call()

    return calls


def _arguments() -> argparse.Namespace:
    parser = arguments(__doc__, rounds=20)
    parser.add_argument("--teacher", default="wrn_40_2", help="name of the teacher's network")
    parser.add_argument("--student", default="wrn_16_2", help="name of the student's network")
    parser.add_argument("--objectives", nargs="+", default=COMPARED, metavar="OBJECTIVE", choices=COMPARED)
    parser.add_argument(
        "--channels-last", action="store_true", help="give ours its features in the layout of our training on the CPU"
    )
    return checked(parser)


if __name__ == "__main__":
    run(main)
