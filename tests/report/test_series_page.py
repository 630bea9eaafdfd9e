import json
import re
from collections.abc import Callable, Mapping, Sequence
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.stats
import yaml

from soteacher.errors import InputError
from soteacher.report import series_charts
from soteacher.report.series_charts import axis_chart
from soteacher.report.series_figures import (
    ACCURACY,
    NLL,
    QUANTITIES,
    along,
    arm_means,
    by_arm,
    closeness,
    pairs_by_point,
    reference_teacher,
)
from soteacher.report.series_page import write_series_report
from soteacher.report.series_tables import (
    correlation_sentences,
    difference_table,
    tally_table,
    trend_table,
    within_points_table,
)
from soteacher.statistics import summarise

DISTANCE = QUANTITIES[0]
SEEDS = (0, 1, 2)


def _row(role: str, arm: str, seed: int, accuracy: float, *, teacher: str | None = None, **more: Any) -> dict[str, Any]:
    return {
        "role": role, "arm": arm, "teacher_arm": teacher, "method": "m", "model": "n", "data": "d", "seed": seed,
        "accuracy_last": accuracy, "train_accuracy": accuracy, "nll": 1 - accuracy, **more,
    }  # fmt: skip


def distance_of(arm: str, level: int, seed: int) -> float:
    """``soteacher`` is 0.02 closer, but for a little noise; both are farther at a higher level."""
    return 0.1 * (level + 1) + 0.01 * seed - (0.02 + 0.001 * (seed % 2)) * (arm == "soteacher")


def accuracy_of(arm: str, level: int, seed: int) -> float:
    return 0.8 - 0.05 * level + 0.01 * seed + (0.03 + 0.002 * (seed % 2)) * (arm == "soteacher")


def _point(name: str, on: dict[str, Any], level: int, *, cards: bool = True) -> dict[str, Any]:
    rows = []
    for seed in SEEDS:
        for arm in ("standard", "soteacher"):
            card = {"card": {"distance.train.mse": distance_of(arm, level, seed)}} if cards else {}
            rows.append(_row("teacher", arm, seed, 0.9, **card))
        for arm in ("standard", "soteacher"):
            rows.append(_row("student", f"{arm}-kd", seed, accuracy_of(arm, level, seed), teacher=arm))
        rows.append(_row("student", "alone", seed, 0.7))
    baselines = {"soteacher-kd": "standard-kd", "alone": "standard-kd"}
    environment = {"python": "3.11", "torch": "2.13", "device": "cpu", "threads": 1, "commit": None}
    return {
        "name": name, "folder": f"points/{name}", "on": on, "environment": environment, "rows": rows,
        "summary": summarise(rows, baselines),
    }  # fmt: skip


def make_results(**over: Any) -> dict[str, Any]:
    points = [
        _point("base", {"noise": 0.2, "model": "wide"}, 1),
        _point("noise-0.1", {"noise": 0.1}, 0),
        _point("noise-0.4", {"noise": 0.4}, 2),
    ]
    axes = {"noise": [0.1, 0.2, 0.4], "model": ["wide"]}
    return {
        "schema": 1, "kind": "series", "soteacher_version": "0.1.0", "recipe": "theory", "axes": axes,
        "num_points": 3, "points": points,
    } | over  # fmt: skip


@pytest.fixture
def make_series(tmp_path: Path) -> Callable[..., Path]:
    def make(results: dict[str, Any] | None = None, description: str = "What theory says.") -> Path:
        reading = "less noise is closer"
        config = {
            "name": "theory", "description": description,
            "vary": {"noise": {"path": "data.noise", "label": "noise & more", "reading": reading}},
            "study": {"data": {"source": "mixed_feature"}, "teachers": {"standard": {"model": "n"}}},
        }  # fmt: skip
        (tmp_path / "series.yaml").write_text(yaml.safe_dump(config))
        (tmp_path / "results.json").write_text(json.dumps(results or make_results()))
        return tmp_path

    return make


def test_points_of_an_axis_come_in_its_order_and_the_base_is_among_them() -> None:
    assert [(value, point["name"]) for value, point in along(make_results(), "noise")] == [
        ("0.1", "noise-0.1"), ("0.2", "base"), ("0.4", "noise-0.4"),
    ]  # fmt: skip
    assert [point["name"] for _, point in along(make_results(), "model")] == ["base"]


