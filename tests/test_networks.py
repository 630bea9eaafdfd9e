import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from soteacher.errors import InputError
from soteacher.models.weights import load_classifier

pytestmark = pytest.mark.usefixtures("one_core", "no_report")

TRAINING = {"epochs": 4, "batch_size": 16}


def _row(results: dict[str, Any], arm: str) -> dict[str, Any]:
    return next(row for row in results["rows"] if row["arm"] == arm)


def _lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_an_early_stopped_teacher_is_the_teacher_of_that_epoch(tmp_path: Path, train, tiny_study) -> None:
    tree = tiny_study(training=TRAINING, baseline=None, students={"kd": {"model": "tiny"}})
    tree["teachers"] = {"early": {"from": "standard", "after": 0.5}, "standard": tree["teachers"]["standard"]}
    results = train(tree, tmp_path / "run")
    shorter = tiny_study(training=TRAINING, baseline=None, students={})
    shorter["teachers"] = {"standard": shorter["teachers"]["standard"]}
    # A run of its own, stopped for good after two epochs of the same schedule of four.
    seen: list[dict[str, torch.Tensor]] = []

    def stop(_: Any, event: dict[str, Any]) -> None:
        if event["event"] == "epoch" and event["epoch"] == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(shorter | {"training": TRAINING | {"save_every": 1}}, tmp_path / "other", on_event=stop)
    seen.append(load_file(tmp_path / "other/teachers/standard/seed0/epochs/after-2.safetensors"))
    folder = tmp_path / "run" / "teachers" / "early" / "seed0"
    early = load_file(folder / "model.safetensors")
    assert all(torch.equal(early[name], seen[0][name]) for name in early)
    assert _lines(folder) == _lines(tmp_path / "run/teachers/standard/seed0")[:2]
    assert _row(results, "early")["epochs"] == 2
    assert _row(results, "early")["accuracy_last"] == _lines(folder)[-1]["test_accuracy"]
    assert _row(results, "early")["method"] == "standard"
    assert _row(results, "early-kd")["teacher_arm"] == "early"
    assert [path.name for path in (tmp_path / "run").rglob("after-*")] == ["after-2.safetensors"]


def test_a_teacher_stopped_at_its_end_is_the_teacher(tmp_path: Path, train, tiny_study) -> None:
    tree = tiny_study(students={}, baseline=None)
    tree["teachers"]["early"] = {"from": "standard", "after": 2}
    results = train(tree, tmp_path / "run")
    weights = [(tmp_path / f"run/teachers/{arm}/seed0/model.safetensors").read_bytes() for arm in ("standard", "early")]
    assert weights[0] == weights[1]
    assert _row(results, "early")["accuracy_last"] == _row(results, "standard")["accuracy_last"]


def test_save_every_keeps_every_so_manyth_epoch(tmp_path: Path, train, tiny_study) -> None:
    tree = tiny_study(training=TRAINING | {"epochs": 5, "save_every": 2}, students={}, baseline=None)
    del tree["teachers"]["soteacher"]
    train(tree, tmp_path / "run")
    folder = tmp_path / "run/teachers/standard/seed0"
    assert sorted(path.name for path in (folder / "epochs").iterdir()) == ["after-2.safetensors", "after-4.safetensors"]
    tree["teachers"]["early"] = {"from": "standard", "after": 4}
    train(tree, tmp_path / "run", resume=True)
    early = tmp_path / "run/teachers/early/seed0/model.safetensors"
    assert load_file(early).keys() == load_file(folder / "epochs/after-4.safetensors").keys()


def test_an_epoch_that_was_not_kept_is_named(tmp_path: Path, train, tiny_study) -> None:
    tree = tiny_study(students={}, baseline=None)
    train(tree, tmp_path / "run")
    tree["teachers"]["early"] = {"from": "standard", "after": 1}
    with pytest.raises(InputError) as caught:
        train(tree, tmp_path / "run", resume=True)
    assert str(caught.value) == (
        "teacher early/seed0: the weights of teacher standard/seed0 after 1 epochs were not kept; kept: none; "
        "train it anew in another folder, together with what needs them, or take one that was kept"
    )


def test_model_json_holds_all_that_made_the_network(tmp_path: Path, train, tiny_study) -> None:
    tree = tiny_study()
    tree["students"]["kd"] |= {"terms": {"kd": {"temperature": 2}}, "training": {"epochs": 1}}
    results = train(tree, tmp_path / "run")
    facts = json.loads((tmp_path / "run/students/soteacher-kd/seed0/model.json").read_text())
    assert (facts["role"], facts["arm"], facts["seed"], facts["method"]) == ("student", "soteacher-kd", 0, "kd")
    assert facts["terms"]["kd"] == {
        "weight": 0.5, "ramp": "constant", "stage": "training", "standardize": False, "temperature": 2.0,
    }  # fmt: skip
    assert (facts["training"]["epochs"], facts["training"]["batch_size"]) == (1, 16)
    assert facts["row"] == _row(results, "soteacher-kd")
    assert facts["row"]["parameters"] == 6 * 9 + 2 * 6 + 18 * 3 + 3
    assert facts["network"]["class_names"] == ["0", "1", "2"]
    for split, count in (("test", 24), ("train", 40)):
        assert sum(entry["count"] for entry in facts["reliability"][split]) == count
    teacher = json.loads((tmp_path / "run/teachers/soteacher/seed0/model.json").read_text())
    assert len({facts["fingerprint"], teacher["fingerprint"]}) == 2


