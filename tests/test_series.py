import copy
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from rich.console import Console

from soteacher import api, cli, studies, terminal
from soteacher.config import StudyConfig
from soteacher.errors import InputError, InterruptedRunError
from soteacher.recipes import read_study
from soteacher.run_folder import locked, read_config
from soteacher.series import SeriesConfig, read_plan, report_again, run_series
from soteacher.series import run as series_run
from soteacher.studies import run_study

pytestmark = pytest.mark.usefixtures("one_core", "no_report")


class KilledError(BaseException):
    """Ends a run as a kill does: nothing catches it."""


@pytest.fixture
def tiny_series(tiny_study: Callable[..., dict[str, Any]]) -> Callable[..., dict[str, Any]]:
    """Make a series of tiny studies: two axes through the base, three points; more laid over it."""

    def make(**over: Any) -> dict[str, Any]:
        study = tiny_study(teachers={"standard": {"model": "tiny"}}, students={"kd": {"model": "tiny"}}, baseline=None)
        del study["name"]
        tree = {
            "name": "tiny",
            "vary": {
                "examples": {"path": "data.train_examples", "values": [30, 40]},
                "batch": {"path": "training.batch_size", "values": {"small": 8, "usual": 16}},
            },
            "study": {**study, "data": {**study["data"], "train_examples": 40}},
        }
        return tree | over

    return make


@pytest.fixture
def run(tiny_network: Any, monkeypatch: pytest.MonkeyPatch) -> Callable[..., dict[str, Any]]:
    monkeypatch.setattr(series_run, "write_series_report", lambda _: None)

    def start(tree: dict[str, Any], folder: Path, **options: Any) -> dict[str, Any]:
        return run_series(SeriesConfig(**copy.deepcopy(tree)), folder, factories={"tiny": tiny_network}, **options)

    return start


def test_points_are_the_base_and_one_change_each(tiny_series: Any) -> None:
    points = SeriesConfig(**tiny_series()).points()
    assert [(point.name, point.on) for point in points] == [
        ("base", {"examples": 40, "batch": "usual"}),
        ("examples-30", {"examples": 30}),
        ("batch-small", {"batch": "small"}),
    ]
    studies_ = {point.name: point.study for point in points}
    assert [study.name for study in studies_.values()] == ["tiny-base", "tiny-examples-30", "tiny-batch-small"]
    changes = {name: (study.data.train_examples, study.training.batch_size) for name, study in studies_.items()}
    assert changes == {"base": (40, 16), "examples-30": (30, 16), "batch-small": (40, 8)}
    base = studies_["base"]
    same = {"name": base.name, "description": base.description}
    back = studies_["batch-small"].model_copy(update={**same, "training": base.training})
    assert back == base


def test_a_base_that_lies_on_no_axis_is_no_point(tiny_series: Any) -> None:
    tree = tiny_series(vary={"examples": {"path": "data.train_examples", "values": [30, 20]}})
    assert [point.name for point in SeriesConfig(**tree).points()] == ["examples-30", "examples-20"]


def test_a_wildcard_sets_what_is_written_in_every_entry(tiny_series: Any) -> None:
    tree = tiny_series()
    tree["study"]["teachers"] = {
        "standard": {"model": "tiny", "training": {"epochs": 3}},
        "early": {"from": "standard", "after": 1},
        "other": {"model": "resnet8"},
    }
    tree["vary"] = {
        "model": {"path": "teachers.*.model", "values": ["wrn_10_1"]},
        "epochs": {"path": "teachers.*.training.epochs", "values": [5]},
        "all": {"path": "*.*.model", "values": ["resnet14"]},
    }
    points = {point.name: point.study for point in SeriesConfig(**tree).points()}
    assert [getattr(spec, "model", None) for spec in points["model-wrn_10_1"].teachers.values()] == [
        "wrn_10_1", None, "wrn_10_1",
    ]  # fmt: skip
    assert points["model-wrn_10_1"].students["kd"].model == "tiny"
    assert points["all-resnet14"].students["kd"].model == "resnet14"
    trainings = [getattr(spec, "training", None) for spec in points["epochs-5"].teachers.values()]
    assert trainings == [{"epochs": 5}, None, {}]


