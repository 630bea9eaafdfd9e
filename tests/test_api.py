import copy
import json
import pkgutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import soteacher
from soteacher.errors import InputError
from soteacher.recipes import read_study

pytestmark = pytest.mark.usefixtures("one_core", "no_report")

TRAINING = {"epochs": 1, "batch_size": 16}


@pytest.fixture
def data(tiny_data: Path) -> dict[str, Any]:
    return {"source": "npz", "path": str(tiny_data), "augment": {"crop_padding": 1}}


def test_importing_the_package_or_asking_for_help_imports_nothing_heavy() -> None:
    script = """
import sys
import soteacher, soteacher.cli
sys.argv = ["soteacher", "run", "--help"]
try:
    soteacher.cli.main()
except SystemExit as end:
    assert end.code in (0, None), end.code
heavy = {"torch", "numpy", "scipy", "rich.progress", "matplotlib", "timm"} & set(sys.modules)
assert not heavy, heavy
assert "run" in dir(soteacher) and "__version__" in dir(soteacher)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "--resume" in done.stdout


def test_every_public_name_is_there() -> None:
    for name in soteacher.__all__:
        assert getattr(soteacher, name) is not None
    # A module of such a name would take its place as soon as it is imported.
    assert not {module.name for module in pkgutil.iter_modules(soteacher.__path__)} & set(soteacher.__all__)
    with pytest.raises(AttributeError, match="has no attribute 'teech'"):
        _ = soteacher.teech


def test_teach_and_distill_with_networks_by_name(tmp_path: Path, data: dict[str, Any]) -> None:
    taught = soteacher.teach("resnet8", data, tmp_path / "teacher", training=TRAINING, settings=["logging=[]"])
    assert [(row["role"], row["arm"], row["method"]) for row in taught["rows"]] == [
        ("teacher", "soteacher", "soteacher")
    ]
    assert taught["recipe"] == "teach"
    distilled = soteacher.distill(
        tmp_path / "teacher", "resnet8", data, tmp_path / "student", training=TRAINING, seeds=[3, 1],
        settings=["logging=[]", "students.kd.terms.kd.temperature=2"],
    )  # fmt: skip
    rows = {(row["arm"], row["seed"]): row for row in distilled["rows"]}
    assert rows.keys() == {("teacher", 0), ("teacher-kd", 3), ("teacher-kd", 1)}
    assert rows["teacher", 0]["accuracy_last"] == taught["rows"][0]["accuracy_last"]
    facts = json.loads((tmp_path / "student/students/teacher-kd/seed1/model.json").read_text())
    assert facts["terms"]["kd"]["temperature"] == 2
    assert soteacher.load(tmp_path / "student/students/teacher-kd/seed1")(torch.rand(2, 1, 12, 12)).shape == (2, 3)


@pytest.mark.parametrize("method", ["kd", "simkd"])
def test_teach_distill_evaluate_and_export_networks_of_ones_own(
    method: str, tmp_path: Path, data: dict[str, Any], tiny_network: type[nn.Module]
) -> None:
    module = tiny_network(3, 1)
    before = copy.deepcopy(module.state_dict())
    soteacher.teach(module, data, tmp_path / "teacher", method="standard", training=TRAINING, settings=["logging=[]"])
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())
    results = soteacher.distill(
        tmp_path / "teacher", tiny_network, data, tmp_path / "student", teacher_model=tiny_network, training=TRAINING,
        method=method, settings=["logging=[]"],
    )  # fmt: skip
    accuracy = {row["role"]: row["accuracy_last"] for row in results["rows"]}
    for run, model in (("teacher", module), ("student", tiny_network)):
        figures = soteacher.evaluate(tmp_path / run, data, model=model, device="cpu")
        assert figures["accuracy"] == accuracy[run]
        with pytest.raises(InputError, match=f"unknown network '{run}_network'"):
            soteacher.evaluate(tmp_path / run, data)
        classifier = soteacher.load(tmp_path / run, model=model)
        assert not classifier.training
        assert classifier(torch.rand(2, 1, 12, 12)).shape == (2, 3)
    # The student becomes a teacher in its turn.
    chained = soteacher.distill(
        tmp_path / f"student/students/teacher-{method}/seed0", "resnet8", data, tmp_path / "third",
        teacher_model=tiny_network, training=TRAINING, settings=["logging=[]"],
    )  # fmt: skip
    assert chained["rows"][0]["accuracy_last"] == accuracy["student"]
    difference = soteacher.export(tmp_path / "student", data, tmp_path / "out", form="safetensors", model=tiny_network)
    assert difference == 0
    exported = soteacher.load(tmp_path / "out", model=tiny_network)
    images = torch.rand(2, 1, 12, 12)
    assert torch.equal(exported(images), soteacher.load(tmp_path / "student", model=tiny_network)(images))


def test_evaluate_gives_the_figures_of_both_splits(tmp_path: Path, data: dict[str, Any]) -> None:
    results = soteacher.teach("resnet8", data, tmp_path / "run", training=TRAINING, settings=["logging=[]"])
    row = results["rows"][0]
    figures = soteacher.evaluate(tmp_path / "run", data)
    assert (figures["accuracy"], figures["nll"], figures["ece"]) == (row["accuracy_last"], row["nll"], row["ece"])
    assert sum(entry["count"] for entry in figures["reliability"]) == 24
    assert soteacher.evaluate(tmp_path / "run", data, split="train")["accuracy"] == row["train_accuracy"]
    with pytest.raises(InputError, match="unknown split 'validation'; known: test, train"):
        soteacher.evaluate(tmp_path / "run", data, split="validation")
    with pytest.raises(InputError, match="knows 3 classes, and the data fashion_mnist_small has 10"):
        soteacher.evaluate(tmp_path / "run", "fashion_mnist_small")


def test_run_tells_of_every_network(tmp_path: Path, tiny_tree: Callable[..., dict[str, Any]], tiny_network) -> None:
    tree = tiny_tree(seeds=[0])
    for spec in (*tree["teachers"].values(), *tree["students"].values()):
        spec["model"] = "mine"
    events: dict[str, list[str]] = {}
    results = soteacher.run(
        tree, tmp_path / "run", networks={"mine": tiny_network}, settings=["training.epochs=1"],
        on_event=lambda job, event: events.setdefault(job.name, []).append(event["event"]),
    )  # fmt: skip
    assert len(events) == len(results["rows"]) == 5
    assert all(names == ["started", "step", "epoch", "finished"] for names in events.values())


def test_run_takes_a_method_and_a_pair_of_networks(
    tmp_path: Path, tiny_data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[Any] = []
    monkeypatch.setattr("soteacher.api.run_study", lambda config, *_, **__: started.append(config) or {})
    soteacher.run(
        "kd_standardized", tmp_path / "run", pair="vgg13-vgg8", settings=[f"data={{source: npz, path: {tiny_data}}}"]
    )
    (config,) = started
    assert config == read_study("kd_standardized", [f"data={{source: npz, path: {tiny_data}}}"], "vgg13-vgg8")
    assert config.students["kd_standardized"].model == "vgg8"


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda _, out: soteacher.run("kd", out, pair="vgg13-vg8"),
            "unknown pair 'vgg13-vg8'; did you mean vgg13-vgg8",
        ),
        (lambda _, out: soteacher.run("quickstart", out, pair="vgg13-vgg8"), "quickstart is a whole study"),
        (lambda data, out: soteacher.teach("resnet8", data, out, method="kd"), "kd is a method for a student"),
        (lambda data, out: soteacher.teach("resnet8", data, out, method="standart"), "did you mean standard"),
        (lambda _, out: soteacher.teach("resnet8", "cifar", out), "unknown source 'cifar'; did you mean cifar10"),
        (lambda data, out: soteacher.teach("resnet8", data, out, seeds=[]), "seeds must be at least one"),
        (lambda data, out: soteacher.teach("resnet8", data, out, training={"epochs": 0}), "training.epochs"),
        (lambda data, out: soteacher.teach("resnet8", data, out, device="tpu"), "unknown device 'tpu'"),
        (lambda data, out: soteacher.distill("nowhere", "resnet8", data, out), "no network at nowhere"),
        (lambda _, out: soteacher.run("quickstrat", out), "unknown recipe 'quickstrat'; did you mean quickstart?"),
        (lambda data, out: soteacher.teach(3, data, out), "a network of your own is a module or a function"),
        (
            lambda _, out: soteacher.run("quickstart", out, networks={"mine": "resnet8"}),
            "a network of your own is a module or a function that makes one, got 'resnet8'",
        ),
    ],
)
def test_bad_input_is_an_ordinary_value_error_and_leaves_nothing(
    tmp_path: Path, data: dict[str, Any], call: Callable[..., Any], message: str
) -> None:
    with pytest.raises(ValueError, match=r".") as caught:
        call(data, tmp_path / "run")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"train_images": np.full((40, 12, 12), np.nan, np.float32)},
            "train_images of .* has values that are not finite",
        ),
        ({"test_labels": np.arange(24) % 4}, "test_labels of .* has label 3; wanted 0 to 2"),
        ({"train_labels": np.arange(40) % 3 - 1}, "train_labels of .* has label -1; wanted integers from 0"),
        ({"train_labels": np.zeros(40, np.int64)}, "train_labels of .* has one class only; wanted 2 or more"),
        ({"train_labels": np.arange(39) % 3}, "train_labels of .* has 39 labels for 40 images"),
        ({"test_images": np.zeros((24, 10, 10), np.uint8)}, "images of .* differ between the splits"),
    ],
)
def test_data_that_cannot_be_used_is_refused_before_anything_is_written(
    tmp_path: Path, tiny_arrays: dict[str, np.ndarray], change: dict[str, np.ndarray], message: str
) -> None:
    np.savez(tmp_path / "data.npz", **tiny_arrays | change)
    data = {"source": "npz", "path": str(tmp_path / "data.npz")}
    with pytest.raises(InputError, match=message):
        soteacher.teach("resnet8", data, tmp_path / "run")
    assert [path.name for path in tmp_path.iterdir()] == ["data.npz"]


def test_a_method_without_a_teacher_is_no_way_to_distil(tmp_path: Path, data: dict[str, Any]) -> None:
    with pytest.raises(InputError, match="the method alone does not read a teacher"):
        soteacher.distill(tmp_path, "resnet8", data, tmp_path / "out", method="alone")
    with pytest.raises(InputError, match="unknown method 'SoTeacher'; did you mean soteacher"):
        soteacher.teach("resnet8", data, tmp_path / "out", method="SoTeacher")
    assert not (tmp_path / "out").exists()


def test_a_module_is_refused_for_several_seeds(tmp_path: Path, data: dict[str, Any], tiny_network) -> None:
    with pytest.raises(InputError, match="every one of 2 seeds would start from its weights"):
        soteacher.teach(tiny_network(3, 1), data, tmp_path / "out", seeds=[0, 1], training=TRAINING)
    assert not (tmp_path / "out").exists()


def test_data_is_named_as_on_the_command_line(tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from soteacher.api import read_data

    assert read_data(str(tiny_data)).num_classes == 3
    monkeypatch.chdir(tmp_path)
    (tmp_path / "fashion_mnist_small").mkdir()  # a source's name goes before a folder's
    assert read_data("fashion_mnist_small").num_classes == 10


def test_networks_of_other_classes_are_refused(tmp_path: Path, tiny_arrays, tiny_network) -> None:
    for name, labels in (("one", ["a", "b", "c"]), ("two", ["a", "c", "b"])):
        np.savez(tmp_path / f"{name}.npz", **tiny_arrays, label_names=np.array(labels))
    soteacher.teach(
        tiny_network, str(tmp_path / "one.npz"), tmp_path / "run", training=TRAINING, settings=["logging=[]"]
    )
    with pytest.raises(InputError, match="differ in a class: 'b' of the network is 'c' in the data"):
        soteacher.evaluate(tmp_path / "run", str(tmp_path / "two.npz"), model=tiny_network)


def test_a_foreign_teacher_may_bring_its_own_normalisation(tmp_path: Path, tiny_tree) -> None:
    from soteacher.models.zoo import build_network

    torch.save({"net": build_network("resnet8", num_classes=3, in_channels=1).state_dict()}, tmp_path / "theirs.pth")
    given = {"file": str(tmp_path / "theirs.pth"), "model": "resnet8", "mean": [0.25], "std": [0.5]}
    tree = tiny_tree(teachers={"given": given}, students={}, baseline=None)
    soteacher.run(tree, tmp_path / "run")
    network = json.loads((tmp_path / "run/teachers/given/seed0/model.json").read_text())["network"]
    assert (network["mean"], network["std"]) == ([0.25], [0.5])


LOOK = {"views": 2, "most_different": 2}


@pytest.fixture
def no_card_page(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave the card's page out, which takes longer than the card."""
    monkeypatch.setattr("soteacher.report.card_page.write_card_page", lambda folder: folder / "card.html")


