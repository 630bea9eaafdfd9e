import json
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import yaml

from soteacher.published_settings import published_student
from soteacher.recipes import recipe_text
from soteacher.report import published_numbers, read_run, write_report
from soteacher.settings import read_tree

Edit = Callable[[dict[str, Any]], None]


def _as_cifar(folder: Path, *, teacher: str = "wrn_40_2", student: str = "wrn_40_1", edit: Edit | None = None) -> Path:
    """Turn a made-up run into one on CIFAR-100 whose networks are trained as their methods say."""
    path = folder / "config.yaml"
    config = yaml.safe_load(path.read_text())
    config["data"] = {"source": "cifar100", "train_examples": None, "test_examples": None}
    for spec in (*config["teachers"].values(), *config["students"].values()):
        spec["terms"] = {}
    if edit is not None:
        edit(config)
    path.write_text(yaml.safe_dump(config, sort_keys=False))
    results = json.loads((folder / "results.json").read_text())
    for row in results["rows"]:
        row["data"] = "cifar100"
        row["model"] = teacher if row["role"] == "teacher" else student
    (folder / "results.json").write_text(json.dumps(results))
    return folder


def _arms(folder: Path) -> dict[str, list[tuple[str, ...]]]:
    """Return the lines of the table by arm."""
    numbers = published_numbers(read_run(folder))
    lines: dict[str, list[tuple[str, ...]]] = {}
    for arm, *cells in numbers.table.rows if numbers else ():
        lines.setdefault(arm, []).append(tuple(cells))
    return lines


