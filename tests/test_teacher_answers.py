"""Teachers whose answers are kept for their students, in whole, tiny studies."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from soteacher import networks
from soteacher.data import AugmentConfig, TrainLoader, load_data
from soteacher.data.npz import NpzConfig
from soteacher.errors import InputError
from soteacher.files import read_json
from soteacher.jobs import Job
from soteacher.recipes import read_study
from soteacher.studies import run_study
from soteacher.train import answer_store
from soteacher.train.answer_store import AnswerShape, AnswerStore
from soteacher.train.teacher_signal import CachedTeacher, LiveTeacher
from soteacher.types import Batch, Outputs, View

pytestmark = pytest.mark.usefixtures("one_core", "no_report")

EXAMPLES, EPOCHS = 40, 3
TRAINING = {"epochs": EPOCHS, "batch_size": 16}


class KilledError(BaseException):
    """Ends a run as a kill does: nothing catches it."""


@pytest.fixture
def tree_of(tiny_study) -> Callable[..., dict[str, Any]]:
    """Make the settings of a study of one teacher whose answers are kept, and of students by their methods."""

    def make(*methods: str, cache: dict[str, Any] | None = {}, **over: Any) -> dict[str, Any]:  # noqa: B006
        tree = tiny_study(training=TRAINING, baseline=None, teacher_cache=cache)
        tree["teachers"] = {"standard": tree["teachers"]["standard"]}
        tree["students"] = {name: {"model": "tiny", "method": name} for name in methods or ("kd", "dkd")}
        return tree | over

    return make


def rounding(change: Callable[[Tensor], Tensor]) -> type[LiveTeacher]:
    """Return a teacher that says something else than its network."""

    class Rounded(LiveTeacher):
        def __call__(self, batch: Batch, view: View | None = None) -> Outputs:
            outputs = super().__call__(batch, view)
            return Outputs(logits=change(outputs.logits), features=outputs.features)

    return Rounded


def half(logits: Tensor) -> Tensor:
    return logits.half().float()


class Counted(LiveTeacher):
    """Counts the images that go through the networks of all teachers."""

    asked = 0

    def answer(self, images: Tensor) -> Outputs:
        Counted.asked += len(images)
        return super().answer(images)


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> type[Counted]:
    Counted.asked = 0
    monkeypatch.setattr(networks, "LiveTeacher", Counted)
    return Counted


def students(outcome: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in outcome.items() if name.startswith("students")}


def weights(run: Path, arm: str, seed: int = 0) -> dict[str, Tensor]:
    return load_file(run / "students" / arm / f"seed{seed}" / "model.safetensors")


def largest_difference(first: dict[str, Tensor], second: dict[str, Tensor]) -> float:
    return max(float((first[name] - second[name]).abs().max()) for name in first)


def says(run: Path, arm: str) -> str:
    return read_json(run / "students" / arm / "seed0" / "model.json")["runs"]["teacher"]


def test_students_of_kept_answers_are_those_of_a_teacher_that_rounds(
    tmp_path: Path, train, tree_of, outcome_of, monkeypatch: pytest.MonkeyPatch
) -> None:
    tree = tree_of(seeds=[0, 1])
    train(tree, tmp_path / "kept")
    with monkeypatch.context() as patch:
        patch.setattr(networks, "LiveTeacher", rounding(half))
        train(tree | {"teacher_cache": None}, tmp_path / "rounded")
    train(tree | {"teacher_cache": None}, tmp_path / "live")
    kept, rounded, live = (outcome_of(tmp_path / name) for name in ("kept", "rounded", "live"))
    assert kept == rounded
    assert students(kept) != students(live)
    assert {name: value for name, value in kept.items() if name.startswith("teachers")} == {
        name: value for name, value in live.items() if name.startswith("teachers")
    }
    for arm in ("standard-kd", "standard-dkd"):
        pair = weights(tmp_path / "kept", arm), weights(tmp_path / "live", arm)
        assert largest_difference(*pair) < 2e-3  # the answers differ by a 2000th at most


def test_a_second_student_asks_the_teacher_nothing(tmp_path: Path, train, tree_of, counted) -> None:
    asked: dict[str, int] = {}

    def note(job: Job, event: dict[str, Any]) -> None:
        if event["event"] == "finished":
            asked[job.arm] = counted.asked

    train(tree_of("kd", "dkd", "alone"), tmp_path / "run", on_event=note)
    assert asked["standard"] == 0
    assert 0 < asked["standard-kd"] <= EPOCHS * EXAMPLES
    assert asked["standard-dkd"] == asked["standard-kd"]


def test_a_teacher_of_several_seeds_is_asked_for_each_view_once(tmp_path: Path, train, tree_of, counted) -> None:
    train(tree_of("kd"), tmp_path / "teachers")
    tree = tree_of("kd", seeds=[0, 1, 2], training=TRAINING | {"epochs": 8})
    tree["data"]["augment"] = {"crop_padding": 0}  # two views of each image
    tree["teachers"] = {"given": {"file": str(tmp_path / "teachers/teachers/standard/seed0")}}
    counted.asked = 0
    train(tree, tmp_path / "run")
    # Of some batches little is unknown and more is asked, to fill them up to 16; without keeping it were 960.
    assert 60 < counted.asked <= 8 * EXAMPLES


@pytest.mark.parametrize("before", [True, False])
def test_a_run_killed_at_any_answer_resumes_bit_for_bit(
    tmp_path: Path, train, tree_of, outcome_of, monkeypatch: pytest.MonkeyPatch, *, before: bool
) -> None:
    tree = tree_of()
    train(tree, tmp_path / "whole")
    wanted, run, kills = outcome_of(tmp_path / "whole"), tmp_path / "killed", 0
    while True:
        with monkeypatch.context() as patch:
            _kill_at_answer(patch, 3, before=before)
            try:
                train(tree, run, resume=run.exists())
                break
            except KilledError:
                kills += 1
                assert (run / "teacher_cache" / "standard" / "seed0").is_dir()
    assert kills >= 2
    assert outcome_of(run) == wanted
    assert not (run / "teacher_cache").exists()


def _kill_at_answer(monkeypatch: pytest.MonkeyPatch, number: int, *, before: bool) -> None:
    """Die at so manyth answers: before they are written, or between them and their checksums."""
    write, written = answer_store._Rows.write, 0

    def counting(self: Any, *values: Any) -> None:
        nonlocal written
        written += 1
        if before and written == 2 * number - 1:
            raise KilledError
        write(self, *values)
        if not before and written == 2 * number - 1:
            raise KilledError

    monkeypatch.setattr(answer_store._Rows, "write", counting)


def test_workers_share_the_answers(tmp_path: Path, tiny_tree, outcome_of) -> None:
    tree = tiny_tree(teacher_cache={}, baseline=None)
    tree["teachers"] = {"standard": {"model": "resnet8", "method": "standard"}}
    tree["students"] = {name: {"model": "resnet8", "method": name} for name in ("kd", "dkd")}
    for workers in (1, 2):
        run_study(read_study(tree), tmp_path / str(workers), device="cpu", workers=workers)
    assert outcome_of(tmp_path / "1") == outcome_of(tmp_path / "2")


def test_who_needs_a_live_teacher_has_one_and_says_why(tmp_path: Path, train, tree_of, outcome_of) -> None:
    events: dict[str, Any] = {}

    def note(job: Job, event: dict[str, Any]) -> None:
        if event["event"] == "started":
            events[job.arm] = event["how"].get("teacher")

    tree = tree_of("kd", "srrl", "route", "alone")
    tree["students"]["mixed"] = {"model": "tiny", "method": "kd", "training": {"mixing": {"name": "mixup"}}}
    tree["students"]["route"]["training"] = {"route": [0.5]}
    train(tree, tmp_path / "run", on_event=note)
    train(tree | {"teacher_cache": None}, tmp_path / "live")
    assert events == {
        "standard": None, "alone": None, "standard-kd": "kept answers",
        "standard-srrl": "live: its method wants the teacher's pooled",
        "standard-route": "live: several teachers follow one another",
        "standard-mixed": "live: mixup makes images of which there is no end",
    }  # fmt: skip
    kept, live = outcome_of(tmp_path / "run"), outcome_of(tmp_path / "live")
    for arm in ("standard-kd", "standard-srrl", "standard-route", "standard-mixed"):
        assert says(tmp_path / "run", arm) == events[arm]
        name = f"students/{arm}/seed0/model.safetensors"
        assert (kept[name] == live[name]) is (arm != "standard-kd")
    assert says(tmp_path / "live", "standard-kd") == "live: the study keeps no answers"


def test_top_k_keeps_the_mass_of_the_rest(tmp_path: Path, train, tree_of, monkeypatch: pytest.MonkeyPatch) -> None:
    def shortened(logits: Tensor) -> Tensor:
        rows = []
        for row in logits.double().tolist():  # the best one, and the others' mass shared by the two
            best = max(row)
            level = math.log(sum(math.exp(value) for value in row if value != best) / 2)
            rows.append([best if value == best else level for value in row])
        return torch.from_numpy(np.array(rows, dtype=np.float16)).float()

    train(tree_of("kd", cache={"top_k": 1}), tmp_path / "kept")
    with monkeypatch.context() as patch:
        patch.setattr(networks, "LiveTeacher", rounding(shortened))
        train(tree_of("kd", cache=None), tmp_path / "shortened")
    train(tree_of("kd", cache=None), tmp_path / "live")
    kept, short, live = (weights(tmp_path / name, "standard-kd") for name in ("kept", "shortened", "live"))
    assert largest_difference(kept, short) < 1e-5
    assert largest_difference(kept, live) > 1e-3


def test_randomly_resized_crops_come_from_a_bank(tmp_path: Path, train, tree_of, counted) -> None:
    augment = {"crop_padding": 0, "random_resized_crop": [0.3, 1.0]}
    tree = tree_of(seeds=[0, 1], training=TRAINING | {"epochs": 6})
    tree["data"]["augment"] = augment | {"view_bank": 2}
    run, folders = tmp_path / "run", set[str]()

    def note(*_: Any) -> None:
        folders.update(str(path.parent.relative_to(run)) for path in run.rglob("provenance.json"))

    train(tree, run, on_event=note)
    # Two views of each image for each of two seeds; more is asked only to fill batches up.
    assert 2 * 2 * EXAMPLES * 0.85 < counted.asked < 2 * 5 * EXAMPLES
    assert folders == {"teacher_cache/standard/seed0/fp32/bank0", "teacher_cache/standard/seed1/fp32/bank1"}
    tree["data"]["augment"] = augment
    with pytest.raises(InputError) as caught:
        train(tree, tmp_path / "endless")
    assert str(caught.value) == (
        "teacher_cache wants finitely many views of an image: set data.augment.view_bank, to 20 say"
    )
    assert not (tmp_path / "endless").exists()


def test_answers_of_a_bank_are_kept_by_the_students_seed(tmp_path: Path, train, tree_of, outcome_of) -> None:
    train(tree_of("kd"), tmp_path / "teachers")
    tree = tree_of("kd", seeds=[0, 1])
    tree["data"]["augment"] = {"crop_padding": 1, "view_bank": 3}
    tree["teachers"] = {"given": {"file": str(tmp_path / "teachers/teachers/standard/seed0")}}
    tree["teacher_cache"] = {"folder": str(tmp_path / "answers")}
    train(tree, tmp_path / "run")
    assert sorted(path.name for path in (tmp_path / "answers/given/seed0/fp32").iterdir()) == ["bank0", "bank1"]
    train(tree | {"teacher_cache": {}}, tmp_path / "own")
    assert outcome_of(tmp_path / "own") == outcome_of(tmp_path / "run")


@pytest.mark.parametrize(
    ("cache", "message"),
    [
        # 40 images, 18 views, 3 logits of 2 bytes and a checksum of 4.
        (
            {"max_gigabytes": 7e-6},
            "teacher_cache may grow to 0.0 GB for each teacher, above its max_gigabytes 7e-06: set teacher_cache.top_k "
            "or data.augment.view_bank, or raise it",
        ),
        ({"top_k": 3}, "teacher_cache.top_k must be below the 3 classes, got 3"),
    ],
)
def test_answers_that_cannot_be_kept_are_refused_before_anything_is_trained(
    tmp_path: Path, train, tree_of, cache: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError) as caught:
        train(tree_of("kd", cache=cache), tmp_path / "run")
    assert str(caught.value) == message
    assert not (tmp_path / "run").exists()


def test_the_size_of_the_answers_is_the_limit(tmp_path: Path, train, tree_of) -> None:
    train(tree_of("kd", cache={"max_gigabytes": 40 * 18 * (3 * 2 + 4) / 1e9}), tmp_path / "run")
    assert says(tmp_path / "run", "standard-kd") == "kept answers"


def test_the_folder_of_answers_stays_and_serves_the_next_study(
    tmp_path: Path, train, tree_of, outcome_of, counted
) -> None:
    tree = tree_of("kd", cache={"folder": str(tmp_path / "answers")})
    train(tree, tmp_path / "first")
    assert (tmp_path / "answers" / "standard" / "seed0" / "fp32" / "provenance.json").exists()
    asked = counted.asked
    train(tree, tmp_path / "second")
    assert counted.asked == asked > 0
    assert outcome_of(tmp_path / "first") == outcome_of(tmp_path / "second")
    assert not list(tmp_path.glob("*/teacher_cache"))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"training": TRAINING | {"epochs": 2}}, "provenance.teacher is"),
        ({"augment": {"crop_padding": 1, "horizontal_flip": False}}, "shape.num_views is 18 there, and 9 was wanted"),
        ({"top_k": 1}, "shape.top_k is None there, and 1 was wanted"),
    ],
)
def test_answers_of_something_else_are_refused(
    tmp_path: Path, train, tree_of, change: dict[str, Any], reason: str
) -> None:
    answers = tmp_path / "answers"
    tree = tree_of("kd", cache={"folder": str(answers)})
    train(tree, tmp_path / "first")
    tree["training"] = change.get("training", tree["training"])
    tree["data"]["augment"] = change.get("augment", tree["data"]["augment"])
    tree["teacher_cache"]["top_k"] = change.get("top_k")
    with pytest.raises(InputError) as caught:
        train(tree, tmp_path / "second")
    folder = answers / "standard" / "seed0" / "fp32"
    assert str(caught.value).startswith(f"student standard-kd/seed0: {folder} holds answers of something else: ")
    assert reason in str(caught.value)
    assert "\n" not in str(caught.value)


def test_students_of_one_teacher_in_two_precisions_have_answers_of_their_own(tmp_path: Path, train, tree_of) -> None:
    tree = tree_of("kd")
    tree["students"]["half"] = {"model": "tiny", "method": "kd", "training": {"precision": "bf16-mixed"}}
    train(tree, tmp_path / "run")
    assert says(tmp_path / "run", "standard-half") == "kept answers"


def test_students_of_one_teacher_in_two_layouts_share_its_answers(tmp_path: Path, train, tree_of, counted) -> None:
    tree = tree_of("kd")
    tree["students"]["last"] = {"model": "tiny", "method": "kd", "training": {"channels_last": True}}
    tree["students"]["first"] = {"model": "tiny", "method": "kd", "training": {"channels_last": False}}
    train(tree, tmp_path / "run")
    assert counted.asked <= EPOCHS * EXAMPLES
    first, last = (weights(tmp_path / "run", f"standard-{name}") for name in ("first", "last"))
    assert largest_difference(first, last) < 1e-4


def test_second_views_are_kept_and_others_are_not(tmp_path: Path, tiny_network, tiny_data: Path) -> None:
    torch.manual_seed(0)
    network, asked = tiny_network(3, 1).eval(), list[int]()

    def forward(images: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        asked.append(len(images))
        return network(images), {}

    split, augment = load_data(NpzConfig(source="npz", path=tiny_data), None).train, AugmentConfig(crop_padding=1)
    views: tuple[View, ...] = ("second", "strong", "rotated")
    loader = TrainLoader(split, batch_size=8, augment=augment, seed=3, device="cpu", views=views)
    store = AnswerStore.open(tmp_path / "a", AnswerShape(num_examples=EXAMPLES, num_views=18, num_classes=3), {})
    teacher, live = CachedTeacher(LiveTeacher(forward), store), LiveTeacher(lambda images: (network(images), {}))
    for _ in range(2):
        for batch in loader.epoch(0):
            for view in (None, *views):
                answer, wanted = teacher(batch, view).logits, live(batch, view).logits
                assert torch.equal(answer, half(wanted) if view in (None, "second") else wanted)
    assert len(asked) == 2 * 5 + 2 * (2 * 5)  # the two numbered views once, the others in each of two epochs


def test_an_assistant_learns_from_kept_answers(tmp_path: Path, train, tree_of) -> None:
    tree = tree_of("kd")
    tree["teachers"]["assistant"] = {"model": "tiny", "method": "assistant", "teacher": "standard"}
    train(tree, tmp_path / "run")
    facts = read_json(tmp_path / "run/teachers/assistant/seed0/model.json")
    assert facts["runs"]["teacher"] == "kept answers"
    assert not (tmp_path / "run" / "teacher_cache").exists()