def test_values_without_a_path_set_several_things(tiny_series: Any) -> None:
    few = {"data.train_examples": 20, "training.epochs": 4, "training.optimizer.learning_rate": 0.01}
    tree = tiny_series(vary={"size": {"values": {"few": few, "all": {"data.train_examples": 40}}}})
    points = SeriesConfig(**tree).points()
    assert [(point.name, point.on) for point in points] == [("base", {"size": "all"}), ("size-few", {"size": "few"})]
    study = points[1].study
    assert (study.data.train_examples, study.training.epochs, study.training.optimizer.learning_rate) == (20, 4, 0.01)


def test_labels_are_written_as_yaml_does(tiny_series: Any) -> None:
    axis = {"path": "teachers.standard.pretrained", "values": [False, True]}
    other = {"path": "data.train_examples", "values": [None, 40]}
    points = SeriesConfig(**tiny_series(vary={"pretrained": axis, "examples": other})).points()
    assert [point.name for point in points] == ["base", "pretrained-true", "examples-null"]
    assert points[0].on == {"pretrained": False, "examples": 40}


def test_the_base_tree_is_left_alone(tiny_series: Any) -> None:
    tree = tiny_series()
    before = copy.deepcopy(tree)
    SeriesConfig(**tree).points()
    read_plan(tree, ["study.seeds=[1, 2]"])
    assert tree == before


AXIS = {"path": "data.train_examples", "values": [30]}


@pytest.mark.parametrize(
    ("path", "values", "words"),
    [
        ("data.train_examples", [], "vary.n.values: wanted at least one value, got none"),
        ("data.train_examples", {}, "vary.n.values: wanted at least one value, got none"),
        ("data.train_examples", 30, "vary.n.values: wanted a list or a table label: value, got 30"),
        ("data.train_examples", [30, 20, 30], "vary.n.values: the value 30 stands twice"),
        ("data.train_examples", {"few": 3, "Few": 4}, "the value Few stands twice"),
        ("data.train_examples", {"a": 30, "b": 30}, "axis n, value b: the same study as value a"),
        ("data.train_examples", [[1]], "vary.n.values: [1] cannot name a folder"),
        ("teachers.standard.model", ["timm/resnet18"], "'timm/resnet18' cannot name a folder"),
        (None, [30], "axis n, value 30: without a path it is a table of paths, got 30"),
        (None, {"a": {}}, "axis n, value a: without a path it is a table of paths, got {}"),
        ("data.train_exampels", [30], "axis n, value 30: data: unknown key 'train_exampels'; did you mean train_exam"),
        ("data.train_examples.more", [30], "value 30: data.train_examples.more: train_examples is no table but 40"),
        (
            "teachers.standrad.model",
            ["a"],
            "value a: teachers.standrad.model: unknown teacher 'standrad'; did",
        ),
        ("teachers.*.training.epochs", [3], "value 3: teachers.*.training.epochs stands nowhere in the study"),
        ("teachers.*", [3], "axis n, value 3: 'teachers.*' is no path to a setting"),
        ("data..noise", [3], "axis n, value 3: 'data..noise' is no path to a setting"),
        ("data.train_examples", [30, -1], "axis n, value -1: data.train_examples: "),
        ("training.batch_size", ["many"], "axis n, value many: training.batch_size: "),
        ("teachers.standard.method", ["msee"], "axis n, value msee: teachers.standard.method: unknown method"),
    ],
)
def test_a_bad_axis_is_named_in_one_line(tiny_series: Any, path: str | None, values: Any, words: str) -> None:
    with pytest.raises(InputError) as caught:
        read_plan(tiny_series(vary={"n": {"path": path, "values": values}}))
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("vary", "words"),
    [
        ({}, "vary: Dictionary should have at least 1 item"),
        ({"N": AXIS}, "vary.N: String should match pattern"),
        ({"n": {**AXIS, "paths": []}}, "vary.n: unknown key 'paths'"),
        ({"n": {"path": "data.train_examples"}}, "vary.n.values: missing, and needed"),
    ],
)
def test_bad_axes_are_refused(tiny_series: Any, vary: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError) as caught:
        read_plan(tiny_series(vary=vary))
    assert words in str(caught.value)


def test_a_bad_base_is_named(tiny_series: Any) -> None:
    tree = tiny_series()
    tree["study"]["training"]["epochs"] = 0
    with pytest.raises(InputError, match=r"^study: training.epochs: "):
        read_plan(tree)
    tree = tiny_series()
    tree["study"]["name"] = "mine"
    with pytest.raises(InputError, match=r"study.name: the points of a series are named after it, got 'mine'"):
        read_plan(tree)


