"""The report's charts, each an SVG element to stand inside a page.

They have no background, take the page's text colour and font, and scale to the width they are given.
"""

from __future__ import annotations

import html
import io
import re
from collections.abc import Collection, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from statistics import fmean
from typing import TYPE_CHECKING, Any

from soteacher.report.record import NetworkRecord

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
"""Distinguishable with every kind of colour vision, on white and on near-black (Okabe and Ito, without yellow)."""
MARKERS = ("o", "s", "D", "^", "v", "P")
TEXT_COLOUR = "#010203"
"""Stands for the page's text colour until the drawing is done."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Chart:
    """A drawing with the words that go with it."""

    title: str
    caption: str
    svg: str
    """The SVG element, labelled with the title; the names in it are escaped."""


def chart_settings(name: str) -> AbstractContextManager[None]:
    """Return matplotlib's settings for one chart; ``name`` seeds its ids, so that a drawing is the same every time."""
    import matplotlib as mpl

    colours = dict.fromkeys(
        ("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color"), TEXT_COLOUR
    )
    return mpl.rc_context(
        {
            **colours,
            "svg.fonttype": "none",
            "svg.hashsalt": name,
            "text.parse_math": False,
            "font.size": 10,
            "axes.grid": True,
            "axes.axisbelow": True,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "grid.alpha": 0.15,
            "legend.frameon": False,
        }
    )


