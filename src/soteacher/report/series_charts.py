"""The charts of a series of studies: one figure along one axis."""

from __future__ import annotations

from collections.abc import Sequence

from soteacher.report.charts import COLOURS, MARKERS, Chart, chart_settings, empty_axes, svg_element
from soteacher.report.series_figures import Quantity, Results, along, by_arm
from soteacher.statistics import mean_interval


def axis_chart(results: Results, axis: str, quantity: Quantity, *, label: str, index: int) -> Chart | None:
    """Return one figure along one axis, a curve for each arm; None where no network of the axis has it.

    Args:
        results: of the series.
        axis: its name.
        quantity: the figure.
        label: what the axis is called.
        index: tells the page's charts apart.
    """
    points, factor = along(results, axis), 100 if quantity.percent else 1
    found = [by_arm(point, quantity.role, quantity.key) for _, point in points]
    arms = _styles(results, quantity.role, [arm for one in found for arm in one])
    if not arms:
        return None
    name = f"series-{index}"
    with chart_settings(name):
        figure, axes = empty_axes(4.8, 3.0 + 0.1 * (len(arms) + 1))
        for number, (arm, (colour, marker, style)) in enumerate(arms.items()):
            aside = 0.4 * ((number + 0.5) / len(arms) - 0.5)  # side by side, so that intervals do not hide one another
            places = [place for place, one in enumerate(found) if arm in one]
            seeds = [[factor * value for value in found[place][arm].values()] for place in places]
            middles = [mean_interval(values) for values in seeds]
            axes.plot([place + aside for place in places], [mean for mean, _ in middles], style, color=colour,
                      marker=marker, markersize=4, linewidth=1.3, label=arm)  # fmt: skip
            for place, values, (_, ends) in zip(places, seeds, middles, strict=True):
                axes.plot(
                    [place + aside] * len(values),
                    values,
                    "o",
                    color=colour,
                    markersize=2.5,
                    alpha=0.35,
                    markeredgewidth=0,
                )
                if ends:
                    axes.plot([place + aside] * 2, ends, "_-", color=colour, linewidth=1, markersize=4)
        axes.set_xticks(range(len(points)), [value for value, _ in points])
        axes.set_xlim(-0.5, len(points) - 0.5)
        axes.grid(visible=False, axis="x")
        axes.set(xlabel=label, ylabel=quantity.unit)
        figure.legend(loc="outside upper center", ncols=2, handlelength=1.8)
        title = f"{quantity.title}, by {label}"
        svg = svg_element(figure, name=name, title=title)
    caption = "Means over seeds, bars their 95 % intervals, dots the single seeds. Values stand at equal distances."
    return Chart(title=title, caption=caption, svg=svg)


def _styles(results: Results, role: str, arms: Sequence[str]) -> dict[str, tuple[str, str, str]]:
    """Return colour, marker and line of arms: a student has those of its teacher, and a line of its own kind."""
    rows = [row for point in results["points"] for row in point["rows"]]
    teachers = list(dict.fromkeys(row["arm"] for row in rows if row["role"] == "teacher"))
    taught = {row["arm"]: row["teacher_arm"] for row in rows if row["role"] == "student"}
    alone = [arm for arm, teacher in taught.items() if teacher is None]
    students = list(dict.fromkeys(arm.removeprefix(f"{teacher}-") for arm, teacher in taught.items() if teacher))
    styles: dict[str, tuple[str, str, str]] = {}
    for arm in dict.fromkeys(arms):
        teacher = arm if role == "teacher" else taught[arm]
        place = teachers.index(teacher) if teacher is not None else len(teachers) + alone.index(arm)
        line = "-" if role == "teacher" else ":"
        if role == "student" and teacher is not None:
            line = ("-", "--", "-.")[students.index(arm.removeprefix(f"{teacher}-")) % 3]
        turn = place // len(COLOURS)  # colours come again, with other markers
        styles[arm] = (COLOURS[place % len(COLOURS)], MARKERS[(place + turn) % len(MARKERS)], line)
    return styles