def test_a_plan_is_a_study_or_a_series(tiny_series: Any, tiny_study: Any, tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump(tiny_series()))
    assert read_plan(path) == SeriesConfig(**tiny_series())
    changed = read_plan(path, ["study.training.epochs=7", "vary.batch.values=[4]"])
    assert isinstance(changed, SeriesConfig)
    assert {point.study.training.epochs for point in changed.points()} == {7}
    assert "batch-4" in [point.name for point in changed.points()]
    assert isinstance(read_plan(tiny_study()), StudyConfig)
    with pytest.raises(InputError, match=r"mine.yaml is a series of studies \(it has vary\), wanted a single one"):
        read_study(path)
    with pytest.raises(InputError, match=r"mine.yaml: vary.batch.values: "):
        read_plan(path, ["vary.batch.values=3"])


def test_a_series_leaves_what_it_promises(
    tmp_path: Path, tiny_series: Any, run: Any, outcome_of: Any, tiny_network: Any
) -> None:
    folder = tmp_path / "run"
    events: list[tuple[str, str, str]] = []
    results = run(
        tiny_series(), folder, on_event=lambda job, event: events.append((event["point"], event["place"], job.role))
    )
    assert json.loads((folder / "results.json").read_text()) == results
    assert SeriesConfig(**yaml.safe_load((folder / "series.yaml").read_text())) == SeriesConfig(**tiny_series())
    assert {path.name for path in folder.iterdir()} == {"series.yaml", "results.json", "points"}
    assert (results["schema"], results["kind"], results["recipe"]) == (1, "series", "tiny")
    assert results["soteacher_version"] == "0.1.0"
    assert results["axes"] == {"examples": [30, 40], "batch": ["small", "usual"]}
    assert results["num_points"] == 3
    assert [(point["name"], point["folder"], point["on"]) for point in results["points"]] == [
        ("base", "points/base", {"examples": 40, "batch": "usual"}),
        ("examples-30", "points/examples-30", {"examples": 30}),
        ("batch-small", "points/batch-small", {"batch": "small"}),
    ]
    for point in results["points"]:
        own = json.loads((folder / point["folder"] / "results.json").read_text())
        assert {key: point[key] for key in ("rows", "summary", "environment")} == {
            key: own[key] for key in ("rows", "summary", "environment")
        }
    assert list(dict.fromkeys(event[:2] for event in events)) == [
        ("base", "1 of 3"), ("examples-30", "2 of 3"), ("batch-small", "3 of 3"),
    ]  # fmt: skip
    # A point is the very run that the study alone would be.
    alone = SeriesConfig(**tiny_series()).points()[1].study
    run_study(alone, tmp_path / "alone", factories={"tiny": tiny_network})
    assert outcome_of(tmp_path / "alone") == outcome_of(folder / "points" / "examples-30")


def test_rows_carry_the_figures_of_the_teachers_cards(
    tmp_path: Path, tiny_series: Any, run: Any, monkeypatch: Any
) -> None:
    def with_card(config: Any, folder: Path, **options: Any) -> dict[str, Any]:
        results = run_study(config, folder, **options)
        figures = {"distance": {"train": {"mse": 0.25, "kl": None}}, "train": {"accuracy": 0.5}}
        card = {"schema": 1, "figures": figures}
        (folder / "teachers/standard/seed0/card.json").write_text(json.dumps(card))
        return results

    monkeypatch.setattr(series_run, "run_study", with_card)
    results = run(tiny_series(), tmp_path / "run")
    for point in results["points"]:
        cards = {row["role"]: row.get("card") for row in point["rows"]}
        assert cards == {"teacher": {"distance.train.mse": 0.25, "train.accuracy": 0.5}, "student": None}


def test_finished_points_are_not_run_again(tmp_path: Path, tiny_series: Any, run: Any, monkeypatch: Any) -> None:
    first = run(tiny_series(), tmp_path / "run")
    monkeypatch.setattr(series_run, "run_study", None)
    assert run(tiny_series(), tmp_path / "run", resume=True) == first
    described = tiny_series(description="Other words.")
    described["vary"]["batch"]["reading"] = "It falls."
    assert run(described, tmp_path / "run", resume=True) == first
    assert "It falls." in (tmp_path / "run" / "series.yaml").read_text()


