import json
from pathlib import Path
from types import SimpleNamespace

import benchmarks.gpu_plan as gpu_plan
import benchmarks.gpu_table1 as gpu_table1
import pytest
from benchmarks.gpu_plan import RECIPES, choose, make_up_images, measure, seconds_of, state_bytes, table_studies
from benchmarks.gpu_table1 import Deadline, drop_spent_weights, table_of

from soteacher.data import NpzConfig
from soteacher.errors import InputError
from soteacher.jobs import Job, jobs_of
from soteacher.recipes import read_study
from soteacher.run_folder import network_folder

PLAIN = {"whole": False, "settings": (), "tiny": None}
COST = {
    "seconds_per_step": 0.01, "steps_per_epoch": 100, "epoch_start_seconds": 0.25, "evaluation_seconds": 0.5,
    "saving_seconds": 0.25, "start_seconds": 12.0, "setup_seconds": 10.0,
    "parameters": 1000, "num_examples": 50, "num_classes": 10,
}  # fmt: skip


def _costs(pairs, **over):
    studies = table_studies(pairs, seeds=1, epochs=2, **PLAIN)
    return {kind: COST | over for config in studies.values() for kind in gpu_plan.kinds(config)}


def test_table_studies_train_a_teacher_once_for_its_pairs():
    studies = table_studies(list(RECIPES), seeds=2, epochs=60, **PLAIN)
    assert list(studies) == ["wrn_40_2", "resnet32x4"]
    config = studies["wrn_40_2"]
    assert config.seeds == (0, 1)
    assert {name: spec.method for name, spec in config.teachers.items()} == {
        "standard": "standard", "soteacher": "soteacher",
    }  # fmt: skip
    assert {name: spec.model for name, spec in config.students.items()} == {
        "kd_wrn_16_2": "wrn_16_2", "kd_wrn_40_1": "wrn_40_1",
    }  # fmt: skip
    baselines = {arm.name: arm.baseline for arm in config.arms()}
    assert baselines["soteacher-kd_wrn_40_1"] == "standard-kd_wrn_40_1"
    assert baselines["standard-kd_wrn_40_1"] is None


@pytest.mark.parametrize("pair", list(RECIPES))
def test_table_studies_keep_the_recipes_settings(pair):
    teacher, student = pair.split("-")
    recipe = read_study(RECIPES[pair])
    config = table_studies([pair], seeds=3, epochs=240, whole=True, settings=(), tiny=None)[teacher]
    assert config.training == recipe.training
    assert config.data == recipe.data
    assert dict(config.teachers) == dict(recipe.teachers)
    for name, spec in recipe.students.items():
        ours = config.students[f"{name}_{student}"]
        assert ours.model_copy(update={"baseline": None}) == spec
        assert config.training_of(ours) == recipe.training_of(spec)


def test_settings_go_over_the_recipes():
    options = PLAIN | {"settings": ["training.precision=bf16-mixed"]}
    config = table_studies(list(RECIPES)[:1], seeds=1, epochs=10, **options)["wrn_40_2"]
    assert config.training.precision == "bf16-mixed"


def test_seconds_of_a_study_by_hand():
    pairs = list(RECIPES)[:1]
    config = table_studies(pairs, seeds=3, epochs=4, **PLAIN)["wrn_40_2"]
    single = 10 + 4 * (100 * 0.01 + 0.25 + 0.5 + 0.25) + 6 * 0.5  # two teachers and two students of three seeds
    assert seconds_of(config, _costs(pairs), workers=1) == pytest.approx(12 * single)
    assert seconds_of(config, _costs(pairs), workers=3) == pytest.approx(4 * single + single)


def test_state_bytes_by_hand():
    pairs = list(RECIPES)[:1]
    config = table_studies(pairs, seeds=3, epochs=4, **PLAIN)["wrn_40_2"]
    on_the_way = 4 * (2 * 1000 + 50 * 10)
    assert state_bytes(config, _costs(pairs), workers=2) == 2 * on_the_way + 6 * 4 * 1000


