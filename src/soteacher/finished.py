"""What a finished network leaves: its figures and its row of the results, its card if it is a teacher, its files."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from soteacher.config import FileTeacher, SavedTeacher
from soteacher.diagnostics.card import in_the_whole_split, make_card
from soteacher.environment import environment
from soteacher.files import read_json, write_text
from soteacher.jobs import (
    Job,
    Study,
    evaluation_batches,
    load_finished,
    load_teacher_file,
    restored,
    rows_of,
    teacher_of,
)
from soteacher.kept_epochs import history_of, saved_state
from soteacher.models.classifier import Classifier, NetworkSpec
from soteacher.models.weights import save_classifier, weights_checksum
from soteacher.report.card_page import CARD_FILE, write_card
from soteacher.run_folder import OUT_OF_FOLD, PREDICTIONS
from soteacher.train.evaluate import Evaluation, evaluate

NO_COSTS: dict[str, Any] = dict.fromkeys(
    ("preparation_seconds", "seconds_per_step", "extra_parameters", "peak_memory_bytes")
)
"""Of a network that was not trained here."""


def finish(
    study: Study,
    job: Job,
    classifier: Classifier,
    network: NetworkSpec,
    history: list[dict[str, Any]],
    facts: Mapping[str, Any],
    costs: Mapping[str, Any] | None = None,
) -> None:
    """Evaluate a trained network once more and write it with its row of the results."""
    # As it is when it is loaded: the figures are those that anybody finds again.
    classifier.to(study.device, memory_format=torch.contiguous_format)  # pyright: ignore[reportCallIssue] torch lacks it
    splits = {"test": study.data.test, "train": study.data.train.subset(rows_of(study, job)[0])}
    figures = {name: evaluate(classifier, evaluation_batches(split, study.device)) for name, split in splits.items()}
    row = _row(study, job, network, history, figures, method=facts["method"], parameters=_count(classifier))
    row |= costs or NO_COSTS
    everything = {
        "role": job.role, "arm": job.arm, "seed": job.seed, "row": row, **facts,
        "data": study.config.data.model_dump(mode="json"),
        "environment": environment(study.device, torch.get_num_threads()),
        "reliability": {split: figure.reliability for split, figure in figures.items()},
    }  # fmt: skip
    if job.role == "teacher":
        _write_card(study, job, classifier, network)
    save_classifier(study.folder_of(job), classifier, network, everything)


def lacks_card(study: Study, job: Job) -> bool:
    """Return whether a network is a teacher without a card."""
    return job.role == "teacher" and not (study.folder_of(job) / CARD_FILE).exists()


def write_missing_card(study: Study, job: Job) -> None:
    """Make the card of a teacher that was finished before the study asked for any."""
    classifier, network = load_finished(study, job)
    _write_card(study, job, classifier.to(study.device), network)


def _write_card(study: Study, job: Job, classifier: Classifier, network: NetworkSpec) -> None:
    """Make a teacher's card, if the study wants one; its training images are those that it was trained on."""
    if study.config.card is None:
        return
    rows, out_of_fold = rows_of(study, job)[0], None
    if study.config.folds is not None:
        with np.load(study.folder / OUT_OF_FOLD / PREDICTIONS) as file:
            out_of_fold = torch.from_numpy(file["probabilities"])[rows]
    card = make_card(
        classifier, network, replace(study.data, train=study.data.train.subset(rows)), study.config.data.augment,
        study.config.card, device=study.device, out_of_fold=out_of_fold,
    )  # fmt: skip
    write_card(study.folder_of(job), in_the_whole_split(card, rows))


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
    """Return the line of ``results.json`` for a network.

    The network that is kept is the headline: the last epoch's, unless its training asks for another one by images that
    are held out of training. The best on the test images selects nothing.
    """
    teacher = teacher_of(study.config, job)
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
        "accuracy_best": max(*accuracies, figures["test"].accuracy),
        "accuracy_mean_last_10": sum(accuracies[-10:]) / len(accuracies[-10:]),
        "train_accuracy": figures["train"].accuracy,
        "nll": figures["test"].nll,
        "ece": figures["test"].ece,
        "train_seconds": seconds,
        "images_per_second": images / seconds if seconds else None,
        "parameters": parameters,
    }


def take_saved(study: Study, job: Job, spec: SavedTeacher) -> None:
    """Make a teacher of an earlier state of another one."""
    source = Job("teacher", spec.teacher, job.seed)
    epochs, path = saved_state(study, source, spec)
    folder = study.folder_of(source)
    facts = read_json(folder / "model.json")
    history = history_of(folder)[:epochs]
    network = NetworkSpec(**facts["network"])
    classifier = restored(study, network, path)
    write_lines(study.folder_of(job) / "metrics.jsonl", history)
    kept_facts = {key: facts[key] for key in ("method", "terms", "training")}
    own_facts = {"from": source.arm, "kept_epochs": epochs, "fingerprint": f"{facts['fingerprint']}-after-{epochs}"}
    finish(study, job, classifier, network, history, {**kept_facts, **own_facts})


def take_file(study: Study, job: Job, spec: FileTeacher) -> None:
    """Make a teacher of a file."""
    classifier, network = load_teacher_file(study, spec)
    write_lines(study.folder_of(job) / "metrics.jsonl", [])
    facts = {"method": "file", "fingerprint": weights_checksum(classifier.network)}
    finish(study, job, classifier, network, [], facts)


def _count(classifier: nn.Module) -> int:
    return sum(parameter.numel() for parameter in classifier.parameters())


def write_lines(path: Path, lines: list[dict[str, Any]]) -> None:
    """Write a line of figures for each epoch."""
    write_text(path, "".join(json.dumps(line, allow_nan=False) + "\n" for line in lines))
