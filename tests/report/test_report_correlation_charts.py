import re
from collections.abc import Callable
from pathlib import Path
from xml.etree import ElementTree

import pytest

from soteacher.report.cards import CHOSEN, carded_teachers, figure_words
from soteacher.report.charts import COLOURS
from soteacher.report.correlation_charts import other_panels, student_panels
from soteacher.report.correlations import Point, TaughtStudent, taught_students
from soteacher.report.record import read_run
from soteacher.statistics import RankCorrelation

SVG = "{http://www.w3.org/2000/svg}"
HOSTILE = 'a<b> & "$x^2$"'


def _student(arms: tuple[str, ...] = ("a", "b"), seeds: int = 3, figures: int = 2) -> TaughtStudent:
    names = CHOSEN[:figures]
    points = tuple(
        Point(
            arm=arm,
            seed=seed,
            figures={name: 10.0 * place + (seed * (number + 1)) % 5 for number, name in enumerate(names)},
            accuracy=0.5 + 0.1 * place + 0.01 * seed,
        )
        for place, arm in enumerate(arms)
        for seed in range(seeds)
    )
    found = {name: RankCorrelation(value=0.5, interval=(-0.2, 0.9), count=len(arms)) for name in names}
    return TaughtStudent(name=HOSTILE, points=points, correlations=found)


def _texts(svg: str) -> list[str]:
    return ["".join(element.itertext()) for element in ElementTree.fromstring(svg).iter(f"{SVG}text")]


def test_panels_are_titled_with_figure_and_correlation(make_ranked_run: Callable[..., Path]) -> None:
    record = read_run(make_ranked_run())
    teachers = carded_teachers(record)
    (student,) = taught_students(record, teachers)
    legend, *panels = student_panels(0, student, list(teachers))
    assert _texts(legend.svg) == ["standard", "soteacher", "mse", "smooth", "early", "wide"]
    # In the order that was fixed, whichever is the strongest; the distance in KL is none of the chosen ones.
    assert [panel.title.split(": rho ")[0] for panel in panels] == [figure_words("test.ece")]
    for panel in panels:
        assert "student accuracy, %" in _texts(panel.svg)
        assert panel.caption == "6 kinds of teachers, 18 networks."
        root = ElementTree.fromstring(panel.svg)
        assert root.attrib["role"] == "img"
        assert root.attrib["aria-label"] == f"Accuracy of kd against {panel.title}"


def test_panels_share_no_ids_and_take_the_pages_colours() -> None:
    charts = [*student_panels(0, _student(), ["a", "b"]), *student_panels(1, _student(), ["a", "b"])]
    ids = [
        element.attrib["id"]
        for chart in charts
        for element in ElementTree.fromstring(chart.svg).iter()
        if "id" in element.attrib
    ]
    assert len(ids) == len(set(ids))
    for chart in charts:
        assert "#010203" not in chart.svg
        assert not re.search(r"fill: #(fff|000)", chart.svg)
        assert "currentColor" in chart.svg


def _marks(svg: str, colour: str) -> int:
    """Return how many marks of a colour are drawn."""
    return sum(
        f"fill: {colour}" in element.attrib.get("style", "")
        for element in ElementTree.fromstring(svg).iter(f"{SVG}use")
    )


@pytest.mark.parametrize("seeds", [1, 3])
def test_every_arm_has_a_mark_for_each_seed_and_one_for_their_mean(seeds: int) -> None:
    arms = ("a", "b", "c", "d")
    _, panel, _ = student_panels(0, _student(arms, seeds), arms)
    for colour in COLOURS[:4]:
        assert _marks(panel.svg, colour) == seeds + 1
    assert _marks(panel.svg, COLOURS[4]) == 0


def test_an_arm_keeps_its_colour_whatever_others_a_student_has() -> None:
    legend, panel, _ = student_panels(0, _student(("c",), 4), ("a", "b", "c"))
    assert _texts(legend.svg) == ["c"]
    for chart in (legend, panel):
        assert _marks(chart.svg, COLOURS[2]) > 0
        assert _marks(chart.svg, COLOURS[0]) == 0


def test_the_chosen_figures_have_panels_in_their_order_and_the_others_small_ones(
    make_ranked_run: Callable[..., Path],
) -> None:
    student = _student(figures=len(CHOSEN))
    assert [panel.title.split(": rho ")[0] for panel in student_panels(0, student, ["a", "b"])[1:]] == list(
        map(figure_words, CHOSEN)
    )
    assert other_panels(student, ["a", "b"]) == []
    record = read_run(make_ranked_run())
    teachers = carded_teachers(record)
    (student,) = taught_students(record, teachers)
    panels = other_panels(student, list(teachers))
    assert [panel.title.split(": rho ")[0] for panel in panels] == [
        figure_words("train.nll"),
        figure_words("distance.train.kl"),
    ]
    for panel in panels:
        root = ElementTree.fromstring(panel.svg)
        assert root.attrib["aria-label"] == f"Accuracy of kd against {panel.title}"
        assert len(panel.svg) < 1500
        assert panel.caption == ""


def test_more_arms_than_colours_and_any_names_are_drawn() -> None:
    arms = (HOSTILE, *(f"arm{place}" for place in range(8)))
    legend, *panels = student_panels(0, _student(arms, 1), arms)
    assert _texts(legend.svg) == list(arms)
    assert f"Marks of the teachers of {HOSTILE}" == ElementTree.fromstring(legend.svg).attrib["aria-label"]
    assert len(panels) == 2