@pytest.mark.parametrize(
    ("when", "error"),
    [
        ("between", KilledError),
        ("between", KeyboardInterrupt),  # nothing asks between two points whether to stop: Ctrl-C ends the process
        ("within", KilledError),
        ("within", InterruptedRunError),
    ],
)
def test_a_stopped_series_goes_on_to_the_same_end(
    tmp_path: Path, tiny_series: Any, run: Any, outcome_of: Any, monkeypatch: Any, when: str, error: type[BaseException]
) -> None:
    run(tiny_series(), tmp_path / "whole")

    def stop(job: Any, event: dict[str, Any]) -> None:
        if event["point"] == "examples-30" and job.role == "student" and event["event"] == "epoch":
            raise error

    def stopping(config: Any, folder: Path, **options: Any) -> dict[str, Any]:
        if folder.name == "examples-30":
            raise error
        return run_study(config, folder, **options)

    with monkeypatch.context() as patch:
        if when == "between":
            patch.setattr(series_run, "run_study", stopping)
        with pytest.raises(error):
            run(tiny_series(), tmp_path / "cut", on_event=stop if when == "within" else None)
    cut = tmp_path / "cut"
    assert (cut / "points/base/results.json").exists()
    assert not (cut / "results.json").exists()
    results = report_again(cut)
    done = ["base"] if when == "between" else ["base", "examples-30"]
    assert [point["name"] for point in results["points"]] == done
    events: list[str] = []
    run(tiny_series(), cut, resume=True, on_event=lambda _, event: events.append(event["point"]))
    assert set(events) == {"examples-30", "batch-small"}
    for name in ("base", "examples-30", "batch-small"):
        assert outcome_of(cut / "points" / name) == outcome_of(tmp_path / "whole" / "points" / name)


def test_a_series_may_grow(tmp_path: Path, tiny_series: Any, run: Any) -> None:
    first = run(tiny_series(), tmp_path / "run")
    grown = tiny_series()
    grown["vary"]["examples"]["values"] = [20, 30, 40]
    grown["study"]["seeds"] = [0, 1]
    results = run(grown, tmp_path / "run", resume=True)
    assert [point["name"] for point in results["points"]] == ["base", "examples-20", "examples-30", "batch-small"]
    assert all(len(point["rows"]) == 4 for point in results["points"])
    assert [row for row in results["points"][0]["rows"] if row["seed"] == 0] == first["points"][0]["rows"]


SIZES = {"path": "training.batch_size", "values": {"small": 8, "usual": 16}}
OTHER_SIZES = {"path": "training.batch_size", "values": {"small": 4, "usual": 16}}


@pytest.mark.parametrize(
    ("over", "words"),
    [
        ({}, "holds this series already; go on with --resume"),
        ({"name": "other"}, "holds another series: point base, name: tiny-base in the folder, other-base now"),
        ({"vary": {"batch": SIZES}}, "holds another series: its point examples-30 is no longer wanted"),
        (
            {"vary": {"examples": AXIS, "batch": OTHER_SIZES}},
            "holds another series: point batch-small, training.batch_size: 8 in the folder, 4 now",
        ),
    ],
)
def test_another_series_is_refused(
    tmp_path: Path, tiny_series: Any, run: Any, over: dict[str, Any], words: str
) -> None:
    run(tiny_series(), tmp_path / "run")
    with pytest.raises(InputError) as caught:
        run(tiny_series(**over), tmp_path / "run", resume=bool(over))
    assert words in str(caught.value)


def test_other_folders_are_refused(
    tmp_path: Path, tiny_series: Any, run: Any, tiny_network: Any, tiny_study: Any
) -> None:
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "note.txt").touch()
    with pytest.raises(InputError, match="exists and holds no series; choose another folder"):
        run(tiny_series(), tmp_path / "notes", resume=True)
    single = read_study(tiny_study(students={}, baseline=None))
    run_study(single, tmp_path / "single", factories={"tiny": tiny_network})
    with pytest.raises(InputError, match="exists and holds a single run; choose another folder"):
        run(tiny_series(), tmp_path / "single", resume=True)
    run(tiny_series(), tmp_path / "series")
    with pytest.raises(InputError, match="exists and holds no run; choose another folder"):
        run_study(single, tmp_path / "series", factories={"tiny": tiny_network}, resume=True)