@pytest.mark.parametrize(
    ("networks", "pairs", "seeds"),
    [(100, 3, 3), (30, 3, 3), (29, 2, 3), (17, 1, 3), (11, 1, 2), (7, 2, 1), (5, 1, 1)],
)
def test_choose_takes_seeds_before_pairs(networks, pairs, seeds):
    every = list(RECIPES)
    # One seed: two teachers and two students of the first pair, two more students of the second, four of the third.
    cost = {"seconds_per_step": 0.0, "epoch_start_seconds": 0.0, "evaluation_seconds": 0.0, "saving_seconds": 0.0}
    chosen = choose(
        every, _costs(every, **cost), seconds=10.0 * networks, seeds=3, epochs=2, workers=1, **PLAIN
    )  # fmt: skip
    assert chosen[:2] == (every[:pairs], seeds)


def test_choose_says_how_many_epochs_would_fit():
    every = list(RECIPES)
    free = {"setup_seconds": 0.0, "evaluation_seconds": 0.0, "epoch_start_seconds": 0.0, "saving_seconds": 0.0}
    with pytest.raises(InputError, match="needs about 16 minutes, and there are 4; about --epochs 60 would fit"):
        choose(every, _costs(every, **free), seconds=240.0, seeds=3, epochs=240, workers=1, **PLAIN)


def test_measure_takes_the_slowest_of_the_processes(monkeypatch):
    orders = []

    class Processes:
        def __init__(self, told):
            orders.extend(json.loads(json.dumps(told)))

        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

        def ready(self, _):
            return [{"start_seconds": float(number)} for number in range(len(orders))]

        def run(self, numbers, _):
            return [{"steps": 10, "seconds": 1.0 + number} for number in numbers]

    monkeypatch.setattr(gpu_plan, "Packed", Processes)
    studies = table_studies(list(RECIPES)[:1], seeds=1, epochs=2, **PLAIN)
    found = measure(studies, device="cpu", workers=2, threads=1, data_root=None)
    assert [(one["role"], one["name"]) for one in orders] == [
        ("teacher", "soteacher"), ("teacher", "soteacher"), ("student", "kd_wrn_16_2"), ("student", "kd_wrn_16_2"),
    ]  # fmt: skip
    assert [cost["seconds_per_step"] for cost in found.values()] == [0.2, 0.4]
    assert [cost["start_seconds"] for cost in found.values()] == [0.0, 2.0]


def test_deadline_asks_once_and_earlier_between_networks(monkeypatch):
    asked, now = [], [0.0]
    monkeypatch.setattr(gpu_table1.signal, "raise_signal", asked.append)
    deadline, job = Deadline(100.0, 30.0, lambda: now[0]), Job("teacher", "standard", 0)
    now[0] = 80.0
    deadline(job, {"event": "step"})
    assert not asked
    deadline(job, {"event": "finished"})
    deadline(job, {"event": "step"})
    assert len(asked) == 1
    assert not deadline.over()


def _finish(folder, *jobs):
    for job in jobs:
        place = network_folder(folder, job.role, job.arm, job.seed)
        place.mkdir(parents=True)
        for name in ("model.json", "model.safetensors"):
            (place / name).write_text("")


def test_weights_are_dropped_when_nothing_waits_for_them(tmp_path):
    config = table_studies(list(RECIPES)[:1], seeds=1, epochs=2, **PLAIN)["wrn_40_2"]
    standard, soteacher, first, second = jobs_of(config)
    _finish(tmp_path, standard, soteacher, first)
    drop_spent_weights(config, tmp_path)
    assert [path.parent.parent.name for path in tmp_path.rglob("*.safetensors")] == ["soteacher"]
    _finish(tmp_path, second)
    drop_spent_weights(config, tmp_path)
    assert not list(tmp_path.rglob("*.safetensors"))
    assert len(list(tmp_path.rglob("model.json"))) == 4


