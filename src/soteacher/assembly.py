"""A network and its loss, put together from a study's settings, before anything is trained."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from soteacher.config import Student, TrainedTeacher, terms_of
from soteacher.errors import InputError
from soteacher.jobs import Study, new_classifier
from soteacher.models.classifier import Classifier, NetworkSpec
from soteacher.models.inspection import inspect_network
from soteacher.objective import ObjectiveConfig, Stage, Term
from soteacher.randomness import derive_seed
from soteacher.types import NetworkFacts, Task, View


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

    def views(self) -> tuple[View, ...]:
        """Return the further views of each image that any term reads."""
        return tuple(sorted({view for term in self.terms.values() for view in term.objective.views}))

    def extra_parameters(self) -> int:
        """Return how many trained numbers the terms have of their own: they are gone when the network is."""
        return sum(
            parameter.numel()
            for term in self.terms.values()
            for parameter in term.objective.parameters()
            if parameter.requires_grad
        )


def assemble(
    study: Study, spec: TrainedTeacher | Student, *, role: str, seed: int, teacher: Classifier | None, teacher_name: str
) -> Assembled:
    """Build a network and its objectives; shapes are inspected here, so that what does not fit fails here.

    Args:
        study: gives the data and the networks.
        spec: the network's settings.
        role: ``teacher`` or ``student``.
        seed: arms of one seed start from the same weights.
        teacher: the student's, where it has one; trained or not.
        teacher_name: how messages call it: ``teacher wrn_40_2``.

    Raises:
        InputError: a network cannot take the data, or an objective cannot work with the networks.
    """
    torch.manual_seed(derive_seed(seed, role, "weights"))
    classifier, network = new_classifier(study, spec.model, pretrained=spec.pretrained)
    configs = terms_of(spec)
    facts = {"network": look_at(study, classifier, f"{role} {spec.model}")}
    if teacher is not None:
        facts["teacher"] = look_at(study, teacher, teacher_name)
    data = study.data
    task = Task(num_examples=data.train.num_examples, num_classes=data.num_classes, labels=data.train.labels, **facts)
    torch.manual_seed(derive_seed(seed, role, "objectives"))
    terms: dict[str, Term[Any]] = {}
    for name, config in configs.items():
        try:
            terms[name] = config.term(task)
        except InputError as error:
            raise error if str(error).startswith(name) else InputError(f"{name}: {error}") from None
    return Assembled(classifier=classifier, network=network, terms=terms, configs=configs)


def look_at(study: Study, classifier: Classifier, name: str) -> NetworkFacts:
    """Return the shapes of a network's features for the study's images.

    Raises:
        InputError: the network cannot take them, or gives another number of logits than there are classes.
    """
    data = study.data
    device = classifier.mean.device
    images = torch.full((2, data.in_channels, data.image_size, data.image_size), 0.5, device=device)
    try:
        facts = inspect_network(classifier, images, name=name)
    except InputError:
        raise
    except Exception as error:  # what a network asks of its input, each library says in its own words
        raise InputError(f"{name} cannot take images of shape {list(images.shape[1:])}: {error}") from error
    if facts.num_logits != data.num_classes:
        raise InputError(f"{name} gives {facts.num_logits} logits for {data.num_classes} classes")
    return facts
