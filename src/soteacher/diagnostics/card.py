"""The teacher card: what can be measured of a classifier before any student is trained, in one dictionary."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from soteacher import __version__, metrics
from soteacher.data import AugmentConfig, DataSet
from soteacher.diagnostics.calibration import confidence_histogram
from soteacher.diagnostics.card_config import CardConfig
from soteacher.diagnostics.card_figures import layer_figures, prediction_figures, slope_figures, view_figures_of
from soteacher.diagnostics.label_distribution import most_different
from soteacher.diagnostics.look import MOST_PASSES, Look, sample_of
from soteacher.diagnostics.passes import measured, plain_logits
from soteacher.diagnostics.pictures import png_of
from soteacher.errors import InputError
from soteacher.models.classifier import Classifier, NetworkSpec
from soteacher.models.weights import weights_checksum

__all__ = ["MOST_PASSES", "SCHEMA", "CardConfig", "check_distribution", "in_the_whole_split", "make_card"]

SCHEMA = 1
"""Version of ``card.json``."""


def make_card(
    classifier: Classifier,
    network: NetworkSpec,
    data: DataSet,
    augment: AugmentConfig,
    config: CardConfig,
    *,
    device: torch.device | str,
    out_of_fold: Tensor | None = None,
) -> dict[str, Any]:
    """Return the card of a classifier, as ``card.json`` holds it.

    It costs at most 15 passes over the examples used: the number of images that run through the network, a pass forward
    and back counted as 3, divided by the number of images of both splits that it looks at. Everything is computed in
    evaluation mode and float32, and the classifier is as it was afterwards.

    Args:
        classifier: images in [0, 1] to logits.
        network: what it is, for the card's head.
        data: both splits; what is known of true distributions and right labels is part of them.
        augment: the changes to training images that a view is drawn with.
        config: how closely to look.
        device: where to run the network.
        out_of_fold: ``[N, K]`` probabilities for all training examples by networks that have not seen them: the
            stand-in for their true distribution.

    Returns:
        ``schema``, ``soteacher_version``, ``network``, ``data``, ``sampled`` (how many images were used), ``figures``,
        ``layers``, ``reliability``, ``confidence_histogram``, ``most_different``, ``seconds`` (by group of figures),
        ``passes`` and ``notes``. Equal up to ``seconds`` for equal arguments, on the same machine.

    Raises:
        InputError: the network emits no logits of the data's classes, a split has fewer than two images, or
            ``out_of_fold`` does not fit the training split.
    """
    check_distribution(data, config)
    sample = sample_of(data, config, out_of_fold)
    look = Look(data=data, sample=sample, config=config, device=torch.device(device))
    with measured(classifier, device) as (ready, counter):
        with look.timed("predictions"):
            logits = {
                name: plain_logits(ready, split, device, data.num_classes) for name, split in sample.splits.items()
            }
        with look.timed("views"):
            views, augmented = view_figures_of(look, ready, augment)
        figures: dict[str, Any] = prediction_figures(look, {**logits, "train_augmented": augmented})
        figures["views"] = views
        layers, products, weights = layer_figures(look, ready, counter)
        figures["lipschitz"] = products | slope_figures(look, ready, counter)
        figures["weights"] = weights
    histograms = {name: confidence_histogram(logits[name]) for name in sample.splits}
    return {
        "schema": SCHEMA,
        "soteacher_version": __version__,
        "network": {
            "model": network.model, "num_classes": data.num_classes,
            "parameters": sum(parameter.numel() for parameter in classifier.parameters()),
            "checksum": weights_checksum(classifier.network),
        },
        "data": {
            "name": data.name, "checksum": data.checksum, "class_names": list(data.class_names),
            "train_examples": data.train.num_examples, "test_examples": data.test.num_examples,
        },
        "sampled": look.sampled | {"seed": config.seed},
        "figures": figures,
        "layers": layers,
        "reliability": {
            name: metrics.reliability_bins(logits[name], split.labels) for name, split in sample.splits.items()
        },
        "confidence_histogram": {name: shares for name, (shares, _) in histograms.items()}
        | {"edges": histograms["test"][1]},
        "most_different": _most_different(look, logits),
        "seconds": look.seconds,
        "passes": counter.images / sample.num_examples,
        "notes": look.notes,
    }  # fmt: skip


def _most_different(look: Look, logits: dict[str, Tensor]) -> list[dict[str, Any]]:
    """Return the examples of each split whose prediction differs most from their known distribution."""
    found: list[dict[str, Any]] = []
    with look.timed("most_different"):
        for name, split in look.sample.splits.items():
            truth = split.label_distribution
            if truth is None and name == "train" and look.sample.out_of_fold is not None:
                truth = look.sample.out_of_fold
                look.notes.append("the distributions of the training images shown are out-of-fold predictions")
            if truth is None:
                continue
            rows, distances = most_different(logits[name], truth, count=look.config.most_different)
            for row, distance in zip(rows.tolist(), distances.tolist(), strict=True):
                found.append(
                    {
                        "split": name,
                        "row": int(look.sample.rows[name][row]),
                        "label": int(split.labels[row]),
                        "prediction": logits[name][row].softmax(dim=0).tolist(),
                        "distribution": truth[row].tolist(),
                        "distance": distance,
                        "png": png_of(split, row),
                    }
                )
    return found


def in_the_whole_split(card: dict[str, Any], rows: Tensor) -> dict[str, Any]:
    """Return a card whose training images are called by their rows in the whole split.

    Args:
        card: made of a part of the training split.
        rows: ``[N]`` the rows of that part.
    """
    entries = [
        {**entry, "row": int(rows[entry["row"]])} if entry["split"] == "train" else entry
        for entry in card["most_different"]
    ]
    return {**card, "most_different": entries}


def check_distribution(data: DataSet, config: CardConfig) -> None:
    """Make sure that the label distributions that a card must have the distance to are known.

    Raises:
        InputError: one is not; the split is named.
    """
    for name, split in (("train", data.train), ("test", data.test)):
        if name in config.require_distribution and split.label_distribution is None:
            raise InputError(
                f"the card is to have the distance to the true label distribution of the {name} images, and "
                f"{data.name} comes without one; leave {name} out of card.require_distribution, or choose other data"
            )