def test_every_setting_that_decides_a_number_is_in_the_fingerprint(tmp_path: Path, train, tiny_study) -> None:
    changes: list[dict[str, Any]] = [
        {}, {"training": {"epochs": 1, "batch_size": 8}}, {"seeds": [1]}, {"terms": {"cross_entropy": {"weight": 2}}},
        {"augment": {"crop_padding": 0}}, {"method": "soteacher"},
    ]  # fmt: skip
    found = set()
    for number, change in enumerate(changes):
        tree = tiny_study(training={"epochs": 1, "batch_size": 40}, students={}, baseline=None)
        tree["teachers"] = {"one": {"model": "tiny", "method": change.get("method", "standard")}}
        tree["teachers"]["one"]["terms"] = change.get("terms", {})
        tree["data"]["augment"] |= change.get("augment", {})
        tree |= {key: change[key] for key in ("training", "seeds") if key in change}
        train(tree, tmp_path / str(number))
        (facts,) = (tmp_path / str(number)).rglob("model.json")
        found.add(json.loads(facts.read_text())["fingerprint"])
    assert len(found) == len(changes)


def test_a_file_can_be_the_teacher(tmp_path: Path, train, tiny_study) -> None:
    train(tiny_study(students={}, baseline=None), tmp_path / "teachers")
    file = tmp_path / "teachers/teachers/soteacher/seed0"
    tree = tiny_study(baseline=None, seeds=[0, 1])
    tree["teachers"] = {"given": {"file": str(file)}}
    results = train(tree, tmp_path / "run")
    row = _row(results, "given")
    assert (row["method"], row["epochs"], row["train_seconds"], row["images_per_second"]) == ("file", 0, 0, None)
    assert row["accuracy_last"] == row["accuracy_best"] == row["accuracy_mean_last_10"]
    copied = load_file(tmp_path / "run/teachers/given/seed0/model.safetensors")
    original = load_file(file / "model.safetensors")
    assert all(torch.equal(copied[name], original[name]) for name in original)
    assert {row["arm"] for row in results["rows"]} == {"given", "alone", "given-kd"}


def test_a_student_learns_from_its_teacher_as_it_was_saved(tmp_path: Path, train, tiny_study) -> None:
    train(tiny_study(), tmp_path / "run")
    tree = tiny_study(baseline=None, students={"kd": {"model": "tiny"}})
    tree["teachers"] = {"soteacher": {"file": str(tmp_path / "run/teachers/soteacher/seed0")}}
    train(tree, tmp_path / "again")
    weights = [tmp_path / name / "students/soteacher-kd/seed0/model.safetensors" for name in ("run", "again")]
    assert weights[0].read_bytes() == weights[1].read_bytes()


@pytest.mark.parametrize(
    "over", [{"channels_last": True}, {"precision": "bf16-mixed"}, {"optimizer": {"name": "adamw"}}]
)
def test_every_way_of_training_leaves_a_network_in_float32(tmp_path: Path, train, tiny_study, over) -> None:
    tree = tiny_study(training=TRAINING | {"epochs": 1} | over)
    results = train(tree, tmp_path / "run")
    assert len(results["rows"]) == 5
    weights = load_file(tmp_path / "run/students/soteacher-kd/seed0/model.safetensors")
    assert {value.dtype for value in weights.values()} == {torch.float32, torch.int64}


def test_a_trained_network_of_the_zoo_loads_and_gives_its_accuracy(tmp_path: Path, tiny_tree, tiny_arrays) -> None:
    from soteacher.recipes import read_study
    from soteacher.studies import run_study

    tree = tiny_tree(students={}, baseline=None, training={"epochs": 1, "batch_size": 16})
    del tree["teachers"]["soteacher"]
    results = run_study(read_study(tree), tmp_path / "run")
    classifier = load_classifier(tmp_path / "run/teachers/standard/seed0")[0]
    images = torch.from_numpy(tiny_arrays["test_images"])[:, None].float() / 255
    right = (classifier(images).argmax(1) == torch.from_numpy(tiny_arrays["test_labels"])).float().mean()
    assert results["rows"][0]["accuracy_last"] == pytest.approx(right.item())
    assert results["rows"][0]["model"] == "resnet8"