def _without_seconds(card: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in card.items() if key != "seconds"}


@pytest.mark.usefixtures("no_card_page")
def test_card_of_a_run_a_file_a_foreign_checkpoint_and_a_module(tmp_path: Path, data: dict[str, Any]) -> None:
    results = soteacher.teach(
        "resnet8", data, tmp_path / "run", training=TRAINING, settings=["logging=[]", "card=null"]
    )
    made = soteacher.card(tmp_path / "run", data, tmp_path / "card", look=LOOK, device="cpu")
    assert json.loads((tmp_path / "card/card.json").read_text()) == made
    assert made["figures"]["test"]["accuracy"] == results["rows"][0]["accuracy_last"]
    assert made["figures"]["test"]["nll"] == pytest.approx(results["rows"][0]["nll"])
    weights = tmp_path / "run/teachers/soteacher/seed0/model.safetensors"
    again = soteacher.card(weights, data, tmp_path / "card", look=LOOK, device="cpu")  # a card may be made again
    assert _without_seconds(again) == _without_seconds(made)
    classifier = soteacher.load(tmp_path / "run")
    torch.save(classifier.network.state_dict(), tmp_path / "theirs.pth")
    with pytest.raises(InputError, match=r"theirs\.pth does not say which network it is: name its model"):
        soteacher.card(tmp_path / "theirs.pth", data, tmp_path / "other")
    foreign = soteacher.card(tmp_path / "theirs.pth", data, tmp_path / "b", model="resnet8", look=LOOK, device="cpu")
    assert foreign["figures"] == made["figures"]
    for module in (classifier, classifier.network):
        own = soteacher.card(module, data, tmp_path / "c", look=LOOK, device="cpu")
        assert (own["figures"], own["network"]["model"]) == (made["figures"], "ResNet")
    assert not (tmp_path / "other").exists()


