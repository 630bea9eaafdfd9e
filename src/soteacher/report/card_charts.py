"""The charts of a teacher card."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from soteacher.report.card_tables import zero_norms
from soteacher.report.charts import (
    COLOURS,
    Chart,
    chart_settings,
    empty_axes,
    reliability_chart,
    svg_element,
)
from soteacher.report.record import NetworkRecord

MOST_NAMES = 64
"""Of more layers than this only every second, third ... bears its name."""


def card_reliability(card: Mapping[str, Any]) -> Chart:
    """Return how often the network is right by how sure it is, on both splits."""
    network = NetworkRecord(role="teacher", arm="", seed=0, row=None, epochs=(), reliability=card["reliability"])
    chart = reliability_chart(0, card["network"]["model"], [network])
    return replace(chart, caption="Below the diagonal the network is too sure. Larger marks hold more images.")


def confidence_chart(card: Mapping[str, Any]) -> Chart:
    """Return which share of the images of each split has which confidence."""
    histogram, title = card["confidence_histogram"], "Confidence"
    with chart_settings("confidence"):
        figure, axes = empty_axes(3.6, 3.6)
        for split, colour, style in (("test", COLOURS[0], "-"), ("train", COLOURS[1], "--")):
            shares = [100 * share for share in histogram[split]]
            axes.stairs(shares, histogram["edges"], color=colour, linestyle=style, linewidth=1.6, label=split)
        axes.set(xlim=(0, 1), xlabel="confidence", ylabel="images, %")
        axes.set_ylim(bottom=0)
        axes.legend()
        svg = svg_element(figure, name="confidence", title=title)
    caption = (
        "How sure the network is. Where train lies right of test, the network knows its training images by "
        "heart and has little else to say of them."
    )
    return Chart(title=title, caption=caption, svg=svg)


def layer_chart(card: Mapping[str, Any]) -> Chart:
    """Return both norms of each layer, in running order; those that are 0 have no mark, and the caption names them."""
    from matplotlib.ticker import FuncFormatter, NullFormatter

    layers, title = card["layers"], "Norms of the layers"
    every = -(-len(layers) // MOST_NAMES)
    names = [one["layer"] + (" + bn" if one["batch_norm"] else "") for one in layers]
    with chart_settings("layers"):
        figure, axes = empty_axes(6.0, 1.2 + 0.19 * len(layers) / every)
        for key, label, colour, marker in (
            ("norm_1", "1-norm", COLOURS[1], "s"), ("norm_2", "2-norm (spectral)", COLOURS[0], "o"),
        ):  # fmt: skip
            values = [one[key] or float("nan") for one in layers]
            axes.plot(values, range(len(layers)), "-", color=colour, linewidth=0.8, alpha=0.5)
            axes.plot(values, range(len(layers)), marker, color=colour, markersize=4, label=label)
        axes.set_xscale("log")
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))  # not as a formula
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.set_yticks(range(0, len(layers), every), names[::every], fontsize=9)
        axes.set_ylim(len(layers) - 0.4, -0.6)
        axes.set_xlabel("operator norm")
        figure.legend(loc="outside upper center", ncols=2)
        svg = svg_element(figure, name="layers", title=title)
    caption = (
        "By how much each layer, with the batch norm that follows it (+ bn), can stretch a difference at most; the "
        "first layer is on top."
    )
    if zero := zero_norms(card):
        caption += f" {zero}"
    return Chart(title=title, caption=caption, svg=svg)
