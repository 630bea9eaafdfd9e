"""A run's folder, made up: what a study leaves, with values that are easy to follow."""

import json
import math
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from soteacher.statistics import summarise

ENVIRONMENT = {"python": "3.11.9", "torch": "2.13.0", "device": "cpu", "threads": 2, "commit": None}


def _epochs(*, final: float, num_epochs: int, noise: random.Random) -> list[dict[str, Any]]:
    """Return the lines of ``metrics.jsonl`` of a network that ends at an accuracy."""
    lines = []
    for epoch in range(num_epochs):
        share = 1 - math.exp(-4 * (epoch + 1) / num_epochs)
        test = final * share + (noise.gauss(0, 0.004) if epoch < num_epochs - 1 else 0)
        lines.append(
            {
                "epoch": epoch,
                "learning_rate": 0.05,
                "train_loss": 2 * (1 - share),
                "train_accuracy": min(1.0, test + 0.1 * share),
                "losses": {"cross_entropy": 1 - share, "lipschitz": 0.1},
                "test_accuracy": test,
                "test_nll": 1.5 - share,
                "test_ece": 0.04,
                "seconds": 2.5,
                "images_per_second": 2000.0,
            }
        )
    return lines


def _bins(*, shift: float, noise: random.Random) -> list[dict[str, Any]]:
    """Return 15 bins of a network whose accuracy lies ``shift`` below its confidence; the first is empty."""
    bins = []
    for place in range(15):
        middle = (place + 0.5) / 15
        full = place > 0
        accuracy = min(1.0, max(0.0, middle - shift + noise.gauss(0, 0.01)))
        bins.append(
            {
                "lower": place / 15,
                "upper": (place + 1) / 15,
                "count": place**2 if full else 0,
                "confidence": middle if full else None,
                "accuracy": accuracy if full else None,
            }
        )
    return bins


def write_network(
    folder: Path, *, role: str, arm: str, seed: int, final: float, teacher_arm: str | None, num_epochs: int
) -> dict[str, Any]:
    """Write the folder of one network and return its row."""
    noise = random.Random(f"{role}/{arm}/{seed}")
    target = folder / f"{role}s" / arm / f"seed{seed}"
    target.mkdir(parents=True)
    epochs = _epochs(final=final, num_epochs=num_epochs, noise=noise)
    (target / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in epochs))
    row = {
        "role": role,
        "arm": arm,
        "teacher_arm": teacher_arm,
        "method": arm.rpartition("-")[2],
        "model": "wrn_40_2" if role == "teacher" else "wrn_16_1",
        "data": "fashion_mnist",
        "seed": seed,
        "epochs": num_epochs,
        "accuracy_last": final,
        "accuracy_best": final + 0.003,
        "accuracy_mean_last_10": final - 0.001,
        "train_accuracy": final + 0.1,
        "nll": 0.45,
        "ece": 0.031,
        "train_seconds": (61.5 if role == "teacher" else 21.25) + seed,
        "images_per_second": 2412.7,
        "parameters": 2_243_546 if role == "teacher" else 175_066,
    }
    reliability = {"test": _bins(shift=0.08, noise=noise), "train": _bins(shift=-0.02, noise=noise)}
    model = {"schema": 1, "network": {}, "role": role, "arm": arm, "seed": seed, "row": row, "reliability": reliability}
    (target / "model.json").write_text(json.dumps(model))
    return row


def write_card(folder: Path, arm: str, seed: int, figures: dict[str, Any]) -> None:
    """Write the card of a teacher of a run."""
    path = folder / "teachers" / arm / f"seed{seed}" / "card.json"
    path.write_text(json.dumps({"schema": 1, "figures": figures}))


@pytest.fixture
def add_card() -> Callable[..., None]:
    return write_card


@pytest.fixture
def make_judged_run(make_run: Callable[..., Path]) -> Callable[..., Path]:
    """Make a run whose teachers have cards: the distance falls as students get better, the ECE says nothing."""

    def make(**settings: Any) -> Path:
        folder = make_run(**{"num_epochs": 2, **settings})
        for place, path in enumerate(sorted((folder / "teachers").glob("*/seed*"))):
            arm, seed = path.parent.name, int(path.name.removeprefix("seed"))
            figures = {
                "train": {"accuracy": 0.98, "nll": 0.1 + 0.01 * place},
                "test": {"accuracy": 0.87 + 0.002 * seed, "ece": 0.03 + 0.001 * (7 * place % 5)},
                "distance": {
                    "train": {"kl": 0.5 - 0.2 * (arm == "soteacher") - 0.01 * (seed % 2)},
                    "test": {"kl": None},
                },
                "lipschitz": {"largest_slope": 20.0 + place if arm == "standard" else None},
            }
            write_card(folder, arm, seed, figures)
        return folder

    return make