def test_figures_are_read_from_the_row_or_its_card() -> None:
    point = make_results()["points"][0]
    assert by_arm(point, "teacher", "accuracy_last")["standard"] == dict.fromkeys(SEEDS, 0.9)
    assert by_arm(point, "teacher", "distance.train.mse")["standard"] == pytest.approx({0: 0.2, 1: 0.21, 2: 0.22})
    assert by_arm(point, "student", "distance.train.mse") == {}


def test_the_reference_is_the_baselines_teacher() -> None:
    results = make_results()
    assert reference_teacher(results) == "standard"
    for point in results["points"]:
        point["summary"] = summarise(point["rows"], {"standard-kd": "soteacher-kd"})
    assert reference_teacher(results) == "soteacher"
    for point in results["points"]:
        point["summary"] = []
        point["rows"] = [row for row in point["rows"] if row["arm"] != "standard"]
    assert reference_teacher(results) == "soteacher"
    assert reference_teacher({"points": []}) is None


def test_closeness_is_the_distance_where_cards_know_it() -> None:
    assert closeness(make_results()).key == "distance.train.mse"
    assert closeness(make_results(points=[_point("base", {"noise": 0.2}, 1, cards=False)])).key == "nll"


def test_pairs_are_differences_within_a_point_and_seed() -> None:
    points = pairs_by_point(make_results(), "kd", ACCURACY)
    assert len(points) == 3
    for point in points:
        assert list(point) == ["soteacher"]
        assert np.array(point["soteacher"]) == pytest.approx(np.array([(-0.02, 0.03), (-0.021, 0.032), (-0.02, 0.03)]))
    (point, *_) = pairs_by_point(make_results(), "kd", NLL)
    assert [gain for _, gain in point["soteacher"]] == pytest.approx([-0.03, -0.032, -0.03])
    assert pairs_by_point(make_results(), "other", NLL) == [{}, {}, {}]


def test_a_teacher_is_the_mean_of_its_pairs_over_seeds_and_points() -> None:
    points = [{"a": [(1.0, 0.25), (2.0, 0.75)], "b": [(4.0, 1.0)]}, {}, {"a": [(6.0, 2.0)]}]
    assert arm_means(points) == {"a": (3.0, 1.0), "b": (4.0, 1.0)}
    assert arm_means([]) == {}
    tied = arm_means([{"a": [(0.1 + 0.2, 0.0)], "b": [(0.3, 0.0)]}])
    assert tied["a"] == tied["b"]


def test_difference_table_is_that_of_scipy() -> None:
    table = difference_table(make_results(), "noise")
    assert len(table.rows) == 6
    assert all(len(row) == len(table.columns) == len(table.numeric) for row in table.rows)
    assert table.rows[0] == ("0.1", "standard", "0.1100", "-", "-", "81.00", "-", "-")
    own, base = ([distance_of(arm, 1, seed) for seed in SEEDS] for arm in ("soteacher", "standard"))
    ends = scipy.stats.ttest_rel(own, base).confidence_interval()
    distance = f"{np.mean(own) - np.mean(base):+.4f} [{ends.low:+.4f}, {ends.high:+.4f}]"
    own, base = ([100 * accuracy_of(arm, 1, seed) for seed in SEEDS] for arm in ("soteacher", "standard"))
    mean, ends = np.mean(own), scipy.stats.ttest_rel(own, base).confidence_interval()
    accuracy = f"{mean - np.mean(base):+.2f} [{ends.low:+.2f}, {ends.high:+.2f}]"
    shown = dict(
        zip(("value", "arm", "mean", "distance", "verdict", "accuracy", "gain", "said"), table.rows[3], strict=True)
    )
    assert (shown["value"], shown["arm"], shown["mean"]) == ("0.2", "soteacher", f"{0.21 - 0.061 / 3:.4f}")
    assert (shown["distance"], shown["verdict"]) == (distance, "better")  # less distance is better
    assert (shown["accuracy"], shown["gain"], shown["said"]) == (f"{mean:.2f}", accuracy, "better")


