"""Out-of-fold predictions: what networks say of training examples that they have not seen.

Their mean over an ensemble stands in for the true label distribution of the training examples where nobody knows it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from soteacher.config import StudyConfig
from soteacher.data import DataSet, SourceConfig
from soteacher.diagnostics.card_config import FoldConfig
from soteacher.errors import InputError
from soteacher.files import read_json, replacing, write_json
from soteacher.jobs import Job, NetworkFactory, Study, evaluation_batches, load_finished
from soteacher.models.zoo import check_network
from soteacher.networks import train_network
from soteacher.randomness import generator
from soteacher.run_folder import OUT_OF_FOLD, PREDICTIONS, locked
from soteacher.settings import merge, parse
from soteacher.train.evaluate import predict

FACTS_FILE = "folds.json"
ARM = "fold"

OnFold = Callable[[int, Job, dict[str, Any]], None]
"""Told of the fold, counted from 0, the network that is trained on the others, and its progress."""


def folds_of(labels: Tensor, num_folds: int, seed: int) -> Tensor:
    """Return the fold of each example; folds, and each class in them, differ by one example in size at most.

    Args:
        labels: ``[N]`` class ids.
        num_folds: in 2..N.
        seed: of the draw.

    Returns:
        ``[N]`` int64 in 0..num_folds-1.

    Raises:
        InputError: ``num_folds`` is not in 2..N.
    """
    if not 2 <= num_folds <= len(labels):
        raise InputError(f"{num_folds} folds were asked for; wanted 2 to {len(labels)}, the number of examples")
    shuffled = torch.randperm(len(labels), generator=generator(seed, "folds"))
    by_class = shuffled[labels[shuffled].argsort(stable=True)]
    folds = torch.empty(len(labels), dtype=torch.int64)
    folds[by_class] = torch.arange(len(labels)) % num_folds
    return folds


def check_folds(labels: Tensor, folds: Tensor, class_names: tuple[str, ...]) -> None:
    """Make sure that the networks of every fold see every class.

    Raises:
        InputError: a class is missing among the examples outside a fold.
    """
    num_folds = int(folds.max()) + 1
    for fold in range(num_folds):
        seen = torch.bincount(labels[folds != fold], minlength=len(class_names))
        missing = (seen == 0).nonzero().flatten().tolist()
        if missing:
            count = int((labels == missing[0]).sum())
            raise InputError(
                f"fold {fold + 1} of {num_folds} leaves the class {class_names[missing[0]]!r} out of its networks' "
                f"training: the data has {count} training example{'' if count == 1 else 's'} of it, wanted at least 2"
            )


def out_of_fold_predictions(
    config: FoldConfig,
    source: SourceConfig,
    data: DataSet,
    folder: Path,
    *,
    device: str,
    factories: Mapping[str, NetworkFactory] | None = None,
    on_event: OnFold | None = None,
    should_stop: Callable[[], bool] = lambda: False,
) -> Tensor:
    r"""Return what networks predict for each training example that were not trained on it.

    .. math:: q_i = \frac{1}{R} \sum_{r=1}^{R} \mathrm{softmax}\, z^{(f(i), r)}(x_i)

    with :math:`f(i)` the example's fold and :math:`z^{(f, r)}` the logits of the network of repeat :math:`r` that was
    trained on all folds but :math:`f`. A network of the study's own training is trained for each fold and repeat, into
    ``folder/out_of_fold/foldF/teachers/fold/seedR``. Those that are finished are not trained again, and once all are,
    ``predictions.npz`` is read.

    Args:
        config: of the networks and folds.
        source: the settings that the data came from; networks are trained with its augmentation.
        data: only its training split is used.
        folder: where ``out_of_fold`` is made.
        device: ``cpu`` or ``cuda``.
        factories: networks of the caller's own, by the names that ``config.model`` may have.
        on_event: told of each network's progress.
        should_stop: asked between steps; if it says yes, the training leaves a state to go on from.

    Returns:
        ``[N, K]`` float32 on the CPU, in the order of the training split; rows sum to 1.

    Raises:
        InputError: impossible folds, a fold that leaves a class out, settings that cannot be used, or a folder that
            holds predictions of other data or settings.
        InterruptedRunError: it was asked to stop.

    Source: the mean of networks' held-out predictions as a stand-in for the true label distribution is ours.
    """
    folds = _checked_folds(config, data, factories or {})
    settings, root = _fold_settings(config, source), folder / OUT_OF_FOLD
    with locked(root):
        _claim(root, config, source, data)
        if (root / PREDICTIONS).exists():
            return _read_predictions(root / PREDICTIONS)
        predictions = torch.zeros(len(folds), data.num_classes, dtype=torch.float64)
        for fold in range(config.folds):
            study = _study_without(fold, folds, config, settings, data, root, device, factories or {})
            _train_fold(fold, study, on_event=on_event, should_stop=should_stop)
            predictions[folds == fold] = _mean_probabilities(study)
        with replacing(root / PREDICTIONS) as part, part.open("wb") as file:
            np.savez(file, probabilities=predictions.float().numpy(), checksum=np.array(data.checksum))
        return predictions.float()


def fold_studies(
    config: FoldConfig,
    source: SourceConfig,
    data: DataSet,
    folder: Path,
    device: str,
    factories: Mapping[str, NetworkFactory],
) -> Iterator[Study]:
    """Yield the study that trains each fold's networks; nothing is trained or written.

    One at a time: each holds a copy of its images.

    Raises:
        InputError: impossible folds, a fold that leaves a class out, or settings that cannot be used.
    """
    folds, settings = _checked_folds(config, data, factories), _fold_settings(config, source)
    for fold in range(config.folds):
        yield _study_without(fold, folds, config, settings, data, folder / OUT_OF_FOLD, device, factories)


def _checked_folds(config: FoldConfig, data: DataSet, factories: Mapping[str, NetworkFactory]) -> Tensor:
    """Return the fold of each training example, and make sure that its networks exist and see every class."""
    folds = folds_of(data.train.labels, config.folds, config.seed)
    check_folds(data.train.labels, folds, data.class_names)
    if config.model not in factories:
        check_network(config.model)
    return folds


def _fold_settings(config: FoldConfig, source: SourceConfig) -> StudyConfig:
    """Return the settings of every fold's networks."""
    tree = {
        "name": OUT_OF_FOLD,
        "data": source.model_dump(),
        "seeds": [config.seed + repeat for repeat in range(config.repeats)],
        "training": merge(config.training, {"epochs": config.epochs}),
        "teachers": {ARM: {"model": config.model, "method": "standard"}},
        "card": None,  # nobody looks at these teachers
        "logging": [],
    }
    return parse(StudyConfig, tree, place="folds")


