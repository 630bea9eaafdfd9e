"""Charts of student accuracy against the figures of the teachers' cards."""

from __future__ import annotations

from collections.abc import Sequence

from soteacher.report.cards import TaughtStudent, arm_means, correlation_words, figure_words, in_its_unit
from soteacher.report.charts import COLOURS, MARKERS, Chart, chart_settings, empty_axes, svg_element

MAX_PANELS = 11
"""Panels for one student, of the figures with the strongest correlations: twelve with the one that explains marks."""
MAX_STUDENTS = 6
"""Students that have panels, which keeps the page small; the table has all of them."""


def student_panels(index: int, student: TaughtStudent, arms: Sequence[str]) -> list[Chart]:
    """Return a student's panels, the strongest correlation first, after one that says which mark is whose.

    Args:
        index: tells students apart.
        student: with its points.
        arms: every teacher arm; an arm's place in it gives its colour and its mark.
    """
    shown = [arm for arm in arms if arm in student.arms]
    names = list(student.correlations)[:MAX_PANELS]
    panels = [_panel(f"cards-{index}-{place}", student, name, arms) for place, name in enumerate(names)]
    return [_legend(f"cards-{index}-legend", student, shown, arms), *panels]


def _mark(arm: str, arms: Sequence[str]) -> tuple[str, str]:
    """Return the colour and the mark of an arm."""
    place = list(arms).index(arm)
    return COLOURS[place % len(COLOURS)], MARKERS[place // len(COLOURS) % len(MARKERS)]


def _legend(name: str, student: TaughtStudent, shown: Sequence[str], arms: Sequence[str]) -> Chart:
    with chart_settings(name):
        figure, axes = empty_axes(3.6, 0.3 + 0.26 * len(shown))
        axes.set_axis_off()
        for row, arm in enumerate(shown):
            colour, mark = _mark(arm, arms)
            axes.plot([0], [row], mark, color=colour, markersize=8)
            axes.text(0.06, row, arm, verticalalignment="center")
        axes.set(xlim=(-0.04, 1), ylim=(len(shown) - 0.5, -0.5))
        svg = svg_element(figure, name=name, title=f"Marks of the teachers of {student.name}")
    caption = "Large marks are means over an arm's seeds, which rho is of; faint ones are the single seeds."
    return Chart(title="Teachers", caption=caption, svg=svg)


def _panel(name: str, student: TaughtStudent, figure_name: str, arms: Sequence[str]) -> Chart:
    from matplotlib.ticker import MaxNLocator

    words = figure_words(figure_name)
    points = [point for point in student.points if figure_name in point.figures]
    means = arm_means(points, figure_name)
    with chart_settings(name):
        figure, axes = empty_axes(3.6, 2.9)
        for arm, mean in means.items():
            colour, mark = _mark(arm, arms)
            single = [(point.figures[figure_name], point.accuracy) for point in points if point.arm == arm]
            axes.plot(*_places(single, figure_name), mark, color=colour, markersize=4, alpha=0.4, markeredgewidth=0)
            axes.plot(*_places([mean], figure_name), mark, color=colour, markersize=8)
        axes.xaxis.set_major_locator(MaxNLocator(4))
        axes.yaxis.set_major_locator(MaxNLocator(5))
        axes.ticklabel_format(useOffset=False)
        axes.set(xlabel=words, ylabel="student accuracy, %")
        correlation = student.correlations[figure_name]
        title = f"{words}: rho {correlation_words(correlation)}"
        svg = svg_element(figure, name=name, title=f"Accuracy of {student.name} against {title}")
    caption = f"{len(means)} kinds of teachers, {len(points)} networks."
    return Chart(title=title, caption=caption, svg=svg)


def _places(pairs: Sequence[tuple[float, float]], figure_name: str) -> tuple[list[float], list[float]]:
    """Return where pairs of figure and accuracy lie: the figure in its unit, and the accuracy in per cent."""
    return [in_its_unit(figure_name, figure) for figure, _ in pairs], [100 * accuracy for _, accuracy in pairs]
