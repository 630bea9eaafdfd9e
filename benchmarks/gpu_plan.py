"""What of SoTeacher's table 1 is trained within a number of minutes: its studies, their costs, and the choice."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.gpu_packed import Packed, order
from soteacher.config import Student, StudyConfig, TrainedTeacher
from soteacher.errors import InputError
from soteacher.jobs import Job, jobs_of, spec_of
from soteacher.recipes import read_source, read_study

RECIPES = {
    "wrn_40_2-wrn_16_2": "cifar100-wrn40_2-wrn16_2",
    "wrn_40_2-wrn_40_1": "cifar100-wrn40_2-wrn40_1",
    "resnet32x4-shufflenet_v2": "cifar100-resnet32x4-shufflenet_v2",
}
"""The pairs of table 1, the most wanted first, and the recipes with their published settings."""
CLAIM = ("standard", "soteacher")
"""The teachers that the claim compares; a recipe's others are its ablations and controls."""
TESTS_AT_THE_END = 6
"""A finished network is tested once more, on the training images too: five times as many."""
MEASURED_SECONDS, READY_SECONDS = 2.0, 600.0


def table_studies(
    pairs: Sequence[str], *, seeds: int, epochs: int, whole: bool, settings: Sequence[str], tiny: Path | None
) -> dict[str, StudyConfig]:
    """Return the studies of some pairs by their teachers' network: pairs with one teacher share its trainings.

    Args:
        pairs: keys of :data:`RECIPES`.
        seeds: how many.
        epochs: of every network; milestones and ramps are shares of a run and go with it.
        whole: the recipes' ablations, early-stopped control and student alone too.
        settings: ``path.to.field=value``, laid over every study.
        tiny: a file of made-up images, for a try with a small network.

    Raises:
        InputError: settings that cannot be used.
    """
    trees: dict[str, dict[str, Any]] = {}
    for pair in pairs:
        recipe = read_source(RECIPES[pair])[0]
        teacher, student = pair.split("-")
        tree = trees.setdefault(teacher, {**recipe, "name": f"table1-{teacher}", "students": {}})
        for name, wanted in recipe["students"].items():
            if whole or wanted["method"] != "alone":
                tree["students"][f"{name}_{student}"] = {**wanted, "baseline": f"{CLAIM[0]}-kd_{student}"}
    for tree in trees.values():
        del tree["baseline"]
        kept = {name: spec for name, spec in tree["teachers"].items() if whole or name in CLAIM}
        training = {**tree["training"], "epochs": epochs}
        tree |= {"teachers": kept, "training": training, "seeds": list(range(seeds)), "logging": [], "card": None}
        if tiny is not None:
            _shrink(tree, tiny)
    return {teacher: read_study(tree, settings) for teacher, tree in trees.items()}


def _shrink(tree: dict[str, Any], images: Path) -> None:
    """Put small networks and made-up images into a study."""
    for specs in (tree["teachers"], tree["students"]):
        for name, spec in specs.items():
            specs[name] = {**spec, "model": "resnet8"} if "model" in spec else spec
    tree["data"] = {"source": "npz", "path": str(images)}
    tree["training"] = {**tree["training"], "batch_size": 16}


def make_up_images(path: Path) -> None:
    """Write images of three classes, each bright in another place, with which a study can be tried out."""
    random = np.random.default_rng(0)
    arrays: dict[str, np.ndarray[Any, Any]] = {}
    for split, size in (("train", 40), ("test", 24)):
        labels = np.arange(size) % 3
        images = random.integers(0, 160, (size, 12, 12))
        for place, label in enumerate(labels):
            images[place, 4 * label : 4 * label + 4] += 90
        arrays |= {f"{split}_images": images.astype(np.uint8), f"{split}_labels": labels}
    path.parent.mkdir(parents=True, exist_ok=True)
    np.savez(path, allow_pickle=False, **arrays)


def trained_jobs(config: StudyConfig) -> Iterator[tuple[Job, TrainedTeacher | Student]]:
    """Yield the networks of a study that are trained, with their settings."""
    for job in jobs_of(config):
        spec = spec_of(config, job)
        if isinstance(spec, (TrainedTeacher, Student)):
            yield job, spec


def kinds(config: StudyConfig) -> dict[str, tuple[str, str]]:
    """Return the role and name of one network of each kind, whose step stands for all of the kind.

    A kind is a network in a role; of its methods the costliest is taken: SoTeacher, and KD.
    """
    found: dict[str, tuple[str, str]] = {}
    for job, spec in trained_jobs(config):
        name = job.arm if job.role == "teacher" else job.arm.partition("-")[2]
        if spec.method in ("soteacher", "kd"):
            found.setdefault(kind_of(job, config), (job.role, name))
    return found