def test_trend_table_compares_the_ends_of_the_axis_seed_by_seed() -> None:
    table = trend_table(make_results(), "noise")
    assert table.columns[2:4] == ("at 0.1", "at 0.4")
    shown = {row[0]: row[2:] for row in table.rows}
    assert list(shown) == [
        "teacher standard",
        "teacher soteacher",
        "student standard-kd",
        "student soteacher-kd",
        "student alone",
    ]
    assert shown["teacher standard"] == ("0.1100", "0.3100", "+0.2000 [+0.2000, +0.2000]", "rises")
    assert shown["student standard-kd"] == ("81.00", "71.00", "-10.00 [-10.00, -10.00]", "falls")
    assert shown["student alone"] == ("70.00", "70.00", "+0.00 [+0.00, +0.00]", "inconclusive")
    assert trend_table(make_results(), "model").rows == ()  # one value has no other end


def test_tally_counts_the_points() -> None:
    table = tally_table(make_results())
    judged = ("teacher", "kd, accuracy", "kd, NLL")
    assert table.columns == ("teacher", *(f"{one}: better / worse / inconclusive" for one in judged))
    assert table.rows == (("soteacher", "3 / 0 / 0", "3 / 0 / 0", "3 / 0 / 0"),)


DISTANCES = {"standard": (0.5, 0.5), "a": (0.1, 0.3), "b": (0.2, 0.4), "c": (0.5, 0.3), "d": (0.2, 0.8)}
"""At two points."""
ACCURACIES = {"standard": (0.8, 0.6), "a": (0.9, 0.8), "b": (0.7, 0.6), "c": (0.7, 0.7), "d": (0.8, 0.5)}


def ranked(
    distances: Mapping[str, Sequence[float]], accuracies: Mapping[str, Sequence[float]], noise: Any = None
) -> dict[str, Any]:
    """Return results of teachers and their students at some points, by arm; noise is of a point, an arm and a seed."""
    count = len(distances["standard"])
    noise = np.zeros((2, count, len(distances), len(SEEDS))) if noise is None else noise
    points = []
    for point in range(count):
        rows = []
        for place, arm in enumerate(distances):
            for seed in SEEDS:
                card = {"distance.train.mse": distances[arm][point] + 0.01 * seed + noise[0, point, place, seed]}
                accuracy = accuracies[arm][point] + 0.02 * seed + noise[1, point, place, seed]
                rows.append(_row("teacher", arm, seed, 0.9, card=card))
                rows.append(_row("student", f"{arm}-kd", seed, accuracy, teacher=arm))
        points.append({"name": str(point), "on": {"noise": point}, "rows": rows, "summary": []})
    return {"axes": {"noise": list(range(count))}, "points": points}


def test_correlation_is_over_kinds_of_teachers_by_hand() -> None:
    # Mean differences to standard: distances -0.3, -0.2, -0.1, 0; accuracies 0.15, -0.05, 0, -0.05. Ranks 1 2 3 4 and
    # 4 1.5 3 1.5: their deviations from 2.5 multiply to -3 over sqrt(5 * 4.5).
    rho = -3 / np.sqrt(5 * 4.5)
    by_accuracy, by_nll = correlation_sentences(ranked(DISTANCES, ACCURACIES))
    middle, half_width = np.arctanh(rho), 1.959964 * np.sqrt(1 + rho**2 / 2)
    ends = np.tanh([middle - half_width, middle + half_width])
    assert by_accuracy["reason"] == (
        "kd: over 4 kinds of teachers, each the mean of its differences to standard at the same point and seed, the "
        "teacher's squared distance to the true distribution and the student's test accuracy have the rank correlation "
        f"{rho:+.2f} [{ends[0]:+.2f}, {ends[1]:+.2f}]:"
    )
    assert f"student's test NLL have the rank correlation {-rho:+.2f} [" in by_nll["reason"]
    assert (by_accuracy["verdict"], by_nll["verdict"]) == ("inconclusive", "inconclusive")


