import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats

from soteacher.report.cards import carded_teachers, figure_words
from soteacher.report.correlations import (
    MIN_DECISIVE_PAIRS,
    Point,
    TaughtStudent,
    arm_correlations,
    arm_means,
    correlation_notes,
    correlation_table,
    correlation_words,
    taught_students,
    too_few_arms,
)
from soteacher.report.record import RunRecord, read_run
from soteacher.statistics import RankCorrelation, rank_correlation


def _students(record: RunRecord) -> dict[str, Any]:
    return {one.name: one for one in taught_students(record, carded_teachers(record))}


def test_points_pair_a_teacher_with_the_student_of_its_seed(make_judged_run: Callable[..., Path]) -> None:
    record = read_run(make_judged_run(seeds=3, students=("standard-kd", "soteacher-kd", "soteacher-dkd", "alone")))
    students = _students(record)
    assert list(students) == ["kd", "dkd"]
    rows = {(row["arm"], row["seed"]): row["accuracy_last"] for row in record.results["rows"]}
    points = students["kd"].points
    assert [(one.arm, one.seed) for one in points] == [
        (arm, seed) for arm in ("standard", "soteacher") for seed in range(3)
    ]
    assert [one.accuracy for one in points] == [rows[f"{one.arm}-kd", one.seed] for one in points]
    assert [one.figures["distance.train.kl"] for one in points] == pytest.approx([0.5, 0.49, 0.5, 0.3, 0.29, 0.3])
    assert len(students["dkd"].points) == 3
    assert students["dkd"].correlations == {}


def test_students_are_told_apart_by_name_and_method(make_judged_run: Callable[..., Path]) -> None:
    folder = make_judged_run(seeds=2)
    path = folder / "results.json"
    results = json.loads(path.read_text())
    for row in results["rows"]:
        if row["arm"] == "soteacher-kd":
            row["method"] = "nkd"
    path.write_text(json.dumps(results))
    assert list(_students(read_run(folder))) == ["kd", "kd (method nkd)"]


def test_a_teacher_from_a_file_is_paired_with_the_mean_over_seeds(make_judged_run: Callable[..., Path]) -> None:
    folder = make_judged_run(seeds=3)
    config = folder / "config.yaml"
    config.write_text(config.read_text().replace("  soteacher:\n", "  soteacher:\n    file: x.pth\n"))
    for seed in (1, 2):
        (folder / f"teachers/soteacher/seed{seed}/card.json").unlink()
    points = _students(read_run(folder))["kd"].points
    assert [(one.arm, one.seed) for one in points] == [
        ("standard", 0),
        ("standard", 1),
        ("standard", 2),
        ("soteacher", 0),
    ]
    assert points[-1].accuracy == pytest.approx((0.86 + 0.863 + 0.86) / 3)


def _point(arm: str, seed: int, accuracy: float, **figures: float) -> Point:
    return Point(arm=arm, seed=seed, figures=figures, accuracy=accuracy)


def test_an_arm_is_the_mean_of_its_networks_that_have_the_figure() -> None:
    points = (_point("a", 0, 0.5, x=1.0), _point("b", 0, 0.25, x=7.0), _point("a", 1, 0.75, x=2.0), _point("a", 2, 0.9))
    assert arm_means(points, "x") == {"a": (1.5, 0.625), "b": (7.0, 0.25)}
    assert arm_means(points, "y") == {}


def test_equal_means_have_equal_ranks() -> None:
    points = [_point("a", seed, 0.1 * (seed + 1), x=0.98) for seed in range(5)]
    points += [_point("b", seed, 0.3, x=0.98) for seed in range(7)]
    assert len(set(arm_means(points, "x").values())) == 1


def test_correlation_is_over_arms_by_hand() -> None:
    # Means of x: 1, 2, 3, 4; of the accuracy: 0.3, 0.2, 0.5, 0.6. Ranks differ by 1, 1, 0, 0: rho = 1 - 6 * 2 / 60.
    # Within each arm the accuracy falls as x rises, which decides nothing.
    means = {"a": (1, 0.3), "b": (2, 0.2), "c": (3, 0.5), "d": (4, 0.6)}
    points = [
        _point(arm, seed, accuracy - 0.05 * seed, x=x + 9.0 * seed, y=1.0 if arm == "a" else 2.0 * (arm != "d"))
        for arm, (x, accuracy) in means.items()
        for seed in (-1, 0, 1)
    ]
    found = arm_correlations(points)
    assert found["x"].value == pytest.approx(0.8)
    assert found["x"].count == 4
    half_width = 1.959964 * np.sqrt(1 + 0.8**2 / 2)
    assert found["x"].interval == pytest.approx(np.tanh(np.arctanh(0.8) + half_width * np.array([-1, 1])), abs=1e-6)
    assert list(arm_correlations([point for point in points if point.arm != "a"])) == []
    assert found["y"].value == pytest.approx(stats.spearmanr([1, 2, 2, 0], [0.3, 0.2, 0.5, 0.6]).statistic)


def test_seeds_do_not_make_a_correlation_surer() -> None:
    points = [_point(arm, 0, 0.1 * place, x=float(place)) for place, arm in enumerate("abcdefg")]
    more = [_point(point.arm, seed, point.accuracy, x=point.figures["x"]) for point in points for seed in range(10)]
    assert arm_correlations(more) == arm_correlations(points)


def test_arms_without_a_connection_seldom_seem_to_have_one() -> None:
    generator = np.random.default_rng(0)
    excluded = 0
    for _ in range(400):
        effects = generator.normal(size=(2, 7))  # of the arm on the figure, and on accuracy
        points = [
            _point(str(arm), seed, effects[1, arm] + 0.3 * generator.normal(), x=effects[0, arm] + generator.normal())
            for arm in range(7)
            for seed in range(5)
        ]
        lower, upper = arm_correlations(points)["x"].interval or (-1, 1)
        excluded += not lower <= 0 <= upper
    assert excluded <= 0.08 * 400