def kind_of(job: Job, config: StudyConfig) -> str:
    """Return the kind of a network of a study: the study's name says whom students learn from."""
    spec = spec_of(config, job)
    assert isinstance(spec, (TrainedTeacher, Student))
    return f"{config.name} {job.role} {spec.model}"


def measure(
    studies: Mapping[str, StudyConfig], *, device: str, workers: int, threads: int, data_root: Path | None
) -> dict[str, Any]:
    """Return what each kind of network costs: :func:`~benchmarks.gpu_packed.costs`, and ``seconds_per_step``.

    All stand ready at the same time, so that what they compile is compiled side by side; then one kind after the other
    trains, in as many processes at once as the studies will use.

    Raises:
        InputError: one cannot be trained here.
    """
    told = {
        kind: order(config.model_dump(mode="json", by_alias=True), *which, device=device, threads=threads,
                    data_root=data_root, twice=True)
        for config in studies.values() for kind, which in kinds(config).items()
    }  # fmt: skip
    found: dict[str, Any] = {}
    with Packed([one for one in told.values() for _ in range(workers)]) as processes:
        ready = processes.ready(READY_SECONDS)
        for place, kind in enumerate(told):
            answers = processes.run(range(place * workers, (place + 1) * workers), MEASURED_SECONDS)
            step = max(answer["seconds"] / answer["steps"] for answer in answers)
            found[kind] = {**ready[place * workers], "seconds_per_step": step}
    return found


def seconds_of(config: StudyConfig, measured: Mapping[str, Any], *, workers: int) -> float:
    """Return about how many seconds a study takes: its networks' shared out among the workers, and the longest once."""
    single = [_network_seconds(job, config, measured) for job, _ in trained_jobs(config)]
    return sum(single) / workers + (max(single) if workers > 1 else 0.0)


def _network_seconds(job: Job, config: StudyConfig, measured: Mapping[str, Any]) -> float:
    spec, cost = spec_of(config, job), measured[kind_of(job, config)]
    assert isinstance(spec, (TrainedTeacher, Student))
    around = cost["epoch_start_seconds"] + cost["evaluation_seconds"] + cost["saving_seconds"]
    epoch = cost["steps_per_epoch"] * cost["seconds_per_step"] + around
    end = TESTS_AT_THE_END * cost["evaluation_seconds"]
    return cost["setup_seconds"] + config.training_of(spec).epochs_run() * epoch + end


def state_bytes(config: StudyConfig, measured: Mapping[str, Any], *, workers: int) -> int:
    """Return about how many bytes a study's state takes at most: networks on their way, and teachers still wanted.

    A network on its way is its weights, their momenta and the memory of the consistency term.
    """
    teachers = [measured[kind_of(job, config)] for job, _ in trained_jobs(config) if job.role == "teacher"]
    on_the_way = max(4 * (2 * cost["parameters"] + cost["num_examples"] * cost["num_classes"]) for cost in teachers)
    return workers * on_the_way + 4 * sum(cost["parameters"] for cost in teachers)


def choose(
    pairs: Sequence[str],
    measured: Mapping[str, Any],
    *,
    seconds: float,
    seeds: int,
    epochs: int,
    workers: int,
    **options: Any,
) -> tuple[list[str], int, float]:
    """Return the most of the table that fits: its pairs, the number of seeds, and the seconds that they need.

    Seeds come before pairs, as a difference means little without them.

    Args:
        pairs: the most wanted first.
        measured: see :func:`measure`.
        seconds: what there is.
        seeds: wanted.
        epochs: of every network.
        workers: networks side by side.
        options: further ones of :func:`table_studies`.

    Raises:
        InputError: not even one seed of the first pair fits.
    """
    needed = 0.0
    for count in range(seeds, 0, -1):
        for taken in range(len(pairs), 0, -1):
            studies = table_studies(pairs[:taken], seeds=count, epochs=epochs, **options)
            needed = sum(seconds_of(config, measured, workers=workers) for config in studies.values())
            if needed <= seconds:
                return list(pairs[:taken]), count, needed
    fitting = int(epochs * seconds / needed)
    hint = f"about --epochs {fitting} would fit" if fitting >= 1 else "not even one epoch would"
    raise InputError(
        f"{pairs[0]} with one seed and {epochs} epochs needs about {needed / 60:.0f} minutes, and there are "
        f"{max(seconds, 0.0) / 60:.0f}; {hint}; or give more --total-minutes"
    )
