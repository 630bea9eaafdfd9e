import json
from collections.abc import Callable
from datetime import datetime, timezone
from pathlib import Path

import pytest

from soteacher.errors import InputError
from soteacher.report import read_run


def test_read_run_returns_what_the_folder_holds(make_run: Callable[..., Path]) -> None:
    folder = make_run(seeds=2, num_epochs=4)
    record = read_run(folder)
    assert record.config["name"] == "fashion-quick"
    assert record.results["environment"]["device"] == "cpu"
    assert [(network.role, network.arm, network.seed) for network in record.networks[:3]] == [
        ("teacher", "standard", 0),
        ("teacher", "soteacher", 0),
        ("student", "standard-kd", 0),
    ]
    assert list(record.of_role("student")) == ["standard-kd", "soteacher-kd", "alone"]
    assert [network.seed for network in record.of_role("teacher")["soteacher"]] == [0, 1]
    network = record.networks[0]
    assert network.row == record.results["rows"][0]
    assert [line["epoch"] for line in network.epochs] == [0, 1, 2, 3]
    assert len(network.reliability["test"]) == len(network.reliability["train"]) == 15
    written = (folder / "results.json").stat().st_mtime
    assert record.results_time == datetime.fromtimestamp(written, timezone.utc)


def test_read_run_returns_the_teachers_cards(make_run: Callable[..., Path], add_card: Callable[..., None]) -> None:
    folder = make_run(seeds=2, num_epochs=1)
    add_card(folder, "soteacher", 1, {"test": {"ece": 0.25}})
    cards = {(one.role, one.arm, one.seed): one.card for one in read_run(folder).networks}
    assert cards.pop(("teacher", "soteacher", 1)) == {"schema": 1, "figures": {"test": {"ece": 0.25}}}
    assert set(map(len, cards.values())) == {0}


def test_read_run_without_results_takes_the_finished_networks(make_run: Callable[..., Path]) -> None:
    folder = make_run(seeds=2, finished=False)
    (folder / "students/alone/seed1/model.json").unlink()
    record = read_run(folder)
    assert record.results_time is None
    assert len(record.networks) == 10
    assert len(record.results["rows"]) == 9
    seeds = {entry["arm"]: entry["seeds"] for entry in record.results["summary"]}
    assert seeds == {"alone": [0], "soteacher-kd": [0, 1], "standard-kd": [0, 1]}
    assert all(entry["verdict"] is None for entry in record.results["summary"])


@pytest.mark.parametrize(
    ("missing", "finished"),
    [
        (set(), True),
        ({("teacher", "standard", 1)}, False),
        ({("student", "soteacher-kd", 0), ("student", "soteacher-kd", 1)}, False),
        ({("student", "alone", 0), ("student", "alone", 1)}, False),
    ],
)
def test_finished_needs_every_network(
    make_run: Callable[..., Path], missing: set[tuple[str, str, int]], finished: bool
) -> None:
    path = make_run(seeds=2, num_epochs=1) / "results.json"
    results = json.loads(path.read_text())
    results["rows"] = [row for row in results["rows"] if (row["role"], row["arm"], row["seed"]) not in missing]
    path.write_text(json.dumps(results))
    assert read_run(path.parent).finished is finished


def test_finished_of_a_student_with_chosen_teachers(make_run: Callable[..., Path]) -> None:
    folder = make_run(students=("soteacher-kd",), seeds=1, num_epochs=1)
    assert not read_run(folder).finished
    config = folder / "config.yaml"
    config.write_text(config.read_text().replace("teachers: null", "teachers: [soteacher]"))
    assert read_run(folder).finished


def test_read_run_takes_missing_network_files(make_run: Callable[..., Path]) -> None:
    folder = make_run()
    network_folder = folder / "teachers/standard/seed0"
    for path in network_folder.iterdir():
        path.unlink()
    (folder / "config.yaml").unlink()
    record = read_run(folder)
    assert record.config == {}
    assert record.networks[0].epochs == ()
    assert record.networks[0].reliability == {}
    assert record.networks[0].row is not None


def test_read_run_leaves_out_a_line_that_was_cut_off(make_run: Callable[..., Path]) -> None:
    folder = make_run(num_epochs=3)
    path = folder / "teachers/standard/seed0/metrics.jsonl"
    path.write_text(path.read_text() + '{"epoch": 3, "test_acc')
    assert [line["epoch"] for line in read_run(folder).networks[0].epochs] == [0, 1, 2]


def test_read_run_refuses_another_folder(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"is not a run's folder: it has neither config.yaml nor results.json"):
        read_run(tmp_path)
    with pytest.raises(InputError, match="is not a run's folder"):
        read_run(tmp_path / "missing")


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("results.json", "{", "results.json cannot be read: Expecting property name"),
        ("results.json", "[]", "results.json holds a list; wanted a mapping"),
        ("results.json", json.dumps({"schema": 2}), "results.json has schema 2; this version reads schema 1"),
        ("config.yaml", "a: [\n1", "config.yaml cannot be read: "),
        ("teachers/standard/seed0/card.json", '{"schema": 2}', "card.json has schema 2; this version reads schema 1"),
        ("teachers/standard/seed0/metrics.jsonl", '{"epoch": 0}\n{\n', "metrics.jsonl, line 2 is not JSON"),
    ],
)
def test_read_run_names_the_file_that_cannot_be_read(
    make_run: Callable[..., Path], name: str, text: str, message: str
) -> None:
    folder = make_run()
    (folder / name).write_text(text)
    with pytest.raises(InputError, match=message) as caught:
        read_run(folder)
    assert "\n" not in str(caught.value)
