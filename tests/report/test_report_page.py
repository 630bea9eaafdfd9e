import json
import os
import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path

import pytest

from soteacher.errors import InputError
from soteacher.report import page, write_report
from soteacher.report.facts import run_facts

VOID = {"meta", "br"}


class _Page(HTMLParser):
    """Checks that every element is closed where it should be, and keeps ids and text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str] = []
        self.words: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []
        assert len(self.ids) == len(set(self.ids))
        self.text = " ".join(" ".join(self.words).split())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.ids += [value or "" for name, value in attrs if name == "id"]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        del tag
        self.ids += [value or "" for name, value in attrs if name == "id"]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words.append(data)


def _page(folder: Path) -> _Page:
    return _Page(write_report(folder).read_text(encoding="utf-8"))


def test_write_report_shows_the_whole_run(make_run: Callable[..., Path]) -> None:
    folder = make_run()
    os.utime(folder / "results.json", (1_700_000_000, 1_700_000_000))
    assert write_report(folder) == folder / "report.html"
    text = _page(folder).text
    for part in (
        "fashion-quick A quick look at what a student-oriented teacher does",
        "Results of 2023-11-14 22:13 UTC; soteacher 0.1.0; python 3.11.9; torch 2.13.0; device cpu; threads 2",
        "soteacher-kd: 86.10 % [85.67, 86.53] over 3 seeds; +2.00 points [+2.00, +2.00] against standard-kd: better",
        "against standard-kd: inconclusive",
        "standard-kd: 84.10 % [83.67, 84.53] over 3 seeds (baseline)",
        "source fashion_mnist, train size 10000, test size 2000",
        "model wrn_40_2, method soteacher, terms (cross entropy, lipschitz, consistency)",
        "Evaluated on 1,015 test images and 1,015 train images",
        "Student accuracy by arm",
        "Learning curves of the teachers",
        "Learning curves of the students",
        "Reliability of soteacher",
        "Training time by arm",
        "Every network",
        "How to read this",
    ):
        assert part in text
    assert "not finished" not in text


def test_write_report_needs_nothing_from_outside(make_run: Callable[..., Path]) -> None:
    text = write_report(make_run(seeds=1, num_epochs=2)).read_text(encoding="utf-8")
    assert set(re.findall(r"https?://[^\"' ]+", text)) == {"http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"}
    for tag in ("<script", "<link", "<img", "<iframe", "@import", "src="):
        assert tag not in text
    assert '<meta name="viewport"' in text
    assert "@media print" in text


def test_write_report_is_the_same_every_time(make_run: Callable[..., Path]) -> None:
    folder = make_run(seeds=1, num_epochs=2)
    first = write_report(folder).read_bytes()
    assert write_report(folder).read_bytes() == first
    assert not [path for path in folder.iterdir() if path.suffix == ".part"]


def test_write_report_escapes_what_the_user_named(make_run: Callable[..., Path]) -> None:
    name = "<script>alert(1)</script>&\"'"
    folder = make_run(name=name, teachers=("<b>",), students=("<b>-kd",), seeds=1, num_epochs=2)
    text = write_report(folder).read_text(encoding="utf-8")
    assert "<script" not in text
    assert "<b>" not in text
    assert name in _Page(text).text


@pytest.mark.parametrize(
    ("settings", "shown", "hidden"),
    [
        ({"teachers": (), "students": ()}, "No student has been trained yet.", "Every network"),
        ({"students": ()}, "Learning curves of the teachers", "Learning curves of the students"),
        (
            {"teachers": (), "students": ("alone",)},
            "no common seed with standard-kd",
            "Learning curves of the teachers",
        ),
        (
            {"teachers": ("standard",), "students": ("standard-kd",)},
            "No arm has a baseline to be compared with.",
            "(baseline)",
        ),
        ({"seeds": 1}, "from 1 seed; +2.00 points against standard-kd: inconclusive", "[8"),
        ({"finished": False}, "from the 10 networks that it has trained so far", "against standard-kd"),
    ],
)
def test_write_report_takes_partial_runs(
    make_run: Callable[..., Path], settings: dict, shown: str, hidden: str
) -> None:
    text = _page(make_run(num_epochs=2, **{"seeds": 2, **settings})).text
    assert shown in text
    assert hidden not in text


def test_write_report_takes_networks_without_files(make_run: Callable[..., Path]) -> None:
    folder = make_run(seeds=2, num_epochs=2)
    (folder / "teachers/standard/seed0/metrics.jsonl").unlink()
    (folder / "teachers/soteacher/seed0/model.json").unlink()
    for seed in range(2):
        (folder / f"students/alone/seed{seed}/metrics.jsonl").unlink()
    assert "Reliability of soteacher" in _page(folder).text


def test_write_report_takes_missing_values(make_run: Callable[..., Path]) -> None:
    folder = make_run(seeds=1, num_epochs=2)
    results = json.loads((folder / "results.json").read_text())
    for row in results["rows"]:
        row.update(dict.fromkeys(("nll", "ece", "accuracy_mean_last_10", "train_seconds", "images_per_second")))
    (folder / "results.json").write_text(json.dumps(results))
    assert "Training time" not in _page(folder).text


def test_write_report_counts_the_time_of_an_early_stopped_teacher_once(make_run: Callable[..., Path]) -> None:
    folder = make_run(seeds=1, num_epochs=2)
    config = folder / "config.yaml"
    config.write_text(config.read_text().replace("method: soteacher\n", "from: standard\n"))
    # One teacher of 61.5 seconds and three students of 21.25.
    assert "All 4 networks together took 125 seconds. Teachers that are earlier states" in _page(folder).text


JUDGED = "Teachers judged before any student"


def test_write_report_sets_students_against_their_teachers_cards(make_ranked_run: Callable[..., Path]) -> None:
    folder = make_ranked_run()
    text = _page(folder).text
    for part in (
        f"{JUDGED} Figures of the teachers' cards, means over seeds.",
        "What goes with the accuracy of kd",
        "Large marks are means over an arm's seeds",
        "Rank correlation of every figure with student accuracy",
        "The correlation is Spearman's rho over kinds of teachers (arms)",
        "A correlation is not a cause",
        "3 figures were looked at for each student.",
    ):
        assert part in text
    assert "not set against" not in text
    assert "Charts are of" not in text
    assert "Charts of the other figures" not in text
    assert "The other 2 figures In the order of the cards" in text
    assert "fixed beforehand, whatever this run shows" in text
    assert text.index("Teachers Means over seeds") < text.index(JUDGED) < text.index("Training time by arm")


def test_write_report_says_why_no_student_is_set_against_the_cards(make_judged_run: Callable[..., Path]) -> None:
    text = _page(make_judged_run(seeds=5)).text
    assert JUDGED in text
    assert "4 kinds of teachers (arms) with a card that it has learnt from; there are 2 (standard, soteacher)." in text
    assert "Rank correlation" not in text


def test_write_report_says_what_its_charts_leave_out(
    make_ranked_run: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(page, "MAX_STUDENTS", 2)
    monkeypatch.setattr(page, "MAX_STUDENTS_IN_FULL", 1)
    text = _page(make_ranked_run(students=("kd", "dkd", "nkd"))).text
    assert "Charts are of the first 2 of 3 students; the table has all." in text
    assert "Charts of the other figures are of the first 1 of 3 students; the table has all." in text
    assert "What goes with the accuracy of dkd" in text
    assert "What goes with the accuracy of nkd" not in text
    assert text.count("The other 2 figures") == 1


def test_write_report_names_the_student_with_too_few_teachers(make_ranked_run: Callable[..., Path]) -> None:
    folder = make_ranked_run()
    path = folder / "results.json"
    results = json.loads(path.read_text())
    results["rows"] += [
        row | {"arm": "standard-route", "method": "route"} for row in results["rows"] if row["arm"] == "standard-kd"
    ]
    path.write_text(json.dumps(results))
    text = _page(folder).text
    assert "The accuracy of route is not set against these figures" in text
    assert "there is 1 (standard)." in text
    assert "What goes with the accuracy of kd" in text


def test_write_report_says_which_teachers_are_the_same_network(make_ranked_run: Callable[..., Path]) -> None:
    folder = make_ranked_run()
    for path in folder.glob("teachers/standard/seed*/card.json"):
        text = json.dumps(json.loads(path.read_text()) | {"network": {"checksum": path.parent.name}})
        for arm in ("standard", "wide"):
            (folder / "teachers" / arm / path.parent.name / "card.json").write_text(text)
    text = _page(folder).text
    assert "The teachers standard and wide are the same network in every seed and count as one kind" in text
    assert "kd, 5 kinds of teachers" in text


def test_write_report_adds_nothing_without_cards(make_judged_run: Callable[..., Path]) -> None:
    folder = make_judged_run(seeds=3)
    with_cards = write_report(folder).read_text(encoding="utf-8")
    for path in folder.rglob("card.json"):
        path.unlink()
    without = write_report(folder).read_text(encoding="utf-8")
    start, end = with_cards.index(f"<section>\n<h2>{JUDGED}"), with_cards.index("<section>\n<h2>Cost")
    assert with_cards[:start] + with_cards[end:] == without


def test_write_report_refuses_another_folder(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="is not a run's folder"):
        write_report(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_run_facts_puts_settings_into_words() -> None:
    config = {
        "data": {"source": "folder", "path": None, "flip": True, "cache": False, "sizes": [32, 64]},
        "teachers": {"soteacher": {"model": "wrn_40_2", "terms": {"lipschitz": {"weight": 1e-5}, "cross_entropy": {}}}},
        "students": {"alone": {"model": "wrn_16_1", "terms": {}}, "kd": {"terms": {"cross_entropy": None}}},
        "seeds": [0, 1],
        "baseline": "standard-kd",
        "training": None,
    }
    assert run_facts(config) == [
        ("Data", "source folder, flip yes, sizes (32, 64)"),
        ("Teacher soteacher", "model wrn_40_2, terms (lipschitz (weight 1e-05), cross entropy)"),
        ("Student alone", "model wrn_16_1"),
        ("Student kd", "terms (without cross entropy)"),
        ("Seeds", "0, 1"),
        ("Baseline", "standard-kd"),
    ]
    assert run_facts({}) == []


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (
            {"method": "mcmi", "start": "standard"},
            "method mcmi (its own training: epochs 20, optimizer (name sgd, learning rate 0.05), schedule (name "
            "cosine)), start standard",
        ),
        (
            {
                "method": "mcmi",
                "training": {"epochs": 5, "optimizer": {"learning_rate": 0.1}, "schedule": {"name": "x"}},
            },
            "method mcmi (its own training: optimizer (name sgd)), training (epochs 5, optimizer (learning rate 0.1), "
            "schedule (name x))",
        ),
        ({"method": "early_stopped"}, "method early_stopped (its own training: stop after 0.625)"),
        (
            {"method": "early_stopped", "training": {"stop_after": 0.5}},
            "method early_stopped, training (stop after 0.5)",
        ),
        ({"method": "standard"}, "method standard"),
        ({"method": "of_another_package"}, "method of_another_package"),
        ({"from": "standard", "after": 0.5}, "from standard, after 0.5"),
        ({"file": "x.pth"}, "file x.pth"),
    ],
)
def test_run_facts_tells_what_a_method_changes_in_the_training(settings: dict, words: str) -> None:
    assert run_facts({"teachers": {"tuned": settings}}) == [("Teacher tuned", words)]