@pytest.mark.usefixtures("no_card_page")
def test_card_draws_the_views_that_the_network_was_trained_with(tmp_path: Path, data: dict[str, Any]) -> None:
    still = data | {"augment": {"crop_padding": 0, "horizontal_flip": False}}
    soteacher.teach("resnet8", still, tmp_path / "run", training=TRAINING, settings=["logging=[]", "card=null"])
    made = soteacher.card(tmp_path / "run", data["path"], tmp_path / "card", look=LOOK)
    assert made["sampled"]["views"] == 0
    settings = ["data.augment.horizontal_flip=true", "card.views=3"]
    other = soteacher.card(tmp_path / "run", data["path"], tmp_path / "card", look=LOOK, settings=settings)
    assert other["sampled"]["views"] == 3


@pytest.mark.usefixtures("no_card_page")
def test_a_card_takes_for_training_images_those_that_the_network_was_trained_on(
    tmp_path: Path, data: dict[str, Any], tiny_arrays: dict[str, np.ndarray], tiny_network
) -> None:
    results = soteacher.teach(
        tiny_network, data | {"train_examples": 15}, tmp_path / "run", training=TRAINING, method="standard",
        settings=["logging=[]", "card=null"],
    )  # fmt: skip
    options = {"model": tiny_network, "look": LOOK}
    made = soteacher.card(tmp_path / "run", data["path"], tmp_path / "card", **options)
    assert made["data"]["train_examples"] == 15
    assert made["figures"]["train"]["accuracy"] == results["rows"][0]["train_accuracy"]
    made = soteacher.card(tmp_path / "run", data | {"train_examples": 30}, tmp_path / "card", **options)
    assert made["data"]["train_examples"] == 30
    np.savez(tmp_path / "other.npz", **tiny_arrays)
    made = soteacher.card(tmp_path / "run", str(tmp_path / "other.npz"), tmp_path / "card", **options)
    assert made["data"]["train_examples"] == 40