def _study_without(
    fold: int,
    folds: Tensor,
    config: FoldConfig,
    settings: StudyConfig,
    data: DataSet,
    root: Path,
    device: str,
    factories: Mapping[str, NetworkFactory],
) -> Study:
    """Return the study that trains a fold's networks: on the other folds, and tested on this one."""
    outside, inside = (folds != fold).nonzero().flatten(), (folds == fold).nonzero().flatten()
    part = replace(
        data,
        train=data.train.subset(outside),
        test=data.train.subset(inside),
        checksum=f"{data.checksum}-without-fold-{fold}-of-{config.folds}-seed-{config.seed}",
    )
    return Study(settings, root / f"fold{fold}", part, device, factories)


def _train_fold(fold: int, study: Study, *, on_event: OnFold | None, should_stop: Callable[[], bool]) -> None:
    """Train the networks of a fold that are not finished."""

    def tell(job: Job, event: dict[str, Any]) -> None:
        if on_event is not None:
            on_event(fold, job, event)

    for job in _jobs(study):
        if study.finished(job):
            continue
        try:
            train_network(study, job, on_event=tell, should_stop=should_stop)
        except InputError as error:
            raise InputError(f"network without fold {fold + 1}, seed {job.seed}: {error}") from error


def _mean_probabilities(study: Study) -> Tensor:
    """Return the mean of a fold's networks' probabilities for the fold's examples, ``[n, K]`` float64."""
    total: Tensor | None = None
    jobs = _jobs(study)
    for job in jobs:
        classifier = load_finished(study, job)[0].to(study.device)
        logits, _ = predict(classifier, evaluation_batches(study.data.test, study.device))
        probabilities = logits.cpu().double().softmax(dim=1)
        total = probabilities if total is None else total + probabilities
    assert total is not None, "there is at least one repeat"
    return total / len(jobs)


def _jobs(study: Study) -> list[Job]:
    return [Job("teacher", ARM, seed) for seed in study.config.seeds]


def _claim(root: Path, config: FoldConfig, source: SourceConfig, data: DataSet) -> None:
    """Note what the folder's networks are trained on and how, or make sure that it is what they were.

    Raises:
        InputError: the folder holds networks of other data or settings.
    """
    facts = {"data": data.checksum, "augment": source.augment.model_dump(mode="json"), **config.model_dump(mode="json")}
    facts = json.loads(json.dumps(facts))
    path = root / FACTS_FILE
    if not path.exists():
        write_json(path, facts)
        return
    before = read_json(path)
    for key, value in facts.items():
        if before.get(key) != value:
            raise InputError(
                f"{root} holds out-of-fold predictions of another kind: {key} was {before.get(key)}, and is {value} "
                "now; choose another folder"
            )


def _read_predictions(path: Path) -> Tensor:
    with np.load(path, allow_pickle=False) as file:
        return torch.from_numpy(file["probabilities"])