def test_two_processes_cannot_work_in_one_series(
    tmp_path: Path, tiny_series: Any, run: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("soteacher.run_folder.LOCK_SECONDS", 0.0)
    with locked(tmp_path / "run"), pytest.raises(InputError, match="another process is at work"):
        run(tiny_series(), tmp_path / "run")


def test_what_fails_at_a_point_names_it(tmp_path: Path, tiny_series: Any, run: Any) -> None:
    tree = tiny_series()
    tree["vary"]["model"] = {"path": "teachers.*.model", "values": ["tiny", "resnet21"]}
    with pytest.raises(InputError, match=r"^point model-resnet21: "):
        run(tree, tmp_path / "run")
    assert not (tmp_path / "run").exists()
    tree = tiny_series()
    tree["vary"]["examples"]["values"] = [40, 41]
    with pytest.raises(InputError, match=r"^point examples-41: train_examples is 41, but there are 40"):
        run(tree, tmp_path / "run")
    assert (tmp_path / "run/points/base/results.json").exists()
    with pytest.raises(InputError, match="unknown device 'tpu'"):
        run(tiny_series(), tmp_path / "other", device="tpu")


def test_report_again_makes_the_points_anew(
    tmp_path: Path, tiny_series: Any, run: Any, train: Any, tiny_study: Any
) -> None:
    first = run(tiny_series(), tmp_path / "run")
    for path in (tmp_path / "run").rglob("results.json"):
        path.unlink()
    assert report_again(tmp_path / "run") == first
    assert len(list((tmp_path / "run").rglob("results.json"))) == 4
    single = train(tiny_study(), tmp_path / "single")
    (tmp_path / "single" / "results.json").unlink()
    assert report_again(tmp_path / "single") == single
    with pytest.raises(InputError, match="holds no run"):
        report_again(tmp_path)


def test_the_library_runs_a_series(
    tmp_path: Path, tiny_series: Any, run: Any, tiny_network: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(studies, "available_cores", lambda: 1)
    del run
    results = api.run(tiny_series(), tmp_path / "run", networks={"tiny": tiny_network}, settings=["study.seeds=[4]"])
    assert {row["seed"] for point in results["points"] for row in point["rows"]} == {4}
    assert read_config(tmp_path / "run" / "points" / "base").seeds == (4,)
    with pytest.raises(InputError, match="tiny is a module, and every one of 2 seeds"):
        api.run(
            tiny_series(), tmp_path / "other", networks={"tiny": tiny_network(3, 1)}, settings=["study.seeds=[0, 1]"]
        )


def test_the_command_line_runs_a_series_and_tells_the_points(
    tmp_path: Path,
    tiny_series: Any,
    tiny_tree: Any,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    study = tiny_tree(training={"epochs": 1, "batch_size": 20}, card=None)
    del study["name"]
    tree = tiny_series(study=study, vary={"rate": {"path": "training.optimizer.learning_rate", "values": [0.01, 0.05]}})
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(tree))
    out = str(tmp_path / "run")
    words = [
        "soteacher",
        "run",
        str(tmp_path / "mine.yaml"),
        "--out",
        out,
        "--device",
        "cpu",
        "--set",
        "study.seeds=[2]",
    ]
    monkeypatch.setattr("sys.argv", words)
    with pytest.raises(SystemExit) as left:
        cli.main()
    assert not left.value.code
    lines = capsys.readouterr().out.splitlines()
    assert [line for line in lines if line.startswith("point ")] == ["point base (1 of 2)", "point rate-0.01 (2 of 2)"]
    assert sum(line.startswith("teacher standard/seed2: finished, test accuracy") for line in lines) == 2
    assert f"report: {out}/report.html" in lines
    assert any("kd, NLL: better" in line for line in lines)
    for name in ("base", "rate-0.01"):
        log = (tmp_path / "run" / "points" / name / "log.txt").read_text()
        assert log.count("finished, test accuracy") == 5
    monkeypatch.setattr("sys.argv", ["soteacher", "report", out])
    (tmp_path / "run" / "report.html").unlink()
    with pytest.raises(SystemExit):
        cli.main()
    assert "Along rate" in (tmp_path / "run" / "report.html").read_text()


def test_a_terminal_counts_the_networks_of_each_point(
    tmp_path: Path, tiny_series: Any, run: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    screen = io.StringIO()
    console = Console(file=screen, force_terminal=True, width=100, color_system=None, legacy_windows=False)
    monkeypatch.setattr(terminal, "Console", lambda **_: console)
    with terminal.ProgressDisplay(tmp_path / "run") as display:
        run(tiny_series(), tmp_path / "run", on_event=display)
    shown = screen.getvalue()
    for name in ("base (1 of 3)", "examples-30 (2 of 3)", "batch-small (3 of 3)"):
        assert f"point {name}" in shown
    assert "all 2 networks" in shown
    assert not (tmp_path / "run" / "log.txt").exists()
    assert (tmp_path / "run/points/base/log.txt").read_text().count("finished") == 2