@pytest.mark.usefixtures("no_card_page")
def test_card_beside_out_of_fold_predictions(tmp_path: Path, data: dict[str, Any], tiny_network) -> None:
    soteacher.teach(
        tiny_network, data, tmp_path / "run", training=TRAINING, method="standard", settings=["logging=[]", "card=null"]
    )
    folds = {"folds": 2, "epochs": 1, "training": {"batch_size": 16}}
    told: list[int] = []
    options = {"look": LOOK, "folds": folds, "on_fold": lambda fold, *_: told.append(fold)}
    made = soteacher.card(tmp_path / "run", data, tmp_path / "card", model=tiny_network, **options)
    assert set(told) == {0, 1}
    assert made["figures"]["distance"].keys() == {"train_out_of_fold"}
    assert (tmp_path / "card/out_of_fold/predictions.npz").exists()
    told.clear()
    again = soteacher.card(tmp_path / "run", data, tmp_path / "card", model=tiny_network, **options)
    assert (told, again["figures"]) == ([], made["figures"])
    with pytest.raises(InputError, match="folds train networks that start anew: name their model"):
        soteacher.card(tiny_network(3, 1), data, tmp_path / "other", look=LOOK, folds=folds)
    with pytest.raises(InputError, match="41 folds were asked for; wanted 2 to 40"):
        soteacher.card(tiny_network(3, 1), data, tmp_path / "other", folds=folds | {"folds": 41, "model": "resnet8"})
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"look": {"views": 1}}, "card.views: .* greater than or equal to 2, got 1"),
        ({"look": {"view": 2}}, "card: unknown key 'view'; did you mean views"),
        ({"folds": {"folds": 1, "model": "resnet8"}}, "folds.folds: .* greater than or equal to 2, got 1"),
        ({"folds": {"model": "resnt8"}}, "unknown network 'resnt8'; did you mean"),
        ({"folds": {"model": "resnet8", "training": {"epoch": 1}}}, "unknown key 'epoch'"),
        ({"settings": ["data.train_example=4"]}, "unknown key 'train_example'; did you mean train_examples"),
        ({"settings": ["dota.train_examples=4"]}, "unknown key 'dota'; did you mean data"),
        ({"settings": ["card=5"]}, "card: .*5"),
        ({"device": "tpu"}, "unknown device 'tpu'"),
    ],
)
def test_bad_input_to_a_card_is_one_line_and_leaves_nothing(
    tmp_path: Path, data: dict[str, Any], tiny_network, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError, match=message) as caught:
        soteacher.card(tiny_network(3, 1), data, tmp_path / "card", **options)
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_a_card_is_refused_where_a_file_is_or_no_logits_come(
    tmp_path: Path, data: dict[str, Any], tiny_network
) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(InputError, match="file cannot be a folder: a file is in its place"):
        soteacher.card(tiny_network(3, 1), data, tmp_path / "file")
    ends = nn.Sequential(tiny_network(3, 1), nn.Softmax(dim=1))
    with pytest.raises(InputError, match=r"puts out probabilities .* wanted logits"):
        soteacher.card(ends, data, tmp_path / "card")
    with pytest.raises(InputError, match="puts out 4 numbers for each image, wanted logits of 3 classes"):
        soteacher.card(tiny_network(4, 1), data, tmp_path / "card")
    assert (tmp_path / "file").read_text() == "mine"
    assert not (tmp_path / "card").exists()