def test_table_has_the_papers_numbers(tmp_path):
    studies = table_studies(list(RECIPES)[1:2], seeds=3, epochs=240, **PLAIN)
    arm = {
        "arm": "soteacher-kd_wrn_40_1", "teacher_arm": "soteacher", "method": "kd", "seeds": [0, 1, 2],
        "teacher_accuracy_mean": 0.75, "accuracy_mean": 0.74, "accuracy_ci95": [0.73, 0.75],
        "difference_mean": 0.005, "difference_ci95": [0.001, 0.009], "verdict": "better",
    }  # fmt: skip
    run = tmp_path / "wrn_40_2"
    run.mkdir()
    (run / "results.json").write_text(json.dumps({"rows": [{}] * 12, "summary": [arm]}))
    machine = {"device": "a GPU", "torch": "2", "commit": "abc"}
    (run / "run.json").write_text(json.dumps({"environment": machine}))
    text = table_of(studies, tmp_path)
    assert "a GPU, torch 2, commit abc; seeds 0, 1, 2; 240 epochs, batch 64, fp32; 12 of 12 networks." in text
    networks, teacher, accuracy, student, seeds, difference, verdict, paper = text.splitlines()[-1].split(" | ")
    assert (networks, teacher) == ("| wrn_40_2 -> wrn_40_1", "soteacher")
    assert (accuracy, student) == ("75.00", "74.00 [73.00, 75.00]")
    assert (seeds, difference, verdict, paper) == ("3", "+0.50 [+0.10, +0.90]", "better", "74.35 |")


def test_made_up_images_are_a_data_set(tmp_path):
    make_up_images(tmp_path / "images.npz")
    data = NpzConfig(path=tmp_path / "images.npz").load(Path())
    assert (data.train.num_examples, data.test.num_examples, data.num_classes) == (40, 24, 3)


@pytest.fixture
def no_measuring(monkeypatch):
    def cost(studies, **_):
        return {kind: COST for config in studies.values() for kind in gpu_plan.kinds(config)}

    monkeypatch.setattr(gpu_table1, "measure", cost)


WORDS = ["--tiny", "--device", "cpu", "--pairs", "wrn_40_2-wrn_16_2", "--seeds", "1", "--epochs", "2"]


@pytest.mark.usefixtures("no_measuring", "no_report", "one_core")
def test_main_stops_in_time_and_goes_on(tmp_path, capsys):
    state, calls = tmp_path / "state", SimpleNamespace(number=0)

    def clock():
        calls.number += 1
        return 0.0 if calls.number < 5 else 1e6  # until the first network has trained for an epoch

    words = [*WORDS, "--state", str(state), "--total-minutes", "60"]
    gpu_table1.main(words, clock)
    assert "go on with the same command" in capsys.readouterr().out
    assert (state / "runs" / "wrn_40_2" / "teachers" / "standard" / "seed0" / "resume" / "state.safetensors").exists()
    assert (state / "table1.md").read_text().count("0 of 4 networks") == 1
    gpu_table1.main(words)
    out = capsys.readouterr().out
    assert "all is done" in out
    assert "4 of 4 networks" in out
    assert out.count("| wrn_40_2 -> wrn_16_2 |") == 2
    assert not list(state.rglob("*.safetensors"))
    rows = json.loads((state / "runs" / "wrn_40_2" / "results.json").read_text())["rows"]
    assert [row["epochs"] for row in rows] == [2] * 4
    with pytest.raises(InputError, match="was made with epochs 2, and 3 came"):
        gpu_table1.main([*words, "--epochs", "3"])


@pytest.mark.usefixtures("no_measuring")
def test_main_refuses_a_table_that_does_not_fit(tmp_path):
    with pytest.raises(InputError, match="not even one epoch would"):
        gpu_table1.main([*WORDS, "--state", str(tmp_path / "state"), "--minutes", "0.1"])
    assert (tmp_path / "state" / "measured.json").exists()
    assert not (tmp_path / "state" / "plan.json").exists()


def test_main_wants_positive_numbers(tmp_path):
    with pytest.raises(SystemExit):
        gpu_table1.main(["--state", str(tmp_path), "--seeds", "0"])
