import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from soteacher.data import DataSet, NpzConfig, load_data
from soteacher.diagnostics.card_config import FoldConfig
from soteacher.errors import InputError, InterruptedRunError
from soteacher.models.weights import load_weights, read_weights
from soteacher.out_of_fold import check_folds, folds_of, out_of_fold_predictions

Predict = Callable[..., torch.Tensor]


@pytest.fixture
def source(tiny_data: Path) -> NpzConfig:
    return NpzConfig(path=tiny_data, augment={"crop_padding": 1})


@pytest.fixture
def data(source: NpzConfig) -> DataSet:
    return load_data(source)


@pytest.fixture
def predict(tmp_path: Path, source: NpzConfig, data: DataSet, tiny_network: type[nn.Module]) -> Predict:
    """Make out-of-fold predictions by tiny networks, trained for an epoch."""

    def run(folder: Path = tmp_path, *, of: DataSet = data, **options: Any) -> torch.Tensor:
        names = ("on_event", "should_stop")
        more = {name: options.pop(name) for name in names if name in options}
        settings = {"model": "tiny", "folds": 3, "repeats": 1, "epochs": 1, "training": {"batch_size": 16}} | options
        return out_of_fold_predictions(
            FoldConfig(**settings), source, of, folder, device="cpu", factories={"tiny": tiny_network}, **more
        )

    return run


@pytest.mark.parametrize("num_folds", [2, 3, 7, 40])
def test_folds_are_of_one_size_and_balanced(num_folds: int) -> None:
    labels = torch.cat((torch.zeros(21), torch.ones(12), torch.full((7,), 2))).long()
    folds = folds_of(labels, num_folds, seed=3)
    sizes = torch.bincount(folds, minlength=num_folds)
    assert sizes.max() - sizes.min() <= 1
    for label in range(3):
        counts = torch.bincount(folds[labels == label], minlength=num_folds)
        assert counts.max() - counts.min() <= 1
    assert torch.equal(folds, folds_of(labels, num_folds, seed=3))
    assert not torch.equal(folds, folds_of(labels, num_folds, seed=4))


@pytest.mark.parametrize("num_folds", [0, 1, 7])
def test_impossible_folds_are_refused(num_folds: int) -> None:
    with pytest.raises(InputError, match=f"{num_folds} folds were asked for; wanted 2 to 6, the number of examples"):
        folds_of(torch.arange(6) % 2, num_folds, seed=0)


def test_a_fold_that_leaves_a_class_out_is_refused() -> None:
    labels = torch.tensor([0, 0, 0, 1, 1, 1, 2])
    folds = folds_of(labels, 2, seed=0)
    fold = int(folds[6]) + 1
    with pytest.raises(InputError, match=f"fold {fold} of 2 leaves the class 'ship' out .* 1 training example of it"):
        check_folds(labels, folds, ("cat", "dog", "ship"))
    with pytest.raises(InputError, match=r"leaves the class 'frog' out .* has 0 training examples of it, wanted at le"):
        check_folds(labels[:6], folds[:6], ("cat", "dog", "frog"))
    check_folds(labels[:6], folds_of(labels[:6], 6, seed=0), ("cat", "dog"))  # two of each class are enough


def test_predictions_are_the_mean_of_networks_that_have_not_seen_the_example(
    tmp_path: Path, data: DataSet, predict: Predict, tiny_network: type[nn.Module]
) -> None:
    told: list[tuple[int, int, str]] = []
    predictions = predict(repeats=2, on_event=lambda fold, job, event: told.append((fold, job.seed, event["event"])))
    assert predictions.shape == (40, 3)
    assert predictions.dtype == torch.float32
    torch.testing.assert_close(predictions.sum(1), torch.ones(40))
    finished = [(fold, seed) for fold, seed, event in told if event == "finished"]
    assert finished == [(fold, seed) for fold in range(3) for seed in range(2)]
    # By hand, from the weights that lie there.
    folds = folds_of(data.train.labels, 3, seed=0)
    mean, std = torch.tensor(data.mean), torch.tensor(data.std)
    for fold in range(3):
        images = (data.train.images[folds == fold].float() / 255 - mean.view(1, -1, 1, 1)) / std.view(1, -1, 1, 1)
        outputs = []
        for seed in range(2):
            network = tiny_network(3, 1).eval()
            path = tmp_path / f"out_of_fold/fold{fold}/teachers/fold/seed{seed}/model.safetensors"
            load_weights(network, read_weights(path), source=str(path))
            with torch.no_grad():
                outputs.append(network(images).softmax(1))
        assert not torch.equal(outputs[0], outputs[1])
        torch.testing.assert_close(predictions[folds == fold], (outputs[0] + outputs[1]) / 2)
    row = json.loads((path.parent / "model.json").read_text())
    assert sum(part["count"] for part in row["reliability"]["train"]) == int((folds != 2).sum())


def test_finished_folds_are_not_trained_again(tmp_path: Path, predict: Predict) -> None:
    whole = predict(tmp_path / "whole")
    trained: list[int] = []

    def stop_after_the_first(fold: int, job: Any, event: dict[str, Any]) -> None:
        del job
        trained.append(fold) if event["event"] == "finished" else None

    with pytest.raises(InterruptedRunError):
        predict(on_event=stop_after_the_first, should_stop=lambda: bool(trained))
    assert trained == [0]
    assert torch.equal(predict(on_event=stop_after_the_first), whole)
    assert trained == [0, 1, 2]
    assert torch.equal(predict(on_event=stop_after_the_first), whole)  # what lies there is read
    assert trained == [0, 1, 2]
    with np.load(tmp_path / "out_of_fold/predictions.npz") as file:
        assert torch.equal(torch.from_numpy(file["probabilities"]), whole)


def test_a_folder_of_other_data_or_settings_is_refused(tmp_path: Path, predict: Predict, data: DataSet) -> None:
    predict()
    with pytest.raises(InputError, match="of another kind: folds was 3, and is 4 now; choose another folder"):
        predict(folds=4)
    with pytest.raises(InputError, match=r"of another kind: data was .*, and is other now"):
        predict(of=replace(data, checksum="other"))
    predict()
    assert (tmp_path / "out_of_fold/predictions.npz").exists()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"folds": 41}, "41 folds were asked for; wanted 2 to 40"),
        ({"training": {"epoch": 2}}, "unknown key 'epoch'"),
        (
            {"training": {"optimizer": {"learning_rate": 1e30}}, "epochs": 4},
            "network without fold 1, seed 0: the loss is",
        ),
    ],
)
def test_bad_settings_end_in_one_line(tmp_path: Path, predict: Predict, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        predict(tmp_path / "out", **settings)
    assert "\n" not in str(caught.value)
    assert (tmp_path / "out").exists() == ("optimizer" in str(settings))


def test_a_class_with_one_example_is_refused_before_anything_is_trained(tmp_path: Path, predict: Predict, data) -> None:
    rows = [*(data.train.labels != 2).nonzero().flatten().tolist(), 2]
    with pytest.raises(InputError, match=r"leaves the class '2' out of its networks' training: the data has 1"):
        predict(tmp_path / "out", of=replace(data, train=data.train.subset(torch.tensor(rows))))
    assert not (tmp_path / "out").exists()