def test_what_is_asked_for_goes_over_what_a_method_sets(tmp_path: Path, data: dict[str, Any], tiny_network) -> None:
    options: dict[str, Any] = {"settings": ["training.epochs=2", "logging=[]", "card=null"], "training": TRAINING}
    results = soteacher.teach(tiny_network, data, tmp_path / "mcmi", method="mcmi", **options)
    assert {row["arm"]: row["epochs"] for row in results["rows"]} == {"standard": 2, "mcmi": 2}  # not the method's 20
    average = ["training.averaging.decay=0.5", "training.averaging.start=1", "logging=[]", "card=null"]
    soteacher.teach(tiny_network, data, tmp_path / "ema", method="ema", training=TRAINING, settings=average)
    facts = json.loads((tmp_path / "ema/teachers/ema/seed0/model.json").read_text())
    assert facts["training"]["averaging"] == {"name": "ema", "decay": 0.5, "start": 1.0}


def test_teach_goes_on_from_a_network_or_learns_from_it(tmp_path: Path, data: dict[str, Any], tiny_network) -> None:
    options: dict[str, Any] = {"settings": ["logging=[]", "card=null"], "training": TRAINING}
    soteacher.teach(tiny_network, data, tmp_path / "first", method="standard", **options)
    tuned = soteacher.teach(tiny_network, data, tmp_path / "tuned", method="mcmi", start=tmp_path / "first", **options)
    assert [(row["arm"], row["method"]) for row in tuned["rows"]] == [("start_network", "file"), ("mcmi", "mcmi")]
    # The run's folder means the network that it was made for.
    of_run, of_arm = (
        soteacher.load(tmp_path / "tuned" / place, model=tiny_network) for place in ("", "teachers/mcmi/seed0")
    )
    assert all(torch.equal(one, other) for one, other in zip(of_run.parameters(), of_arm.parameters(), strict=True))
    with pytest.raises(InputError, match="mcmi goes on from a trained network and learns from none: give start"):
        soteacher.teach(tiny_network, data, tmp_path / "x", method="mcmi", teacher=tmp_path / "first", **options)
    with pytest.raises(InputError, match=r"assistant learns from a trained network: give teacher"):
        soteacher.teach(tiny_network, data, tmp_path / "x", method="assistant", **options)
    with pytest.raises(InputError, match=r"sftn needs the student's network: set terms.sftn.student"):
        soteacher.teach("resnet8", data, tmp_path / "x", method="sftn", **options)
    assert not (tmp_path / "x").exists()


def test_a_card_is_about_the_images_that_a_network_was_trained_on(tmp_path: Path, data: dict[str, Any]) -> None:
    settings = ["training.held_out=0.25", "logging=[]", "card.views=2"]
    soteacher.teach("resnet8", data, tmp_path / "run", method="standard", training=TRAINING, settings=settings)
    of_study = json.loads((tmp_path / "run/teachers/standard/seed0/card.json").read_text())
    card = soteacher.card(tmp_path / "run", data, tmp_path / "card", look={"views": 2})
    assert card["data"]["train_examples"] == of_study["data"]["train_examples"] == 30
    assert card["figures"] == of_study["figures"]
