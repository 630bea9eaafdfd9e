"""Charts of student accuracy against the figures of the teachers' cards."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

from soteacher.report.cards import CHOSEN, figure_words, in_its_unit
from soteacher.report.charts import COLOURS, MARKERS, Chart, chart_settings, empty_axes, svg_element
from soteacher.report.correlations import TaughtStudent, arm_means, correlation_words
from soteacher.report.small_panel import Mark, small_panel

MAX_STUDENTS = 6
"""Students that have panels, which keeps the page small; the table has all of them."""
MAX_STUDENTS_IN_FULL = 2
"""Students that have panels of the figures too that are not among the chosen ones."""
MAX_LABEL = 42
"""Characters that fit below a panel in one line."""


def student_panels(index: int, student: TaughtStudent, arms: Sequence[str]) -> list[Chart]:
    """Return a student's panels of the :data:`~soteacher.report.cards.CHOSEN` figures, after one with the marks.

    Args:
        index: tells students apart.
        student: with its points.
        arms: every kind of teacher; an arm's place in it gives its colour and its mark.
    """
    shown = [arm for arm in arms if arm in student.arms]
    names = [name for name in CHOSEN if name in student.correlations]
    panels = [_panel(f"cards-{index}-{place}", student, name, arms) for place, name in enumerate(names)]
    return [_legend(f"cards-{index}-legend", student, shown, arms), *panels]


def other_panels(student: TaughtStudent, arms: Sequence[str]) -> list[Chart]:
    """Return small panels of all other figures that have a correlation, in the order of the cards.

    Args:
        student: with its points.
        arms: as for :func:`student_panels`.
    """
    names = dict.fromkeys(name for point in student.points for name in point.figures)
    return [_small(student, name, arms) for name in names if name in student.correlations and name not in CHOSEN]


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
        axes.set(xlabel=textwrap.fill(words, MAX_LABEL), ylabel="student accuracy, %")
        title = _title(student, figure_name)
        svg = svg_element(figure, name=name, title=f"Accuracy of {student.name} against {title}")
    caption = f"{len(means)} kinds of teachers, {len(points)} networks."
    return Chart(title=title, caption=caption, svg=svg)


def _small(student: TaughtStudent, figure_name: str, arms: Sequence[str]) -> Chart:
    means = arm_means(student.points, figure_name)
    across, up = _places(list(means.values()), figure_name)
    marks = [
        Mark(across=x, up=y, colour=colour, shape=shape, title=arm)
        for arm, x, y in zip(means, across, up, strict=True)
        for colour, shape in [_mark(arm, arms)]
    ]
    title = _title(student, figure_name)
    return Chart(title=title, caption="", svg=small_panel(marks, title=f"Accuracy of {student.name} against {title}"))


def _title(student: TaughtStudent, figure_name: str) -> str:
    return f"{figure_words(figure_name)}: rho {correlation_words(student.correlations[figure_name])}"


def _places(pairs: Sequence[tuple[float, float]], figure_name: str) -> tuple[list[float], list[float]]:
    """Return where pairs of figure and accuracy lie: the figure in its unit, and the accuracy in per cent."""
    return [in_its_unit(figure_name, figure) for figure, _ in pairs], [100 * accuracy for _, accuracy in pairs]