RANKED = {"standard": 3, "soteacher": 5, "mse": 4, "smooth": 1, "early": 2, "wide": 6}
"""Six kinds of teachers: how good their students are."""


@pytest.fixture
def make_ranked_run(make_judged_run: Callable[..., Path]) -> Callable[..., Path]:
    """Make a run of :data:`RANKED`: the distance falls as students get better, whatever single seeds do."""

    def make(*, students: tuple[str, ...] = ("kd",), arms: tuple[str, ...] = tuple(RANKED), seeds: int = 3) -> Path:
        names = tuple(f"{arm}-{student}" for student in students for arm in arms)
        folder = make_judged_run(teachers=arms, students=names, seeds=seeds)
        path = folder / "results.json"
        results = json.loads(path.read_text())
        for row in results["rows"]:
            if row["role"] == "student":
                row["accuracy_last"] = 0.8 + 0.01 * RANKED[row["teacher_arm"]] + 0.03 * row["seed"]
        path.write_text(json.dumps(results))
        for place, path in enumerate(sorted((folder / "teachers").glob("*/seed*/card.json"))):
            arm, seed = path.parts[-3], int(path.parts[-2].removeprefix("seed"))
            card = json.loads(path.read_text())
            card["figures"]["distance"]["train"]["kl"] = 0.5 - 0.01 * RANKED[arm] + 0.02 * seed
            card["figures"]["test"]["accuracy"] = 0.87  # the same for all
            card["figures"]["lipschitz"]["largest_slope"] = 20.0 + place if arm in ("standard", "mse", "wide") else None
            path.write_text(json.dumps(card))
        return folder

    return make


@pytest.fixture
def make_run(tmp_path: Path) -> Callable[..., Path]:
    return lambda **settings: write_run(tmp_path / "run", **settings)


def write_run(
    folder: Path,
    *,
    teachers: tuple[str, ...] = ("standard", "soteacher"),
    students: tuple[str, ...] = ("standard-kd", "soteacher-kd", "alone"),
    seeds: int = 3,
    num_epochs: int = 12,
    name: str = "fashion-quick",
    finished: bool = True,
) -> Path:
    """Write the folder of a run; ``soteacher`` arms are 0.02 better as students and 0.01 worse as teachers."""
    rows = []
    for seed in range(seeds):
        for arm in teachers:
            final = 0.88 - 0.01 * (arm == "soteacher") + 0.002 * seed
            shape = {"final": final, "teacher_arm": None, "num_epochs": num_epochs}
            rows.append(write_network(folder, role="teacher", arm=arm, seed=seed, **shape))
        for arm in students:
            gain = 0.02 * arm.startswith("soteacher") - 0.004 * (arm == "alone") * (-1) ** seed
            teacher_arm = None if arm == "alone" else arm.rpartition("-")[0]
            shape = {"final": 0.84 + gain + 0.003 * (seed % 2), "teacher_arm": teacher_arm, "num_epochs": num_epochs}
            rows.append(write_network(folder, role="student", arm=arm, seed=seed, **shape))
    methods = {"standard": ["cross_entropy"], "soteacher": ["cross_entropy", "lipschitz", "consistency"]}
    config = {
        "name": name,
        "description": "A quick look at what a student-oriented teacher does for a small student.",
        "data": {"source": "fashion_mnist", "train_size": 10_000, "test_size": 2_000, "held_out": None},
        "seeds": list(range(seeds)),
        "baseline": {"teacher": "standard"},
        "teachers": {
            arm: {"model": "wrn_40_2", "method": arm, "terms": {term: {} for term in methods.get(arm, [])}}
            for arm in teachers
        },
        "students": {
            name: {"model": "wrn_16_1", "method": name, "teachers": None}
            for name in dict.fromkeys(arm.rpartition("-")[2] for arm in students)
        },
        "training": {"epochs": num_epochs, "batch_size": 64, "learning_rate": 0.05, "milestones": [0.6, 0.75, 0.9]},
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
    if finished:
        baselines = {arm: "standard-kd" for arm in students if arm != "standard-kd"}
        results = {
            "schema": 1,
            "soteacher_version": "0.1.0",
            "recipe": name,
            "environment": ENVIRONMENT,
            "rows": rows,
            "summary": summarise(rows, baselines),
        }
        (folder / "results.json").write_text(json.dumps(results))
    return folder