def test_within_points_table_describes_single_points_by_hand() -> None:
    # Ranks with standard. First: distances 4.5 1 2.5 4.5 2.5, accuracies 3.5 5 1.5 1.5 3.5: deviations multiply to
    # 0.75 - 4 + 0.75 - 2.25 - 0.25, over sqrt(9 * 9). Second: 4 1.5 3 1.5 5 and 2.5 5 2.5 4 1: -0.5 - 3 - 1.5 - 4.
    first, second = -5 / 9, -9 / 9.5
    mean = (first + second) / 2
    results = ranked(DISTANCES, ACCURACIES)
    assert within_points_table(results).rows == (
        ("kd", "accuracy", f"{mean:+.2f}", "0 of 2"),
        ("kd", "NLL", f"{-mean:+.2f}", "2 of 2"),
    )
    results["points"][0]["rows"] = results["points"][0]["rows"][: 6 * 3]  # three teachers
    assert within_points_table(results).rows[0] == ("kd", "accuracy", f"{second:+.2f}", "0 of 1")
    assert within_points_table(make_results()).rows == ()


@pytest.mark.parametrize(
    ("sign", "verdicts"),
    [(-1, ["they go against each other", "they go together"]), (1, ["they go together", "they go against each other"])],
)
def test_a_correlation_is_called_what_it_is(sign: int, verdicts: list[str]) -> None:
    places = dict(enumerate(["standard", *"abcdef"]))
    distances = {arm: (0.1 * place, 0.1 * place) for place, arm in places.items()}
    accuracies = {arm: (0.5 + sign * 0.01 * place,) * 2 for place, arm in places.items()}
    assert [sentence["verdict"] for sentence in correlation_sentences(ranked(distances, accuracies))] == verdicts


def test_too_few_kinds_of_teachers_are_said_once() -> None:
    expected = (
        "kd: a rank correlation with the teacher's squared distance to the true distribution takes 4 kinds of teachers "
        "(arms) besides standard; there is 1:"
    )
    assert correlation_sentences(make_results()) == [{"reason": expected, "verdict": "not judged"}]
    three = {arm: DISTANCES[arm] for arm in ("standard", "a", "b", "c")}
    (sentence,) = correlation_sentences(ranked(three, ACCURACIES))
    assert sentence["reason"].endswith("there are 3:")


def test_teachers_without_a_connection_seldom_seem_to_have_one() -> None:
    generator = np.random.default_rng(0)
    arms, excluded, runs = ("standard", *"abcdefg"), 0, 150
    for _ in range(runs):
        effects = generator.normal(size=(2, len(arms), 1)) + 0.5 * generator.normal(size=(2, len(arms), 3))
        distances, accuracies = (dict(zip(arms, own, strict=True)) for own in effects)
        noise = 0.2 * generator.normal(size=(2, 3, len(arms), len(SEEDS)))
        sentence, _ = correlation_sentences(ranked(distances, accuracies, noise))
        excluded += sentence["verdict"] != "inconclusive"
    assert excluded <= 0.08 * runs


def test_a_series_without_pairs_says_nothing_of_them() -> None:
    results = make_results(points=[])
    assert correlation_sentences(results) == []
    assert tally_table(results).rows == ()


def test_chart_has_every_arm_value_and_seed() -> None:
    results = make_results()
    chart = axis_chart(results, "noise", DISTANCE, label="noise", index=3)
    assert chart is not None
    assert chart.title == "Distance of the teachers on training inputs, by noise"
    for word in (">standard<", ">soteacher<", ">0.1<", ">0.2<", ">0.4<", ">noise<", 'id="series-3-'):
        assert word in chart.svg
    assert axis_chart(results, "noise", QUANTITIES[1], label="noise", index=0) is None
    students = axis_chart(results, "noise", ACCURACY, label="noise", index=1)
    assert students is not None
    for word in (">standard-kd<", ">soteacher-kd<", ">alone<"):
        assert word in students.svg


