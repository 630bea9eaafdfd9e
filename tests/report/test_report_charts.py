import re
from collections.abc import Callable
from pathlib import Path
from xml.etree import ElementTree

import matplotlib as mpl
import pytest

from soteacher.report.charts import Chart, accuracy_chart, cost_chart, learning_curves, pooled_bins, reliability_chart
from soteacher.report.record import NetworkRecord, RunRecord, read_run

HOSTILE = 'a<b> & "$x^2$"'
SVG = "{http://www.w3.org/2000/svg}"


def _texts(chart: Chart) -> list[str]:
    return ["".join(element.itertext()) for element in ElementTree.fromstring(chart.svg).iter(f"{SVG}text")]


def _all_charts(record: RunRecord) -> list[Chart]:
    rows, summary = record.results["rows"], record.results["summary"]
    teachers, students = record.of_role("teacher"), record.of_role("student")
    return [
        accuracy_chart(summary, rows),
        learning_curves("teacher", teachers),
        learning_curves("student", students),
        *[reliability_chart(place, arm, teachers[arm]) for place, arm in enumerate(teachers)],
        cost_chart(rows),
    ]


def test_charts_are_labelled_and_share_no_ids(make_run: Callable[..., Path]) -> None:
    charts = _all_charts(read_run(make_run(seeds=2, num_epochs=3)))
    ids: list[str] = []
    for chart in charts:
        root = ElementTree.fromstring(chart.svg)
        assert root.attrib["role"] == "img"
        assert root.attrib["aria-label"] == root.findtext(f"{SVG}title") == chart.title
        assert "width" not in root.attrib
        assert chart.caption.endswith(".")
        ids += [element.attrib["id"] for element in root.iter() if "id" in element.attrib]
        own = {element.attrib["id"] for element in root.iter() if "id" in element.attrib}
        assert {
            name for pair in re.findall(r'url\(#([^)]+)\)|href="#([^"]+)"', chart.svg) for name in pair if name
        } <= own
    assert len(ids) == len(set(ids))


def test_charts_have_no_background_and_the_pages_text_colour(make_run: Callable[..., Path]) -> None:
    for chart in _all_charts(read_run(make_run(seeds=1, num_epochs=2))):
        assert "currentColor" in chart.svg
        assert "#010203" not in chart.svg
        assert not re.search(r"fill: #(fff|000)", chart.svg)
        assert set(re.findall(r"(?:font: [\d.]+px|font-family:) ([^;\"]+)", chart.svg)) == {"sans-serif"}


def test_charts_leave_the_settings_of_matplotlib_alone(make_run: Callable[..., Path]) -> None:
    before = dict(mpl.rcParams)
    _all_charts(read_run(make_run(seeds=1, num_epochs=2)))
    assert dict(mpl.rcParams) == before


def test_charts_show_names_as_they_are(make_run: Callable[..., Path]) -> None:
    record = read_run(make_run(teachers=(HOSTILE,), students=(f"{HOSTILE}-kd", "_alone"), seeds=1, num_epochs=2))
    accuracy, teachers, students, reliability, cost = _all_charts(record)
    assert {f"{HOSTILE}-kd", "_alone"} <= set(_texts(accuracy))
    assert HOSTILE in _texts(teachers)
    assert {f"{HOSTILE}-kd", "_alone"} <= set(_texts(students))
    assert f"teacher {HOSTILE}" in _texts(cost)
    assert ElementTree.fromstring(reliability.svg).attrib["aria-label"] == f"Reliability of {HOSTILE}"


def test_charts_take_more_arms_than_colours(make_run: Callable[..., Path]) -> None:
    arms = tuple(f"arm{place}" for place in range(9))
    record = read_run(make_run(teachers=(), students=arms, seeds=1, num_epochs=2))
    assert set(arms) <= set(_texts(learning_curves("student", record.of_role("student"))))


def test_learning_curves_leave_out_missing_values(make_run: Callable[..., Path]) -> None:
    record = read_run(make_run(seeds=1, num_epochs=3))
    network = record.networks[0]
    lines = tuple({**line, "test_accuracy": None} for line in network.epochs)
    gap = NetworkRecord(role="teacher", arm="gap", seed=0, row=None, epochs=lines, reliability={})
    assert "gap" in _texts(learning_curves("teacher", {"gap": [gap], "standard": [network]}))


def test_pooled_bins_weigh_by_count() -> None:
    def network(count: int, confidence: float | None, accuracy: float | None) -> NetworkRecord:
        part = {"lower": 0.5, "upper": 1.0, "count": count, "confidence": confidence, "accuracy": accuracy}
        empty = {"lower": 0.0, "upper": 0.5, "count": 0, "confidence": None, "accuracy": None}
        reliability = {"test": [empty, part]}
        return NetworkRecord(role="teacher", arm="a", seed=count, row=None, epochs=(), reliability=reliability)

    networks = [network(1, 0.6, 1.0), network(3, 0.8, 0.0), network(0, None, None)]
    (pooled,) = pooled_bins(networks, "test")
    assert pooled == {"count": 4, "confidence": pytest.approx(0.75), "accuracy": pytest.approx(0.25)}
    assert pooled_bins(networks, "train") == []


def test_cost_chart_adds_up(make_run: Callable[..., Path]) -> None:
    record = read_run(make_run(seeds=2, num_epochs=2))
    chart = cost_chart(record.results["rows"])
    # Two teachers and three students, seeds 0 and 1: 2 * (61.5 + 62.5) + 3 * (21.25 + 22.25) = 378.5.
    assert chart.caption == "Means over seeds. All 10 networks together took 378 seconds."
    assert {"62", "22"} <= set(_texts(chart))
    # Without the teacher that was taken from the other's training: 378.5 - 61.5 - 62.5 = 254.5.
    chart = cost_chart(record.results["rows"], earlier_states=["soteacher"])
    assert chart.caption.startswith("Means over seeds. All 8 networks together took 254 seconds. Teachers that")


def test_accuracy_chart_stays_within_what_is_possible(make_run: Callable[..., Path]) -> None:
    record = read_run(make_run(seeds=1, num_epochs=1))
    wide = [{**entry, "accuracy_ci95": [-3.0, 4.0]} for entry in record.results["summary"]]
    ticks = [text for text in _texts(accuracy_chart(wide, record.results["rows"])) if re.fullmatch(r"\W?\d+", text)]
    assert ticks == ["0", "20", "40", "60", "80", "100"]
