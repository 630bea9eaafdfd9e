import re
from typing import Any
from xml.etree import ElementTree

from soteacher.report.charts import COLOURS, MARKERS
from soteacher.report.small_panel import SHAPES, Mark, small_panel

SVG = "{http://www.w3.org/2000/svg}"


def _mark(across: float, up: float, **others: Any) -> Mark:
    return Mark(**{"across": across, "up": up, "colour": COLOURS[0], "shape": "o", "title": "a", **others})


def _centres(svg: str) -> list[tuple[float, float]]:
    return [(float(x), float(y)) for x, y in re.findall(r'fill="#\w+" d="M([\d.]+) ([\d.]+)m', svg)]


def test_marks_lie_between_the_ends_that_are_written_out() -> None:
    svg = small_panel([_mark(0.25, 80.0), _mark(0.5, 82.0), _mark(0.75, 84.0)], title="x")
    first, middle, last = _centres(svg)
    assert first[0] < middle[0] < last[0]
    assert first[1] > middle[1] > last[1]  # upwards
    assert middle == ((first[0] + last[0]) / 2, (first[1] + last[1]) / 2)
    texts = [element.text for element in ElementTree.fromstring(f'<g xmlns="{SVG[1:-1]}">{svg}</g>').iter(f"{SVG}text")]
    assert texts == ["84.00", "80.00", "0.2500", "0.7500"]


def test_equal_values_lie_in_the_middle() -> None:
    (lower, upper) = _centres(small_panel([_mark(1.0, 1.0), _mark(1.0, 2.0)], title="x"))
    (left, right) = _centres(small_panel([_mark(1.0, 1.0), _mark(2.0, 1.0)], title="x"))
    assert lower[0] == upper[0] == (left[0] + right[0]) / 2


def test_every_marker_has_a_shape_and_names_are_escaped() -> None:
    assert set(SHAPES) == set(MARKERS)
    svg = small_panel([_mark(1.0, 1.0, title="<b> & c", shape=shape) for shape in MARKERS], title='"<i>"')
    root = ElementTree.fromstring(svg)
    assert root.attrib["aria-label"] == '"<i>"'
    assert [element.text for element in root.iter("title")] == ["<b> & c"] * len(MARKERS)