def empty_axes(width: float, height: float) -> tuple[Figure, Axes]:
    """Return an empty drawing of a size in inches."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.add_subplot()


def svg_element(figure: Figure, *, name: str, title: str) -> str:
    """Return the drawing as one SVG element whose ids begin with ``name``."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r'\b(id="|url\(#|href="#)', rf"\g<1>{name}-", text)
    text = re.sub(r"(font: [\d.]+px|font-family:) [^;\"]*", r"\1 sans-serif", text)
    text = re.sub(r'\bd="[^"]*"', lambda path: re.sub(r"(\.\d\d)\d+", r"\1", path[0]), text)  # a third of the size
    text = text.replace(TEXT_COLOUR, "currentColor")
    label = html.escape(title)
    opening = re.sub(r' (width|height)="[^"]*"', "", text[: text.index(">")])
    return f'{opening} role="img" aria-label="{label}"><title>{label}</title>{text[text.index(">") + 1 :]}'


def accuracy_chart(summary: Sequence[Mapping[str, Any]], rows: Sequence[Mapping[str, Any]]) -> Chart:
    """Return the student arms' accuracies: mean and 95 % interval, and every seed."""
    with chart_settings("accuracy"):
        figure, axes = empty_axes(4.8, 0.9 + 0.45 * len(summary))
        for place, entry in enumerate(summary):
            colour = COLOURS[place % len(COLOURS)]
            seeds = [
                100 * row["accuracy_last"] for row in rows if row["role"] == "student" and row["arm"] == entry["arm"]
            ]
            heights = [place + 0.2 + 0.07 * (index % 3) for index in range(len(seeds))]  # equal values stay apart
            axes.plot(seeds, heights, "o", color=colour, markersize=4, alpha=0.7, markeredgewidth=0)
            if entry["accuracy_ci95"]:
                ends = [100 * end for end in entry["accuracy_ci95"]]
                axes.plot(ends, [place] * 2, "|-", color=colour, linewidth=2.5, markersize=9, markeredgewidth=2)
            axes.plot([100 * entry["accuracy_mean"]], [place], "D", color=colour, markersize=7)
        axes.set_yticks(range(len(summary)), [entry["arm"] for entry in summary])
        axes.set_ylim(len(summary) - 0.45, -0.5)
        left, right = axes.get_xlim()
        axes.set_xlim(max(left, 0), min(right, 100.5))  # intervals from two seeds can reach beyond what is possible
        axes.grid(visible=False, axis="y")
        axes.set_xlabel("test accuracy after the last epoch, %")
        title = "Student accuracy by arm"
        svg = svg_element(figure, name="accuracy", title=title)
    caption = "Diamonds are means over seeds, bars their 95 % intervals, dots the single seeds."
    return Chart(title=title, caption=caption, svg=svg)


def _points(network: NetworkRecord, key: str) -> dict[int, float]:
    """Return epoch, counted from 1, to a value in per cent, for the epochs that have the value."""
    return {line["epoch"] + 1: 100 * line[key] for line in network.epochs if line.get(key) is not None}


def learning_curves(role: str, arms: Mapping[str, Sequence[NetworkRecord]]) -> Chart:
    """Return test and train accuracy over the epochs, per arm: the mean over seeds and every seed."""
    from matplotlib.ticker import MaxNLocator

    name = f"curves-{role}"
    with chart_settings(name):
        figure, axes = empty_axes(4.8, 3.0 + 0.1 * (len(arms) + 1))
        lines: list[Line2D] = []
        for place, networks in enumerate(arms.values()):
            colour, marker = COLOURS[place % len(COLOURS)], MARKERS[place // len(COLOURS) % len(MARKERS)]
            for key, style in (("test_accuracy", "-"), ("train_accuracy", "--")):
                curves = [_points(network, key) for network in networks]
                epochs = sorted({epoch for curve in curves for epoch in curve})
                means = [fmean(curve[epoch] for curve in curves if epoch in curve) for epoch in epochs]
                for curve in curves:
                    axes.plot(list(curve), list(curve.values()), style, color=colour, linewidth=0.7, alpha=0.4)
                (line,) = axes.plot(epochs, means, style, color=colour, linewidth=1.8)
                line.set(marker=marker, markersize=3.5, markevery=max(1, len(epochs) // 12))
                if style == "-":
                    lines.append(line)
        axes.set_xlabel("epoch")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set_ylabel("accuracy, %")
        figure.legend(lines, list(arms), loc="outside upper center", ncols=2, handlelength=1.4)
        title = f"Learning curves of the {role}s"
        svg = svg_element(figure, name=name, title=title)
    caption = (
        "Solid: test accuracy. Dashed: accuracy on the training batches, as they were seen. "
        "Thick lines are means over seeds, thin ones single seeds."
    )
    return Chart(title=title, caption=caption, svg=svg)


def pooled_bins(networks: Sequence[NetworkRecord], split: str) -> list[dict[str, float]]:
    """Return the filled reliability bins of a split, pooled over seeds: ``count``, and the means over its examples."""
    pools: dict[tuple[float, float], dict[str, float]] = {}
    for network in networks:
        for part in network.reliability.get(split, []):
            if not part["count"]:
                continue
            pool = pools.setdefault((part["lower"], part["upper"]), {"count": 0, "confidence": 0.0, "accuracy": 0.0})
            pool["count"] += part["count"]
            for key in ("confidence", "accuracy"):
                pool[key] += part["count"] * part[key]
    return [
        {"count": pool["count"], **{key: pool[key] / pool["count"] for key in ("confidence", "accuracy")}}
        for _, pool in sorted(pools.items())
    ]


def reliability_chart(index: int, arm: str, networks: Sequence[NetworkRecord]) -> Chart:
    """Return how often one teacher arm is right by how confident it is, on both splits; ``index`` tells arms apart."""
    name = f"reliability-{index}"
    with chart_settings(name):
        figure, axes = empty_axes(3.6, 3.6)
        axes.plot([0, 1], [0, 1], color=TEXT_COLOUR, linewidth=0.8, alpha=0.6)
        splits = (("test", "-", "o", COLOURS[0]), ("train", "--", "s", COLOURS[1]))
        for split, style, marker, colour in splits:
            bins = pooled_bins(networks, split)
            total = sum(part["count"] for part in bins)
            across, up = [part["confidence"] for part in bins], [part["accuracy"] for part in bins]
            if bins:
                axes.plot(across, up, style, color=colour, linewidth=1.4, marker=marker, markersize=3, label=split)
                sizes = [260 * part["count"] / total for part in bins]
                axes.scatter(across, up, s=sizes, color=colour, alpha=0.35, marker=marker, linewidths=0)
        axes.set(xlim=(0, 1.02), ylim=(0, 1.02), xlabel="confidence", ylabel="accuracy", aspect="equal")
        axes.legend(loc="upper left")
        title = f"Reliability of {arm}"
        svg = svg_element(figure, name=name, title=title)
    caption = "Below the diagonal the network is too sure. Larger marks hold more examples; seeds are pooled."
    return Chart(title=title, caption=caption, svg=svg)


def cost_chart(rows: Sequence[Mapping[str, Any]], *, earlier_states: Collection[str] = ()) -> Chart:
    """Return the training time of each arm's networks: the mean, with the run's total in the caption.

    Args:
        rows: the results' rows.
        earlier_states: teacher arms that are earlier states of others, whose time the total must not count twice.
    """
    arms: dict[tuple[str, str], list[float]] = {}
    for row in rows:
        if row.get("train_seconds") is not None:
            arms.setdefault((row["role"], row["arm"]), []).append(row["train_seconds"])
    bars = sorted(arms.items(), key=lambda item: item[0][0] != "teacher")
    with chart_settings("cost"):
        figure, axes = empty_axes(4.8, 0.9 + 0.34 * len(bars))
        means = [fmean(seconds) for _, seconds in bars]
        colours = [COLOURS[1] if role == "teacher" else COLOURS[0] for (role, _), _ in bars]
        drawn = axes.barh(range(len(bars)), means, color=colours, height=0.66)
        axes.bar_label(drawn, [f"{mean:,.0f}" if mean >= 10 else f"{mean:.1f}" for mean in means], padding=4)
        axes.set_yticks(range(len(bars)), [f"{role} {arm}" for (role, arm), _ in bars])
        axes.set_ylim(len(bars) - 0.4, -0.6)
        axes.margins(x=0.14)
        axes.grid(visible=False, axis="y")
        axes.set_xlabel("seconds of training per network")
        title = "Training time by arm"
        svg = svg_element(figure, name="cost", title=title)
    own = [seconds for (role, arm), seconds in arms.items() if role == "student" or arm not in earlier_states]
    count, total = sum(map(len, own)), sum(map(sum, own))
    caption = f"Means over seeds. All {count} networks together took {total:,.0f} seconds."
    if len(own) < len(arms):
        caption += " Teachers that are earlier states of others are not counted again."
    return Chart(title=title, caption=caption, svg=svg)