def test_few_pairs_have_intervals_that_hold_0() -> None:
    for count in range(4, 10):
        interval = rank_correlation(list(range(count)), list(range(count))).interval
        assert interval is not None
        assert (interval[0] <= 0) == (count < MIN_DECISIVE_PAIRS)


def test_correlations_are_scipys_strongest_first(make_ranked_run: Callable[..., Path]) -> None:
    student = _students(read_run(make_ranked_run()))["kd"]
    assert next(iter(student.correlations)) == "distance.train.kl"
    assert student.correlations["distance.train.kl"].value == -1
    assert "test.accuracy" not in student.correlations  # the same for all
    assert "lipschitz.largest_slope" not in student.correlations  # three arms have it
    strengths = [abs(one.value) for one in student.correlations.values()]
    assert strengths == sorted(strengths, reverse=True)
    for name, found in student.correlations.items():
        figures = np.array([point.figures[name] for point in student.points]).reshape(6, 3).mean(axis=1)
        accuracies = np.array([point.accuracy for point in student.points]).reshape(6, 3).mean(axis=1)
        assert found.value == pytest.approx(stats.spearmanr(figures.round(12), accuracies.round(12)).statistic)
        assert found.count == 6


def test_correlation_table_has_a_row_for_each_figure(make_ranked_run: Callable[..., Path]) -> None:
    folder = make_ranked_run(students=("kd", "dkd"))
    for path in (folder / "teachers/wide").glob("seed*/card.json"):
        card = json.loads(path.read_text())
        del card["figures"]["test"]["ece"]
        path.write_text(json.dumps(card))
    students = list(_students(read_run(folder)).values())
    table = correlation_table(students)
    assert table.columns == ("figure of the teacher", "kd, 6 kinds of teachers", "dkd, 6 kinds of teachers")
    assert table.rows[0][0] == figure_words("distance.train.kl")
    assert table.rows[0][1] == correlation_words(students[0].correlations["distance.train.kl"])
    cells = {row[0]: row[1] for row in table.rows}
    assert cells[figure_words("test.ece")].endswith("] of 5")
    assert len(table.rows) == 3
    notes = " ".join(correlation_notes(students))
    for part in ("over kinds of teachers", "Below 6 kinds", "not a cause", "3 figures were looked at"):
        assert part in notes


def test_correlation_words() -> None:
    assert (
        correlation_words(RankCorrelation(value=-0.6239, interval=(-0.914, 0.0499), count=6)) == "-0.62 [-0.91, +0.05]"
    )
    assert correlation_words(RankCorrelation(value=-0.001, interval=(-0.9, 0.9), count=6)) == "+0.00 [-0.90, +0.90]"
    assert correlation_words(None) == correlation_words(RankCorrelation(value=None, interval=None, count=3)) == "-"


@pytest.mark.parametrize(("arms", "seeds"), [(("standard", "soteacher"), 3), (("standard", "soteacher", "mse"), 5)])
def test_too_few_arms_says_how_many_kinds_there_are(
    make_ranked_run: Callable[..., Path], arms: tuple[str, ...], seeds: int
) -> None:
    students = list(_students(read_run(make_ranked_run(arms=arms, seeds=seeds, students=("kd", "dkd")))).values())
    assert students[0].correlations == {}
    assert too_few_arms(students) == [
        "The accuracy of kd and of dkd is not set against these figures: that takes 4 kinds of teachers (arms) with a "
        f"card that it has learnt from; there are {len(arms)} ({', '.join(arms)})."
    ]


def test_too_few_arms_names_the_student_beside_others_that_have_enough() -> None:
    points = [_point(arm, 0, 0.1 * place, x=float(place)) for place, arm in enumerate("abcd")]
    alike = [_point(arm, 0, 0.5, x=1.0) for arm in "abcd"]
    students = [
        TaughtStudent(name=name, points=tuple(own), correlations=arm_correlations(own))
        for name, own in (("kd", points), ("route", points[:1]), ("same", alike))
    ]
    assert too_few_arms(students) == [
        "The accuracy of route is not set against these figures: that takes 4 kinds of teachers (arms) with a card "
        "that it has learnt from; there is 1 (a).",
        "The accuracy of same is not set against these figures: its teachers do not differ in what they have in "
        "common, or all taught it equally well.",
    ]
    assert too_few_arms(students[:1]) == []
    assert "no student has learnt from a teacher with a card" in too_few_arms([])[0]


def test_arms_of_the_same_networks_are_one_pair(make_ranked_run: Callable[..., Path]) -> None:
    folder = make_ranked_run()
    for seed in range(3):
        card = json.loads((folder / f"teachers/standard/seed{seed}/card.json").read_text())
        text = json.dumps({**card, "network": {"checksum": f"feed{seed}"}})
        for arm in ("standard", "wide"):
            (folder / f"teachers/{arm}/seed{seed}/card.json").write_text(text)
    student = _students(read_run(folder))["kd"]
    assert student.arms == ("standard = wide", "soteacher", "mse", "smooth", "early")
    points = [point for point in student.points if point.arm == "standard = wide"]
    assert [point.seed for point in points] == [0, 1, 2]
    # Students of both: 0.83 and 0.86, and 0.03 more for each seed.
    assert [point.accuracy for point in points] == pytest.approx([0.845, 0.875, 0.905])
    assert {found.count for found in student.correlations.values()} == {5}