class _Tables(HTMLParser):
    """The cells of every table of a page, by the label of the region around it; and the page's text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tables: dict[str, list[list[str]]] = {}
        self.text = ""
        self._rows: list[list[str]] = []
        self._cell = False
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        if given.get("role") == "region":
            self._rows = self.tables.setdefault(given["aria-label"] or "", [])
        elif tag == "tr":
            self._rows.append([])
        elif tag in ("td", "th"):
            self._rows[-1].append("")
            self._cell = True

    def handle_endtag(self, tag: str) -> None:
        self._cell = self._cell and tag not in ("td", "th")

    def handle_data(self, data: str) -> None:
        self.text += data
        if self._cell:
            self._rows[-1][-1] += data


def test_published_numbers_stand_beside_ours(make_run: Callable[..., Path]) -> None:
    folder = _as_cifar(make_run(num_epochs=240))
    numbers = published_numbers(read_run(folder))
    assert numbers is not None
    assert len(numbers.table.columns) == len(numbers.table.numeric) == len(numbers.table.rows[0]) == 7
    arms = _arms(folder)
    assert list(arms) == [
        *("teacher standard", "teacher soteacher"),
        *("student standard-kd", "student soteacher-kd", "student alone"),
    ]
    paper = "Dong, Liu, Shang, ICLR 2024, arXiv:2206.06661"
    assert arms["student standard-kd"] == [
        ("84.10 [83.67, 84.53]", "240", "73.54", "240", "last", "HobbitLong/RepDistiller README: KD"),
        ("84.10 [83.67, 84.53]", "240", "73.73", "240", "last", f"{paper}: KD from standard"),
    ]
    assert arms["student soteacher-kd"] == [
        ("86.10 [85.67, 86.53]", "240", "74.35", "240", "last", f"{paper}: KD from SoTeacher")
    ]
    assert arms["teacher soteacher"] == [("87.20 [86.70, 87.70]", "240", "74.95", "240", "last", f"{paper}: SoTeacher")]
    assert [line[2] for line in arms["teacher standard"]] == ["75.61", "76.46", "76.45", "76.38"]
    assert [line[2:5] for line in arms["student alone"]] == [
        ("71.98", "240", "last"),
        ("71.70", "-", "unknown"),
        ("72.24", "-", "unknown"),
        ("71.95 ± 0.59", "-", "unknown"),
    ]


def test_published_numbers_say_what_differs(make_run: Callable[..., Path]) -> None:
    numbers = published_numbers(read_run(_as_cifar(make_run(num_epochs=12, seeds=1))))
    assert numbers is not None
    notes = " ".join(numbers.notes)
    assert "in 41 released training logs 0.32 points on average, and up to 0.92." in notes
    assert (
        "Not comparable, because trained for another number of epochs: teacher standard (12, published 240), " in notes
    )
    assert "student soteacher-kd (12, published 240), student alone (12, published 240)." in notes
    assert "After ± stands the standard deviation" in notes
    assert "from a file" not in notes
    assert numbers.table.rows[0][1] == "88.00"


def test_published_numbers_of_the_same_epochs_come_without_a_warning(make_run: Callable[..., Path]) -> None:
    run = make_run(teachers=("standard",), students=("standard-kd",), seeds=1, num_epochs=240)
    numbers = published_numbers(read_run(_as_cifar(run, student="resnet20", teacher="resnet56")))
    assert numbers is not None
    assert "Not comparable" not in " ".join(numbers.notes)
    assert "±" not in " ".join(numbers.notes)


def test_published_numbers_know_the_fields_spelling(make_run: Callable[..., Path]) -> None:
    run = make_run(teachers=("standard",), students=("standard-kd",), seeds=1, num_epochs=2)
    arms = _arms(_as_cifar(run, teacher="ResNet50", student="MobileNetV2"))
    assert arms["student standard-kd"][0][2] == "67.35"


def _terms(section: str, name: str) -> Edit:
    def edit(config: dict[str, Any]) -> None:
        config[section][name]["terms"] = {"cross_entropy": {"weight": 0.25}}

    return edit


def _pretrained(config: dict[str, Any]) -> None:
    config["students"]["kd"]["pretrained"] = True


def _early_stopped(config: dict[str, Any]) -> None:
    config["teachers"]["soteacher"] = {"from": "standard", "after": 0.625}


def _file(config: dict[str, Any]) -> None:
    config["teachers"]["standard"] = {"file": "teacher.pth", "model": "wrn_40_2", "mean": None, "std": None}


def _without_teachers(config: dict[str, Any]) -> None:
    config["teachers"] = {}


@pytest.mark.parametrize(
    ("edit", "unmatched"),
    [
        (_terms("students", "kd"), {"student standard-kd", "student soteacher-kd"}),
        (_terms("students", "alone"), {"student alone"}),
        (_terms("teachers", "soteacher"), {"teacher soteacher", "student soteacher-kd"}),
        (_pretrained, {"student standard-kd", "student soteacher-kd"}),
        (_early_stopped, {"teacher soteacher", "student soteacher-kd"}),
        (_file, {"teacher standard"}),
        (
            _without_teachers,
            {"teacher standard", "teacher soteacher", "student standard-kd", "student soteacher-kd"},
        ),
    ],
)
def test_published_numbers_are_of_the_methods_own_settings(
    make_run: Callable[..., Path], edit: Edit, unmatched: set[str]
) -> None:
    folder = make_run(seeds=1, num_epochs=2)
    every = {
        *("teacher standard", "teacher soteacher"),
        *("student standard-kd", "student soteacher-kd", "student alone"),
    }
    assert set(_arms(_as_cifar(folder, edit=edit))) == every - unmatched


def test_published_numbers_of_a_teacher_from_a_file_say_so(make_run: Callable[..., Path]) -> None:
    numbers = published_numbers(read_run(_as_cifar(make_run(seeds=1, num_epochs=2), edit=_file)))
    assert numbers is not None
    assert any("is from a file" in note and note.endswith(": student standard-kd.") for note in numbers.notes)


def _subset(config: dict[str, Any]) -> None:
    config["data"]["train_examples"] = 3000


@pytest.mark.parametrize(
    "settings",
    [{"edit": _subset}, {"edit": dict.clear}, {"student": "resnet8", "teacher": "resnet14"}],
)
def test_no_published_numbers_without_a_match(make_run: Callable[..., Path], settings: dict[str, Any]) -> None:
    folder = _as_cifar(make_run(seeds=1, num_epochs=2), **settings)
    assert published_numbers(read_run(folder)) is None


def test_no_published_numbers_of_other_data(make_run: Callable[..., Path]) -> None:
    folder = make_run(seeds=1, num_epochs=2)
    assert published_numbers(read_run(folder)) is None
    assert "Published numbers" not in write_report(folder).read_text(encoding="utf-8")


def test_write_report_shows_published_numbers(make_run: Callable[..., Path]) -> None:
    folder = _as_cifar(make_run(seeds=2, num_epochs=3))
    before = (folder / "results.json").read_bytes()
    page = _Tables(write_report(folder).read_text(encoding="utf-8"))
    assert (folder / "results.json").read_bytes() == before
    heading, *lines = page.tables["Published numbers by arm"]
    assert heading[3:6] == ["published, %", "its epochs", "epoch reported"]
    assert ["student standard-kd", "3", "73.54", "240", "last", "HobbitLong/RepDistiller README: KD"] in [
        [line[0], *line[2:]] for line in lines
    ]
    assert len(lines) == 12
    assert "Not comparable, because trained for another number of epochs" in page.text


def _recipes_student(config: dict[str, Any], **changes: Any) -> None:
    """Give the student ``kd`` all the terms of KD that its recipe spells out, and some others."""
    terms = published_student("kd", "wrn_40_2-wrn_40_1")["terms"]
    config["students"]["kd"]["terms"] = {**terms, **changes}


def test_published_settings_are_the_methods_own_where_the_pair_is_that_of_the_recipe(
    make_run: Callable[..., Path],
) -> None:
    assert "student standard-kd" in _arms(_as_cifar(make_run(), edit=_recipes_student))


def test_published_numbers_of_a_recipe_run_as_it_is(make_run: Callable[..., Path]) -> None:
    def as_recipe(config: dict[str, Any]) -> None:
        study = read_tree(recipe_text("dkd", "wrn_40_2-wrn_40_1"), "dkd")
        config["students"]["kd"] = study["students"]["dkd"]
        assert config["students"]["kd"]["terms"]

    folder = _as_cifar(make_run(), edit=as_recipe)
    results = json.loads((folder / "results.json").read_text())
    for row in results["rows"]:
        row["method"] = row["method"].replace("kd", "dkd")
    (folder / "results.json").write_text(json.dumps(results))
    assert [line[2] for line in _arms(folder)["student standard-kd"]] != []


@pytest.mark.parametrize("changes", [{"kd": {"temperature": 7.0}}, {"cross_entropy": None}, {"nothing": {}}], ids=str)
def test_no_published_numbers_of_other_terms(make_run: Callable[..., Path], changes: dict[str, Any]) -> None:
    folder = _as_cifar(make_run(), edit=lambda config: _recipes_student(config, **changes))
    assert "student standard-kd" not in _arms(folder)