def test_curves_of_many_arms_are_told_apart() -> None:
    arms = [f"t{number}" for number in range(14)]
    rows = [_row("teacher", arm, 0, 0.5) for arm in arms]
    rows += [_row("student", f"{arm}-{student}", 0, 0.5, teacher=arm) for arm in arms for student in ("kd", "dkd")]
    rows += [_row("student", "alone", 0, 0.5)]
    results = {"points": [{"rows": rows}]}
    teachers = series_charts._styles(results, "teacher", arms)
    students = series_charts._styles(results, "student", [row["arm"] for row in rows if row["role"] == "student"])
    assert len(set(teachers.values())) == 14
    assert len(set(students.values())) == 29
    assert students["t3-kd"] == teachers["t3"]
    assert students["t3-dkd"][:2] == teachers["t3"][:2]


class _Text(HTMLParser):
    def __init__(self, page: str) -> None:
        super().__init__()
        self.words: list[str] = []
        self.ids: list[str] = []
        self.feed(page)
        self.text = " ".join(" ".join(self.words).split())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        del tag
        self.ids += [value or "" for name, value in attrs if name == "id"]

    def handle_data(self, data: str) -> None:
        self.words.append(data)


def test_page_shows_the_whole_series(make_series: Callable[..., Path]) -> None:
    folder = make_series(description="<script>alert(1)</script>")
    path = write_series_report(folder)
    assert path == folder / "report.html"
    page = path.read_text(encoding="utf-8")
    shown = _Text(page)
    assert len(shown.ids) == len(set(shown.ids))
    for part in (
        "soteacher 0.1.0; python 3.11; torch 2.13; device cpu; threads 1",
        "Expected: less noise is closer",
        "Along noise & more",
        "Along model",
        "soteacher 3 / 0 / 0 3 / 0 / 0 3 / 0 / 0",
        "Distance of the teachers on training inputs, by noise & more",
        "teacher standard squared distance to the true distribution 0.1100 0.3100 +0.2000 [+0.2000, +0.2000] rises",
        "Against standard, point by point",
        "source mixed_feature",
    ):
        assert part in shown.text
    assert "<script" not in page
    assert "not finished" not in shown.text
    assert 'href="points/noise-0.1/report.html"' in page
    assert set(re.findall(r"https?://[^\"' ]+", page)) == {"http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"}
    assert write_series_report(folder).read_text(encoding="utf-8") == page


def test_page_says_what_a_correlation_is_of(make_series: Callable[..., Path]) -> None:
    results = make_results()
    for place, arm in enumerate("abcd"):
        for level, point in enumerate(results["points"]):
            for seed in SEEDS:
                card = {"distance.train.mse": distance_of("standard", level, seed) + 0.01 * place}
                point["rows"].append(_row("teacher", arm, seed, 0.9, card=card))
                point["rows"].append(_row("student", f"{arm}-kd", seed, 0.5 - 0.01 * place, teacher=arm))
    page = write_series_report(make_series(results)).read_text(encoding="utf-8")
    shown = _Text(page).text
    for part in (
        "kd: over 5 kinds of teachers",
        "This describes the points and proves nothing",
        "points where it is above 0 kd accuracy",
        "Fewer than 4 kinds give no correlation, and below 6",
    ):
        assert part in shown
    assert '<p class="verdict inconclusive">' in page
    page = write_series_report(make_series()).read_text(encoding="utf-8")
    assert "there is 1: not judged" in _Text(page).text
    assert "Within each point" not in page


def test_page_of_an_unfinished_series_says_so(make_series: Callable[..., Path]) -> None:
    shown = _Text(write_series_report(make_series(make_results(num_points=7))).read_text()).text
    assert "This series is not finished. What follows is from the 3 of 7 points" in shown
    shown = _Text(write_series_report(make_series(make_results(points=[]))).read_text()).text
    assert "from the 0 of 3 points" in shown
    assert "There are not enough networks to compare." in shown


@pytest.mark.parametrize(
    ("text", "words"),
    [(None, "holds no series that can be read"), ("{", "holds no series that can be read"), ("[]", "of schema 1"),
     ('{"kind": "series", "schema": 2}', "of schema 1"), ('{"schema": 1, "rows": []}', "of schema 1")],
)  # fmt: skip
def test_what_is_no_series_is_refused(make_series: Callable[..., Path], text: str | None, words: str) -> None:
    folder = make_series()
    (folder / "results.json").unlink() if text is None else (folder / "results.json").write_text(text)
    with pytest.raises(InputError, match=words):
        write_series_report(folder)
