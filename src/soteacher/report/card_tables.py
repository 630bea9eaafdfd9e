"""A teacher card's numbers as tables of text, each figure with a line that says what it is."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from soteacher.report.tables import Table, percent

SECTIONS = {"train": "train", "train_augmented": "train, augmented", "test": "test"}
DISTANCE_SECTIONS = {**SECTIONS, "train_out_of_fold": "train, to out-of-fold predictions"}


def figure(value: float | None) -> str:
    """Return a number with four significant digits, zeros at the end included; ``-`` for None."""
    if value is None:
        return "-"
    if value == 0 or not math.isfinite(value):
        return f"{value:g}"
    text = f"{value:.3e}"
    place = int(text[text.index("e") + 1 :])  # of the first digit, once it is rounded
    return f"{value:.{max(0, 3 - place)}f}" if -4 <= place < 4 else text


@dataclass(frozen=True, slots=True)
class Figure:
    """One figure of a card in words."""

    key: str
    """Where it is in its section of the card; after a dot, where it is in the section of that name."""
    label: str
    meaning: str
    write: Callable[[float | None], str] = figure


CALIBRATED = "with the temperature that the other half of the images fits best"
PREDICTIONS = (
    Figure("accuracy", "accuracy, %", "images whose most probable class is their label", percent),
    Figure(
        "accuracy_clean", "accuracy on right labels, %", "the same for the right labels, where theirs are not", percent
    ),
    Figure("confidence", "confidence, %", "mean probability of the most probable class", percent),
    Figure("entropy", "entropy, nats", "mean entropy of a prediction: 0 is certain, more tells students more"),
    Figure("nll", "NLL, nats", "mean of minus the log-probability of the label; lower is better"),
    Figure("nll_calibrated", "NLL, calibrated, nats", CALIBRATED),
    Figure("brier", "Brier score", "mean squared distance of a prediction from its label, 0 to 2; lower is better"),
    Figure("brier_calibrated", "Brier score, calibrated", CALIBRATED),
    Figure("ece", "ECE", "mean gap of confidence and accuracy over 15 equal bins; lower is better"),
    Figure("ece_calibrated", "ECE, calibrated", CALIBRATED),
    Figure("adaptive_ece", "adaptive ECE", "the same over 15 bins of equally many images"),
    Figure("adaptive_ece_calibrated", "adaptive ECE, calibrated", CALIBRATED),
    Figure(
        "conditional_mutual_information", "conditional information, nats",
        "what a prediction tells of an image beyond its class: mean divergence from the class's mean prediction",
    ),
    Figure(
        "temperature", "fitted temperature",
        "the one that fits all these images best; above 1: the network was too sure",
    ),
)  # fmt: skip
DISTANCES = (
    Figure("mse", "squared distance", "mean squared distance of prediction and distribution, 0 to 2"),
    Figure("kl", "KL divergence, nats", "mean divergence of the prediction from the distribution"),
    Figure("total_variation", "total variation", "mean share of the probability that would have to move, 0 to 1"),
)
SINGLE = (
    Figure("views.prediction_variance", "prediction variance", "how much predictions change from view to view"),
    Figure(
        "views.feature_variance", "feature variance",
        "the same of the features, as a share of how far images lie apart",
    ),
    Figure(
        "views.true_class_stddev", "true-class deviation",
        "standard deviation over views of the mean probability of the label",
    ),
    Figure(
        "lipschitz.log10_product_1", "product of norms, 1-norm, log10",
        "of all layers, each with its batch norm; to compare networks of one architecture by",
    ),
    Figure("lipschitz.log10_product_2", "product of norms, 2-norm, log10", "the same of spectral norms"),
    Figure(
        "lipschitz.input_gradient_mean", "input gradient, mean, nats per unit of image distance",
        "how fast the label's log-probability changes with the image, whose values lie in 0 to 1; Euclidean distance",
    ),
    Figure(
        "lipschitz.input_gradient_95", "input gradient, 95th percentile, nats per unit of image distance",
        "one image in twenty has a steeper one",
    ),
    Figure(
        "lipschitz.largest_slope", "largest slope found, change of logits per unit of image distance",
        "change of the logits over change of the image, by an adversarial search: a lower bound",
    ),
    Figure("weights.near_zero", "near-zero weights, %", "weights that hardly count in their layer", percent),
    Figure("weights.dead_channels", "dead channels, %", "channels that put out the same for every image", percent),
)  # fmt: skip
MOST_ZERO_NORMS = 6
"""Layers of norm 0 that are named; the others are counted."""
GROUPS = {
    "predictions": "both splits through the network, as they are",
    "views": "the training images through it, augmented, once for each view",
    "calibration": "calibration, with temperatures fitted",
    "information": "conditional information",
    "distance": "distances to label distributions",
    "layer_norms": "norms of the layers",
    "input_gradient": "gradients of the images",
    "slope": "search for the largest slope",
    "weights": "near-zero and dead weights",
    "most_different": "images that differ most",
}


def prediction_table(card: Mapping[str, Any]) -> Table:
    """Return the figures of predictions: a line each, a column for each way of looking at the data."""
    figures, rows = card["figures"], list[tuple[str, ...]]()
    for one in PREDICTIONS:
        if one.key == "temperature":
            values = {name: {"temperature": value} for name, value in figures["temperature"].items()}
        else:
            values = figures
        if any(one.key in values.get(name, {}) for name in SECTIONS):
            cells = [one.write(values.get(name, {}).get(one.key)) for name in SECTIONS]
            rows.append((one.label, *cells, one.meaning))
    return Table(
        columns=("figure", *SECTIONS.values(), "what it is"), rows=tuple(rows), numeric=(False, *[True] * 3, False)
    )


def distance_table(card: Mapping[str, Any]) -> Table:
    """Return the distances to label distributions, a column for each that is known; no rows where none is."""
    known = card["figures"].get("distance", {})
    shown = {name: label for name, label in DISTANCE_SECTIONS.items() if name in known}
    rows = [
        (one.label, *(one.write(known[name].get(one.key)) for name in shown), one.meaning) for one in DISTANCES if shown
    ]
    return Table(
        columns=("distance", *shown.values(), "what it is"),
        rows=tuple(rows),
        numeric=(False, *[True] * len(shown), False),
    )


def single_table(card: Mapping[str, Any]) -> Table:
    """Return the figures that are one number for the network: of views, of smoothness and of weights."""
    rows: list[tuple[str, ...]] = []
    for one in SINGLE:
        section, _, key = one.key.partition(".")
        rows.append((one.label, one.write(card["figures"].get(section, {}).get(key)), one.meaning))
    return Table(columns=("figure", "value", "what it is"), rows=tuple(rows), numeric=(False, True, False))


def zero_norms(card: Mapping[str, Any]) -> str:
    """Return which layers have norm 0, and so why a product has no logarithm; nothing where none has."""
    zero = [one for one in card["layers"] if 0 in (one["norm_1"], one["norm_2"])]
    if not zero:
        return ""
    names = ", ".join(one["layer"] for one in zero[:MOST_ZERO_NORMS])
    more = f" and {len(zero) - MOST_ZERO_NORMS} more" if len(zero) > MOST_ZERO_NORMS else ""
    whose, layers = ("its", "1 layer has") if len(zero) == 1 else ("their", f"{len(zero)} layers have")
    batch_norms = sum(one["batch_norm"] is not None for one in zero)
    reason = {0: f"{whose} weights are 0", len(zero): f"{whose} batch norm scales with 0"}.get(
        batch_norms, "their weights are 0, or their batch norm scales with 0"
    )
    return f"{layers} norm 0 ({names}{more}): {reason}, so the product is 0 and has no logarithm."


def seconds_table(card: Mapping[str, Any]) -> Table:
    """Return what each group of figures took."""
    seconds: dict[str, float] = card["seconds"]
    rows = [(GROUPS.get(group, group), f"{taken:.2f}") for group, taken in seconds.items()]
    return Table(columns=("figures", "seconds"), rows=tuple(rows), numeric=(False, True))


def cost_sentence(card: Mapping[str, Any]) -> str:
    """Return one line with the card's whole cost."""
    sampled = card["sampled"]
    total = sum(card["seconds"].values())
    return (
        f"{card['passes']:.1f} evaluation passes over {sampled['train'] + sampled['test']:,} images in {total:.1f} "
        "seconds; a pass forward and back counts as three"
    )
