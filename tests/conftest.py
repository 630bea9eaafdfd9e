"""A tiny data set and a tiny study: networks that train in a fraction of a second."""

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from soteacher import studies
from soteacher.recipes import read_study
from soteacher.studies import run_study

TIMES = ("seconds", "images_per_second", "train_seconds", "seconds_per_step", "peak_memory_bytes")


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    """Tiny tensors are not worth a second thread."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tiny_arrays() -> dict[str, np.ndarray]:
    """Three classes of 12 x 12 images that differ in where they are bright: 40 to train on, 24 to test on."""
    random = np.random.default_rng(0)

    def split(count: int) -> tuple[np.ndarray, np.ndarray]:
        labels = np.arange(count) % 3
        images = random.integers(0, 160, (count, 12, 12))
        for place, label in enumerate(labels):
            images[place, 4 * label : 4 * label + 4] += 90
        return images.astype(np.uint8), labels.astype(np.int64)

    train_images, train_labels = split(40)
    test_images, test_labels = split(24)
    return {
        "train_images": train_images, "train_labels": train_labels,
        "test_images": test_images, "test_labels": test_labels,
    }  # fmt: skip


@pytest.fixture(scope="session")
def tiny_data(tiny_arrays: dict[str, np.ndarray], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny data set as a file."""
    path = tmp_path_factory.mktemp("data") / "tiny.npz"
    np.savez(path, **tiny_arrays)
    return path


@pytest.fixture
def tiny_tree(tiny_data: Path) -> Callable[..., dict[str, Any]]:
    """Make a study's settings: two teachers, two students, one seed, two epochs of three steps; more laid over it."""

    def make(**over: Any) -> dict[str, Any]:
        tree: dict[str, Any] = {
            "name": "tiny",
            "data": {"source": "npz", "path": str(tiny_data), "augment": {"crop_padding": 1}},
            "seeds": [0],
            "baseline": "standard-kd",
            "training": {"epochs": 2, "batch_size": 16},
            "teachers": {
                "standard": {"model": "resnet8", "method": "standard"},
                "soteacher": {"model": "resnet8", "method": "soteacher"},
            },
            "students": {
                "alone": {"model": "resnet8", "method": "alone"},
                "kd": {"model": "resnet8", "method": "kd"},
            },
            "logging": [],
            "card": None,
        }
        return copy.deepcopy(tree) | over

    return make


class TinyNetwork(nn.Module):
    """A network with all that makes a resumed run differ: batch norm's averages, dropout, a momentum."""

    def __init__(self, num_classes: int, in_channels: int) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(in_channels, 6, 3, stride=2, bias=False)
        self.norm = nn.BatchNorm2d(6)
        self.dropout = nn.Dropout(0.2)
        self.head = nn.Linear(18, num_classes)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        maps = torch.relu(self.norm(self.convolution(images)))
        rows = nn.functional.adaptive_avg_pool2d(maps, (3, 1)).flatten(1)
        return self.head(self.dropout(rows))


@pytest.fixture
def tiny_network() -> type[TinyNetwork]:
    """A network's class; it is a factory as well."""
    return TinyNetwork


@pytest.fixture
def tiny_study(tiny_tree: Callable[..., dict[str, Any]]) -> Callable[..., dict[str, Any]]:
    """Make the tiny study with the tiny network instead of a ResNet."""

    def make(**over: Any) -> dict[str, Any]:
        tree = tiny_tree() | over
        for spec in (*tree["teachers"].values(), *tree["students"].values()):
            if "model" in spec:
                spec["model"] = "tiny"
        return tree

    return make


@pytest.fixture
def train(tiny_network: Callable[[int, int], nn.Module]) -> Callable[..., dict[str, Any]]:
    """Run a study of tiny networks in this process."""

    def run(tree: dict[str, Any], folder: Path, **options: Any) -> dict[str, Any]:
        return run_study(read_study(tree), folder, factories={"tiny": tiny_network}, **options)

    return run


@pytest.fixture
def no_report(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave the page out, which takes longer than the training."""
    monkeypatch.setattr(studies, "write_report", lambda _: None)


@pytest.fixture
def one_core(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two threads on tiny tensors wait for each other most of the time."""
    monkeypatch.setattr(studies, "available_cores", lambda: 1)


@pytest.fixture
def figures_of() -> Callable[[Path], list[dict[str, Any]]]:
    """Read the lines of a ``metrics.jsonl`` without the times."""

    def read(path: Path) -> list[dict[str, Any]]:
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        return [{key: value for key, value in line.items() if key not in TIMES} for line in lines]

    return read


@pytest.fixture
def outcome_of(figures_of: Callable[[Path], list[dict[str, Any]]]) -> Callable[[Path], dict[str, Any]]:
    """Read all that decides whether two runs are the same: every network's weights and figures, and the results."""

    def read(run: Path) -> dict[str, Any]:
        outcome: dict[str, Any] = {}
        for path in sorted(run.rglob("*.safetensors")):
            outcome[str(path.relative_to(run))] = path.read_bytes()
        for path in sorted(run.rglob("metrics.jsonl")):
            outcome[str(path.relative_to(run))] = figures_of(path)
        results = json.loads((run / "results.json").read_text())
        outcome["rows"] = [{key: value for key, value in row.items() if key not in TIMES} for row in results["rows"]]
        outcome["summary"] = results["summary"]
        return outcome

    return read
