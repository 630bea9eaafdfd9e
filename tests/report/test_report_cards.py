import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from scipy import stats

from soteacher.report.cards import (
    card_table,
    carded_teachers,
    correlation_notes,
    correlation_table,
    correlation_words,
    figure_words,
    flat_figures,
    in_its_unit,
    taught_students,
    too_few_points,
)
from soteacher.report.record import RunRecord, read_run
from soteacher.statistics import RankCorrelation


def _students(record: RunRecord) -> dict[str, Any]:
    return {one.name: one for one in taught_students(record, carded_teachers(record))}


def test_figures_are_named_by_their_path() -> None:
    figures = {"test": {"nll": 0.5, "ece": None}, "distance": {"train": {"kl": 1}}, "views": {}}
    assert flat_figures({"schema": 1, "figures": figures}) == {"test.nll": 0.5, "distance.train.kl": 1.0}
    assert flat_figures({}) == flat_figures({"figures": None}) == {}


def test_figures_have_words_with_their_units() -> None:
    assert figure_words("train.accuracy") == "train: accuracy, %"
    assert figure_words("temperature.test") == "test: fitted temperature"
    assert figure_words("distance.train.kl").startswith("distance, train: KL")
    assert "out-of-fold" in figure_words("distance.train_out_of_fold.mse")
    assert figure_words("lipschitz.largest_slope") == "largest slope found"
    assert figure_words("mine.own_figure") == "mine: own figure"
    assert in_its_unit("train.accuracy", 0.25) == 25
    assert in_its_unit("test.ece", 0.25) == in_its_unit("mine.own_figure", 0.25) == 0.25


def test_every_figure_of_the_table_has_words() -> None:
    from soteacher.report.cards import _IN_TABLE

    assert len(set(map(figure_words, _IN_TABLE))) == len(_IN_TABLE)
    assert all(figure_words(name) != name.replace(".", ": ").replace("_", " ") for name in _IN_TABLE)


def test_card_table_holds_means_of_the_figures_that_some_card_has(make_judged_run: Callable[..., Path]) -> None:
    folder = make_judged_run(seeds=2)
    (folder / "teachers/soteacher/seed1/card.json").unlink()
    table = card_table(carded_teachers(read_run(folder)))
    columns = (
        "train.accuracy",
        "test.accuracy",
        "train.nll",
        "test.ece",
        "distance.train.kl",
        "lipschitz.largest_slope",
    )
    assert table.columns == ("arm", "seeds", *map(figure_words, columns))
    assert table.rows == (
        # Places 2 and 3 in the order of the folders, after the two of soteacher.
        ("standard", "2", "98.00", "87.10", "0.1250", "0.0325", "0.4950", "22.5"),
        ("soteacher", "1", "98.00", "87.00", "0.1000", "0.0300", "0.3000", "-"),
    )
    assert len(table.numeric) == len(table.columns)


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


def test_correlations_are_scipys_strongest_first(make_judged_run: Callable[..., Path]) -> None:
    student = _students(read_run(make_judged_run(seeds=3)))["kd"]
    assert next(iter(student.correlations)) == "distance.train.kl"
    assert "train.accuracy" not in student.correlations  # the same for all
    assert "lipschitz.largest_slope" not in student.correlations  # known for three
    strengths = [abs(one.value) for one in student.correlations.values()]
    assert strengths == sorted(strengths, reverse=True)
    accuracies = [point.accuracy for point in student.points]
    for name, found in student.correlations.items():
        wanted = stats.spearmanr([point.figures[name] for point in student.points], accuracies).statistic
        assert found.value == pytest.approx(wanted)
        assert found.count == 6


def test_correlation_table_has_a_row_for_each_figure(make_judged_run: Callable[..., Path]) -> None:
    folder = make_judged_run(seeds=3, students=("standard-kd", "soteacher-kd", "standard-dkd", "soteacher-dkd"))
    path = folder / "teachers/standard/seed2/card.json"
    card = json.loads(path.read_text())
    del card["figures"]["test"]["ece"]
    path.write_text(json.dumps(card))
    students = list(_students(read_run(folder)).values())
    table = correlation_table(students)
    assert table.columns == ("figure of the teacher", "kd, 6 points", "dkd, 6 points")
    assert table.rows[0][0] == figure_words("distance.train.kl")
    assert table.rows[0][1] == correlation_words(students[0].correlations["distance.train.kl"])
    cells = {row[0]: row[1] for row in table.rows}
    assert cells[figure_words("test.ece")].endswith("] of 5")
    assert len(table.rows) == 4
    notes = " ".join(correlation_notes(students))
    for part in ("not independent", "with few arms, here 2", "not a cause", "4 figures were looked at"):
        assert part in notes


def test_correlation_words() -> None:
    assert (
        correlation_words(RankCorrelation(value=-0.6239, interval=(-0.914, 0.0499), count=6)) == "-0.62 [-0.91, +0.05]"
    )
    assert correlation_words(RankCorrelation(value=-0.001, interval=(-0.9, 0.9), count=6)) == "+0.00 [-0.90, +0.90]"
    assert correlation_words(None) == correlation_words(RankCorrelation(value=None, interval=None, count=3)) == "-"


def test_too_few_points_says_how_many_there_are(make_judged_run: Callable[..., Path]) -> None:
    students = list(_students(read_run(make_judged_run(seeds=1))).values())
    assert students[0].correlations == {}
    assert too_few_points(students).endswith(
        "takes 4 teachers with a card that one student has learnt from; there are 2."
    )
    assert too_few_points([]).endswith("there are none.")
