"""The page ``card.html``: a teacher card as one file, without network access or scripts."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from soteacher.errors import InputError
from soteacher.files import write_json
from soteacher.report.card_charts import card_reliability, confidence_chart, layer_chart
from soteacher.report.card_tables import (
    cost_sentence,
    distance_table,
    prediction_table,
    seconds_table,
    single_table,
    zero_norms,
)
from soteacher.report.page import render
from soteacher.report.record import read_mapping

CARD_FILE = "card.json"
PAGE_FILE = "card.html"
MOST_BARS = 6
"""Classes shown of each image: those with the most probability in either distribution."""


def write_card(folder: Path, card: Mapping[str, Any]) -> Path:
    """Write ``card.json`` and ``card.html`` into a folder and return the page's path."""
    write_json(folder / CARD_FILE, card)
    return write_card_page(folder)


def write_card_page(folder: Path) -> Path:
    """Write ``card.html`` anew from the ``card.json`` in a folder and return its path.

    The page is the same, byte for byte, whenever the card is.

    Raises:
        InputError: there is no card, or it cannot be read.
    """
    card = read_mapping(folder / CARD_FILE)
    if "figures" not in card:
        raise InputError(f"there is no teacher card at {folder / CARD_FILE}")
    return render("card_page.html", _context(card), folder / PAGE_FILE)


def _context(card: Mapping[str, Any]) -> dict[str, Any]:
    """Return everything that the template names."""
    return {
        "title": f"Teacher card: {card['network']['model']} on {card['data']['name']}",
        "provenance": f"soteacher {card['soteacher_version']}; weights {card['network']['checksum']}; "
        f"data {card['data']['checksum']}",
        "facts": _facts(card),
        "notes": [f"{note[:1].upper()}{note[1:]}." for note in card["notes"]],
        "predictions": prediction_table(card),
        "charts": [card_reliability(card), confidence_chart(card)],
        "distances": distance_table(card),
        "distance_heading": _distance_heading(card),
        "distance_words": _distance_words(card),
        "gallery_words": _gallery_words(card),
        "reference": " or ".join(words for words, _ in _references(card)),
        "gallery": [_picture(entry, card["data"]["class_names"]) for entry in card["most_different"]],
        "single": single_table(card),
        "zero_norms": zero_norms(card),
        "layer_charts": [layer_chart(card)] if card["layers"] else [],
        "cost": f"{cost_sentence(card)}.",
        "seconds": seconds_table(card),
    }


def _facts(card: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return what was looked at, as label and text."""
    network, data, sampled = card["network"], card["data"], card["sampled"]
    used = {split: f"{sampled[split]:,} of {data[f'{split}_examples']:,} {split} images" for split in ("train", "test")}
    whole = all(sampled[split] == data[f"{split}_examples"] for split in ("train", "test"))
    how = "" if whole else f", random samples (seed {sampled['seed']})"
    return [
        ("Network", f"{network['model']}, {network['parameters']:,} parameters"),
        ("Data", f"{data['name']}, {network['num_classes']} classes"),
        ("Looked at", f"{used['train']} and {used['test']}{how}"),
        ("Of the training images", f"{sampled['views']} augmented views of each; gradients at {sampled['gradient']:,}; "
         f"a slope searched around {sampled['slope']:,}"),
    ]  # fmt: skip


def _distance_heading(card: Mapping[str, Any]) -> str:
    known = set(card["figures"].get("distance") or {})
    return f"Distance to the {'out-of-fold predictions' if known == {'train_out_of_fold'} else 'label distribution'}"


def _distance_words(card: Mapping[str, Any]) -> str:
    """Return what the distances are to be read as: those to networks' opinions are not those to what is true."""
    known = card["figures"].get("distance") or {}
    words = (
        "A student learns from what its teacher says of the training images. SoTeacher's theory wants that to be how "
        "their labels are truly distributed"
    )
    if "train_out_of_fold" not in known:
        return f"{words}: the smaller these, the better."
    words += ". " if "train" in known else ", which is not known here. "
    stand_in = "stand beside" if "train" in known else "stand in for"
    return (
        f"{words}Out-of-fold predictions {stand_in} it: they are networks' opinions of images that those have not been "
        "trained on, and a network that errs as they do looks better than it is."
    )


def _references(card: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return what the gallery's predictions are set beside, in words, with the split that it is known of."""
    known = card["figures"].get("distance") or {}
    stand_in = "train_out_of_fold" in known and "train" not in known
    splits = dict.fromkeys(entry["split"] for entry in card["most_different"])
    found: dict[str, list[str]] = {}
    for split in splits:
        words = "out-of-fold predictions" if stand_in and split == "train" else "known distribution"
        found.setdefault(words, []).append(split)
    return [(words, " and ".join(own)) for words, own in found.items()]


def _gallery_words(card: Mapping[str, Any]) -> str:
    """Return how the gallery's images were chosen."""
    targets = {
        "known distribution": "the label distribution that is known of them",
        "out-of-fold predictions": "the out-of-fold predictions, which are networks' opinions",
    }
    references = _references(card)
    several = len(references) > 1
    words = " and ".join(targets[one] + (f" ({splits} images)" if several else "") for one, splits in references)
    return f"The images whose prediction lies farthest from {words}, by total variation."


def _picture(entry: Mapping[str, Any], class_names: list[str]) -> dict[str, Any]:
    """Return one image of the gallery: its words, and its bars for the classes that count."""
    prediction, reference = entry["prediction"], entry["distribution"]
    weight = [max(pair) for pair in zip(prediction, reference, strict=True)]
    shown = sorted(range(len(weight)), key=lambda place: -weight[place])[:MOST_BARS]
    label = class_names[entry["label"]]
    return {
        "png": entry["png"],
        "alt": f"{entry['split']} image {entry['row']}, labelled {label}",
        "caption": f"{entry['split']} image {entry['row']}: {label}; distance {entry['distance']:.2f}",
        "bars": [
            {
                "name": class_names[place],
                "network": f"{100 * prediction[place]:.1f}",
                "reference": f"{100 * reference[place]:.1f}",
                "text": f"{100 * prediction[place]:.0f} / {100 * reference[place]:.0f} %",
            }
            for place in shown
        ],
    }
