"""The groups of figures of a teacher card, each measured on what a :class:`~soteacher.diagnostics.look.Look` holds."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from soteacher import metrics
from soteacher.data import AugmentConfig, ImageSplit
from soteacher.diagnostics.calibration import calibration_figures, fit_temperature
from soteacher.diagnostics.consistency import ViewFigures, conditional_mutual_information
from soteacher.diagnostics.label_distribution import distribution_distances
from soteacher.diagnostics.lipschitz import (
    LayerNorm,
    input_gradient_norms,
    largest_slope,
    layer_norms,
    log10_products,
)
from soteacher.diagnostics.look import MOST_PASSES, Look, affordable, batches_of, first_image
from soteacher.diagnostics.passes import PassCounter, has_pooled_features, running_modules, seen_views
from soteacher.diagnostics.weights import weight_figures
from soteacher.errors import InputError
from soteacher.models.classifier import Classifier
from soteacher.models.composition import Composition
from soteacher.randomness import derive_seed

GRADIENT_IMAGES = 3
"""What a pass forward and back over an image counts."""
LAYER_NORM_IMAGES = 2 + 50 * GRADIENT_IMAGES
"""What the norms of the layers count: two forward passes, and iterations of at most 50 rounds, on one image."""


def view_figures_of(
    look: Look, classifier: Classifier, augment: AugmentConfig
) -> tuple[dict[str, float | None], Tensor | None]:
    """Return the figures over augmented views, and the logits of the first view; nothing where all views are equal."""
    config = look.config
    look.sampled["views"] = config.views if _changes(augment) else 0
    if not look.sampled["views"]:
        look.notes.append("the augmentation changes nothing, so nothing is measured on augmented images")
        return dict.fromkeys(("prediction_variance", "feature_variance", "true_class_stddev")), None
    pooled = has_pooled_features(classifier, first_image(look))
    if not pooled:
        look.notes.append("the network has no linear layer to take features from; the features are its logits")
    figures, augmented = ViewFigures(look.train.labels), None
    for view in seen_views(
        classifier, look.train, augment, num_views=config.views, seed=derive_seed(config.seed, "card", "views"),
        pooled=pooled, device=look.device,
    ):  # fmt: skip
        figures.add(view.logits, view.features)
        augmented = view.logits if augmented is None else augmented
    look.notes.append("figures of predictions on augmented training images are those of one view of each")
    return figures.figures(), augmented


def _changes(augment: AugmentConfig) -> bool:
    return bool(augment.crop_padding or augment.horizontal_flip or augment.random_resized_crop)


def prediction_figures(look: Look, logits: dict[str, Tensor | None]) -> dict[str, Any]:
    """Return what can be said from logits, labels and distributions alone, by split, and the fitted temperatures.

    The temperatures are fitted to all examples used of a split: nothing is judged by them, as it is by those that
    :func:`~soteacher.diagnostics.calibration.cross_fitted_logits` fits to one half and uses on the other.
    """
    figures: dict[str, Any] = {}
    splits = {**look.sample.splits, "train_augmented": look.train}
    with look.timed("calibration"):
        for name in ("train", "train_augmented", "test"):
            given = logits[name]
            if given is None:  # only augmented images can be missing, and those of train stand here already
                figures[name] = dict.fromkeys(key for key in figures["train"] if key != "accuracy_clean")
            else:
                figures[name] = _calibration(given, splits[name])
        figures["temperature"] = {
            name: fit_temperature(given, splits[name].labels)
            for name in look.sample.splits
            if (given := logits[name]) is not None
        }
    with look.timed("information"):
        for name in ("train", "train_augmented", "test"):
            given, information = logits[name], None
            if given is not None:
                information = conditional_mutual_information(
                    given, splits[name].labels, num_classes=look.data.num_classes
                )
            figures[name]["conditional_mutual_information"] = information
    with look.timed("distance"):
        figures["distance"] = _distances(look, logits)
    return figures


def _calibration(logits: Tensor, split: ImageSplit) -> dict[str, float]:
    """Return the figures of calibration, and the accuracy by the right labels where those are others."""
    clean = {} if split.clean_labels is None else {"accuracy_clean": metrics.accuracy(logits, split.clean_labels)}
    return {**calibration_figures(logits, split.labels), **clean}


def _distances(look: Look, logits: dict[str, Tensor | None]) -> dict[str, dict[str, float]]:
    """Return how far predictions lie from the label distributions that are known, by split."""
    train, test = look.train.label_distribution, look.sample.splits["test"].label_distribution
    known = {
        "train": train, "train_augmented": train, "test": test, "train_out_of_fold": look.sample.out_of_fold,
    }  # fmt: skip
    source = {**logits, "train_out_of_fold": logits["train"]}
    name = look.data.name
    if train is None and test is None and look.sample.out_of_fold is None:
        look.notes.append(
            f"no true label distribution is known for {name}; give --folds to compare with out-of-fold predictions"
        )
    elif train is None and look.sample.out_of_fold is None:
        look.notes.append(
            f"no true label distribution is known for the training images of {name}; give --folds to compare with "
            "out-of-fold predictions"
        )
    return {
        key: distribution_distances(given, truth)
        for key, truth in known.items()
        if truth is not None and (given := source[key]) is not None
    }


def layer_figures(
    look: Look, classifier: Classifier, counter: PassCounter
) -> tuple[list[dict[str, Any]], dict[str, float | None], dict[str, float | None]]:
    """Return the norms of the layers, the products of these, and the shares of weights that are there for nothing."""
    layers: list[LayerNorm] = []
    weights: dict[str, float | None] = dict.fromkeys(("near_zero", "dead_channels"))
    image = first_image(look)
    with look.timed("weights"):
        try:
            pairs = Composition(classifier, image)
            weights = weight_figures(classifier.network, pairs, running=running_modules(classifier, image))
        except InputError as error:
            look.notes.append(f"no figures of weights: {error}")
    with look.timed("layer_norms"):
        if look.images_left(counter) < LAYER_NORM_IMAGES:
            look.notes.append(f"no norms of layers: they would cost more than {MOST_PASSES} passes over so few images")
        else:
            before = counter.images
            try:
                layers = layer_norms(classifier, image)
            except InputError as error:
                look.notes.append(f"no norms of layers: {error}")
            counter.images = before + LAYER_NORM_IMAGES  # most of it is done layer by layer, which is not counted
    return [asdict(layer) for layer in layers], log10_products(layers), weights


def slope_figures(look: Look, classifier: Classifier, counter: PassCounter) -> dict[str, float | None]:
    """Return norms of input gradients and the steepest slope, on as many training images as the bound allows."""
    config, figures = look.config, dict[str, "float | None"]()
    slope_images = GRADIENT_IMAGES * config.slope_steps + 2
    with look.timed("input_gradient"):
        rows = affordable(look, counter, "gradient", config.gradient_examples, GRADIENT_IMAGES)
        norms = torch.cat(
            [input_gradient_norms(classifier, *pair) for pair in batches_of(look, rows)] or [torch.zeros(0)]
        ).double()
        figures["input_gradient_mean"] = norms.mean().item() if len(norms) else None
        figures["input_gradient_95"] = norms.quantile(0.95).item() if len(norms) else None
    with look.timed("slope"):
        rows = affordable(look, counter, "slope", config.slope_examples, slope_images)
        slopes = [
            largest_slope(
                classifier, images, radius=config.slope_radius, steps=config.slope_steps,
                seed=derive_seed(config.seed, "card", "slope", place),
            )
            for place, (images, _) in enumerate(batches_of(look, rows))
        ]  # fmt: skip
        figures["largest_slope"] = torch.cat(slopes).max().item() if slopes else None
    return figures
