"""A network and its loss, put together from a study's settings, before anything is trained."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from soteacher.config import Student, TrainedTeacher, terms_of
from soteacher.errors import InputError
from soteacher.jobs import Study, new_classifier, split_rows
from soteacher.models.classifier import Classifier, NetworkSpec
from soteacher.models.inspection import inspect_network
from soteacher.models.parts import Parts
from soteacher.models.takeover import take_over_classifier
from soteacher.objective import ObjectiveConfig, ReusedClassifier, Stage, Term
from soteacher.randomness import derive_seed
from soteacher.types import BuiltNetwork, NetworkFacts, Task, View


@dataclass(frozen=True, slots=True, kw_only=True)
class Assembled:
    """A network with its first weights and the terms of its loss."""

    classifier: Classifier
    network: NetworkSpec
    terms: Mapping[str, Term[Any]]
    """By name."""
    configs: Mapping[str, ObjectiveConfig]
    """Their settings."""

    def stage(self, stage: Stage) -> tuple[Term[Any], ...]:
        """Return the terms of one stage."""
        return tuple(self.terms[name] for name, config in self.configs.items() if config.stage == stage)

    def reads_teacher(self, stage: Stage) -> bool:
        """Return whether any term of a stage reads the teacher."""
        return any(config.needs_teacher for config in self.configs.values() if config.stage == stage)

    def teacher_features(self, stage: Stage) -> set[str]:
        """Return the teacher's features that any term of a stage reads."""
        return {name for term in self.stage(stage) for name in term.objective.teacher_features}

    def views(self, stage: Stage) -> tuple[View, ...]:
        """Return the further views of each image that any term of a stage reads."""
        return tuple(sorted({view for term in self.stage(stage) for view in term.objective.views}))

    def start_training(self) -> None:
        """Hand what the preparation has made over to the objectives of the training.

        Raises:
            InputError: an objective misses a preparation.
        """
        prepared = {term.objective.name: term.objective for term in self.stage("preparation")}
        for term in self.stage("training"):
            term.objective.start(prepared)

    def extra_parameters(self) -> int:
        """Return how many trained numbers the terms have of their own: they are gone when the network is."""
        return sum(
            parameter.numel()
            for term in self.terms.values()
            for parameter in term.objective.parameters()
            if parameter.requires_grad
        )


def assemble(
    study: Study,
    spec: TrainedTeacher | Student,
    *,
    role: str,
    seed: int,
    teacher: Classifier | None,
    teacher_name: str,
    start: tuple[Classifier, NetworkSpec] | None = None,
) -> Assembled:
    """Build a network and its objectives; shapes are inspected here, so that what does not fit fails here.

    Args:
        study: gives the data and the networks.
        spec: the network's settings.
        role: ``teacher`` or ``student``.
        seed: arms of one seed start from the same weights.
        teacher: the student's, where it has one; trained or not.
        teacher_name: how messages call it: ``teacher wrn_40_2``.
        start: the trained network that it goes on from, where it does; changed by the training.

    Raises:
        InputError: a network cannot take the data, or an objective cannot work with the networks.
    """
    configs, names = terms_of(spec), (f"{role} {spec.model}", teacher_name)
    reuse = _reuse(configs)
    torch.manual_seed(derive_seed(seed, role, "weights"))
    classifier, network = start or new_classifier(study, spec.model, pretrained=spec.pretrained)
    facts = {"network": look_at(study, classifier, names[0])}
    if teacher is not None:
        facts["teacher"] = look_at(study, teacher, teacher_name)
        if reuse is not None:  # its weights are drawn after the network's: those are the same as in the other arms
            network = _with_taken_classifier(study, classifier, network, teacher, reuse, names)
            facts["network"] = look_at(study, classifier, names[0])
    data = study.data
    task = Task(
        num_examples=data.train.num_examples, num_classes=data.num_classes, labels=data.train.labels,
        rows=split_rows(data, study.config.training_of(spec).held_out, seed)[0],
        build_network=lambda model: _beside(study, model), **facts,
    )  # fmt: skip
    torch.manual_seed(derive_seed(seed, role, "objectives"))
    terms: dict[str, Term[Any]] = {}
    for name, config in configs.items():
        try:
            terms[name] = config.term(task)
        except InputError as error:
            raise error if str(error).startswith(name) else InputError(f"{name}: {error}") from None
    return Assembled(classifier=classifier, network=network, terms=terms, configs=configs)


def _beside(study: Study, model: str) -> BuiltNetwork:
    """Return a network with new weights that an objective trains beside the study's own."""
    classifier = new_classifier(study, model, pretrained=False)[0]
    return BuiltNetwork(classifier=classifier, parts=Parts(classifier), facts=look_at(study, classifier, model))


def _reuse(configs: Mapping[str, ObjectiveConfig]) -> tuple[str, ReusedClassifier] | None:
    """Return how the network takes over the teacher's classifier, with the term that wants it.

    Raises:
        InputError: more than one term wants it.
    """
    wanted = [(name, reuse) for name, config in configs.items() if (reuse := config.reuse()) is not None]
    if len(wanted) > 1:
        names = " and ".join(name for name, _ in wanted)
        raise InputError(f"the terms {names} each put the teacher's classifier into the student; leave one of them")
    return wanted[0] if wanted else None


def _with_taken_classifier(
    study: Study,
    classifier: Classifier,
    network: NetworkSpec,
    teacher: Classifier,
    reuse: tuple[str, ReusedClassifier],
    names: tuple[str, str],
) -> NetworkSpec:
    """Let a network end in its teacher's classifier, and return what builds it again."""
    term, how = reuse
    images = examples_of(study, classifier)
    try:
        reused = take_over_classifier(classifier, teacher, images, reduction=how.reduction, names=names)
    except InputError as error:
        raise InputError(f"{term}: {error}") from None
    return network.model_copy(update={"reused": reused})


def look_at(study: Study, classifier: Classifier, name: str) -> NetworkFacts:
    """Return the shapes of a network's features for the study's images.

    Raises:
        InputError: the network cannot take them, or gives another number of logits than there are classes.
    """
    data, images = study.data, examples_of(study, classifier)
    try:
        facts = inspect_network(classifier, images, name=name)
    except InputError:
        raise
    except Exception as error:  # what a network asks of its input, each library says in its own words
        raise InputError(f"{name} cannot take images of shape {list(images.shape[1:])}: {error}") from error
    if facts.num_logits != data.num_classes:
        raise InputError(f"{name} gives {facts.num_logits} logits for {data.num_classes} classes")
    return facts


def examples_of(study: Study, classifier: Classifier) -> torch.Tensor:
    """Return two images of the study's shape, on the network's device."""
    data = study.data
    shape = (2, data.in_channels, data.image_size, data.image_size)
    return torch.full(shape, 0.5, device=classifier.mean.device)
