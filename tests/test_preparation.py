"""The stage before a network's training, in whole studies."""

import json
import os
import signal
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from soteacher import objectives
from soteacher.config import to_yaml
from soteacher.errors import InputError, InterruptedRunError
from soteacher.files import write_text
from soteacher.jobs import Job, OnEvent
from soteacher.objective import Objective, ObjectiveConfig
from soteacher.recipes import read_study
from soteacher.terminal import ProgressDisplay
from soteacher.train.config import TrainingConfig
from soteacher.types import Step, Task

pytestmark = pytest.mark.usefixtures("one_core", "no_report", "known_objectives", "no_collection")

TRAINING = {"epochs": 2, "batch_size": 16, "preparation_epochs": 2}


class Own(Objective[Step]):
    """Trains a layer of its own and nothing of the network; keeps a running average."""

    name = "own"
    trains_network = False
    average: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 3)
        self.register_buffer("average", torch.zeros(3))

    def forward(self, step: Step) -> Tensor:
        return (self.layer(step.outputs.logits.detach()) - self.average).square().mean()

    @torch.no_grad()
    def update(self, step: Step) -> None:
        self.average.lerp_(step.outputs.logits.mean(0), 0.1)


class OwnConfig(ObjectiveConfig):
    def build(self, task: Task) -> Own:
        del task
        return Own()


class Takes(Objective[Step]):
    """Takes the layer over and pulls the logits to what it says."""

    name = "takes"
    weight: Tensor
    starts: ClassVar[list[dict[str, Tensor]]] = []
    """What it was handed. A run begins with a trial by networks that nothing has trained."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("weight", torch.zeros(3, 3))

    def start(self, prepared: Mapping[str, Objective[Any]]) -> None:
        Takes.starts.append({name: objective.layer.weight.detach().clone() for name, objective in prepared.items()})
        if "own" in prepared:
            self.weight.copy_(Takes.starts[-1]["own"])

    def forward(self, step: Step) -> Tensor:
        return (step.outputs.logits @ self.weight - 1).square().mean()


class TakesConfig(ObjectiveConfig):
    def build(self, task: Task) -> Takes:
        del task
        return Takes()


class FirstAloneConfig(OwnConfig):
    prepares_alone: ClassVar[bool] = True


class SecondAloneConfig(OwnConfig):
    prepares_alone: ClassVar[bool] = True


@pytest.fixture
def known_objectives(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let studies know the objectives of this file."""
    known = dict(objectives.objective_configs())
    known |= {
        "own": OwnConfig,
        "takes": TakesConfig,
        "first_alone": FirstAloneConfig,
        "second_alone": SecondAloneConfig,
    }
    monkeypatch.setattr(objectives, "objective_configs", lambda: known)
    monkeypatch.setattr(Takes, "starts", [])


@pytest.fixture
def no_collection(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let memory be counted without tidying up first, which takes longer than the training."""
    monkeypatch.setattr("gc.collect", lambda *_: 0)


@pytest.fixture
def distilled(tiny_study: Callable[..., dict[str, Any]]) -> dict[str, Any]:
    """One student that learns from its teacher first and from the labels afterwards."""
    tree = tiny_study(
        training=TRAINING, baseline=None,
        students={"late": {"model": "tiny", "method": "kd", "terms": {"kd": {"stage": "preparation"}}}},
    )  # fmt: skip
    del tree["teachers"]["soteacher"]
    return tree


@pytest.fixture
def alone(tiny_study: Callable[..., dict[str, Any]]) -> Callable[..., dict[str, Any]]:
    """Make a study of one student without a teacher, with these terms besides the labels."""

    def make(terms: dict[str, Any], **training: Any) -> dict[str, Any]:
        student = {"model": "tiny", "method": "alone", "terms": terms}
        return tiny_study(
            training=TRAINING | training, teachers={}, students={"alone": student}, baseline=None
        )  # fmt: skip

    return make


OWN = {"own": {"stage": "preparation"}, "takes": {"weight": 0.5}}


@pytest.fixture
def whole_outcome(
    outcome_of: Callable[[Path], dict[str, Any]], figures_of: Callable[[Path], list[dict[str, Any]]]
) -> Callable[[Path], dict[str, Any]]:
    """Read what decides whether two runs are the same, the lines of the preparation included."""

    def read(run: Path) -> dict[str, Any]:
        outcome = outcome_of(run)
        for row in outcome["rows"]:
            row.pop("preparation_seconds", None)
        lines = {str(path.relative_to(run)): figures_of(path) for path in run.rglob("preparation.jsonl")}
        return outcome | lines

    return read


def _lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_preparation_leaves_lines_of_its_own(tmp_path: Path, train, distilled) -> None:
    events: list[dict[str, Any]] = []
    results = train(distilled, tmp_path / "run", on_event=lambda job, event: events.append({"role": job.role, **event}))
    folder = tmp_path / "run/students/standard-late/seed0"
    before, lines = _lines(folder / "preparation.jsonl"), _lines(folder / "metrics.jsonl")
    assert [line["epoch"] for line in before] == [line["epoch"] for line in lines] == [0, 1]
    assert [set(line["losses"]) for line in before] == [{"kd"}] * 2
    assert [set(line["losses"]) for line in lines] == [{"cross_entropy"}] * 2
    assert {line["learning_rate"] for line in before} == {0.05}
    assert not any("test_accuracy" in line for line in before)
    assert all("test_accuracy" in line for line in lines)
    row = results["rows"][-1]
    assert row["epochs"] == 2
    assert row["train_seconds"] == pytest.approx(sum(line["seconds"] for line in lines))
    assert row["preparation_seconds"] == pytest.approx(sum(line["seconds"] for line in before))
    assert not list((tmp_path / "run").rglob("resume"))
    assert not (tmp_path / "run/teachers/standard/seed0/preparation.jsonl").exists()
    stages = [event.get("stage") for event in events if event["role"] == "student" and event["event"] == "epoch"]
    assert stages == ["preparation", "preparation", None, None]


def test_a_preparation_is_where_the_training_starts(tmp_path: Path, train, distilled) -> None:
    train(distilled, tmp_path / "with")
    distilled["students"]["late"]["training"] = {"preparation_epochs": 1}
    train(distilled, tmp_path / "shorter")
    weights = [load_file(tmp_path / f"{name}/students/standard-late/seed0/model.safetensors") for name in (
        "with", "shorter"
    )]  # fmt: skip
    assert not torch.equal(weights[0]["head.weight"], weights[1]["head.weight"])
    lines = [
        _lines(tmp_path / f"{name}/students/standard-late/seed0/preparation.jsonl") for name in ("with", "shorter")
    ]
    assert lines[0][0]["train_loss"] == lines[1][0]["train_loss"]
    assert [len(of_one) for of_one in lines] == [2, 1]


def test_a_preparation_that_trains_only_itself_leaves_the_network_as_it_was(
    tmp_path: Path, train, alone, outcome_of
) -> None:
    train(alone({"own": {"stage": "preparation"}}), tmp_path / "with")
    train(alone({}), tmp_path / "without")
    one, two = (outcome_of(tmp_path / name) for name in ("with", "without"))
    weights = "students/alone/seed0/model.safetensors"
    assert one[weights] == two[weights]
    figures = "students/alone/seed0/metrics.jsonl"
    assert one[figures] == two[figures]
    lines = _lines(tmp_path / "with/students/alone/seed0/preparation.jsonl")
    assert lines[1]["train_loss"] < lines[0]["train_loss"]


def test_a_preparation_by_two_trains_the_network_if_one_of_them_does(tmp_path: Path, train, alone) -> None:
    both = {"own": {"stage": "preparation"}, "consistency": {"stage": "preparation"}}
    train(alone(both), tmp_path / "both")
    train(alone({}), tmp_path / "without")
    weights = [
        (tmp_path / f"{name}/students/alone/seed0/model.safetensors").read_bytes() for name in ("both", "without")
    ]
    assert weights[0] != weights[1]


def test_the_training_is_handed_what_was_prepared(tmp_path: Path, train, alone) -> None:
    train(alone(OWN), tmp_path / "run")
    trial, prepared = Takes.starts
    assert list(trial) == list(prepared) == ["own"]
    assert not torch.equal(trial["own"], prepared["own"])
    line = _lines(tmp_path / "run/students/alone/seed0/metrics.jsonl")[0]
    assert set(line["losses"]) == {"cross_entropy", "takes"}


def test_without_a_preparation_the_training_is_handed_nothing(tmp_path: Path, train, alone) -> None:
    train(alone({"takes": {}}), tmp_path / "run")
    assert Takes.starts == [{}, {}]
    assert not list((tmp_path / "run").rglob("preparation*"))


def _stop_student_after(steps: int, number: signal.Signals) -> OnEvent:
    """Send this process a signal after so many steps of a student."""
    left = steps

    def take(job: Job, event: dict[str, Any]) -> None:
        nonlocal left
        if job.role == "student" and event["event"] == "step":
            left -= 1
            if left == 0:
                os.kill(os.getpid(), number)

    return take


@pytest.mark.parametrize(
    "stops", [(1,), (3,), (6,), (7,), (2, 5), (5, 2), (1, 1, 1)], ids=lambda stops: "-".join(map(str, stops))
)
def test_a_run_stopped_in_either_stage_resumes_bit_for_bit(
    tmp_path: Path, train, distilled, whole_outcome, monkeypatch: pytest.MonkeyPatch, stops: tuple[int, ...]
) -> None:
    monkeypatch.setattr("soteacher.train.loop.CHECK_EVERY", 1)
    train(distilled, tmp_path / "whole")
    run = tmp_path / "stopped"
    for number, steps in enumerate(stops):
        with pytest.raises(InterruptedRunError):
            train(distilled, run, resume=number > 0, on_event=_stop_student_after(steps, signal.SIGTERM))
    assert list(run.rglob("resume/preparation/state.safetensors"))
    train(distilled, run, resume=True)
    assert whole_outcome(run) == whole_outcome(tmp_path / "whole")
    assert not list(run.rglob("resume"))


def test_what_was_prepared_is_handed_over_again_on_resume(
    tmp_path: Path, train, alone, whole_outcome, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("soteacher.train.loop.CHECK_EVERY", 1)
    train(alone(OWN), tmp_path / "whole")
    for number, steps in enumerate((4, 4)):  # in the preparation, in the training
        with pytest.raises(InterruptedRunError):
            train(
                alone(OWN), tmp_path / "stopped", resume=number > 0,
                on_event=_stop_student_after(steps, signal.SIGINT),
            )  # fmt: skip
    train(alone(OWN), tmp_path / "stopped", resume=True)
    assert whole_outcome(tmp_path / "stopped") == whole_outcome(tmp_path / "whole")
    _, whole, stopped, _, cut, _, resumed = (prepared["own"] for prepared in Takes.starts)
    assert torch.equal(stopped, Takes.starts[0]["own"])  # the trial: the preparation was not at its end
    assert torch.equal(cut, whole)
    assert torch.equal(resumed, whole)


class KilledError(BaseException):
    """Ends a run as a kill does: nothing catches it."""


def test_a_run_killed_around_any_write_resumes_bit_for_bit(
    tmp_path: Path, train, alone, whole_outcome, monkeypatch: pytest.MonkeyPatch
) -> None:
    tree = alone(OWN, epochs=1, preparation_epochs=1, batch_size=40)
    written: list[str] = []
    replace = Path.replace

    def counting(number: int, *, before: bool) -> Callable[[Path, Path], Path]:
        def put(part: Path, target: Path) -> Path:
            if len(written) == number and before:
                raise KilledError
            written.append(target.name)
            moved = replace(part, target)
            if len(written) == number + 1 and not before:
                raise KilledError
            return moved

        return put

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", counting(-1, before=False))
        train(tree, tmp_path / "whole")
    wanted, names = whole_outcome(tmp_path / "whole"), list(written)
    assert names == [
        "config.yaml", "run.json", "state.safetensors", "preparation.jsonl",
        "metrics.jsonl", "state.safetensors", "model.safetensors", "model.json", "results.json",
    ]  # fmt: skip
    for number, name in enumerate(names):
        for before in (True, False):
            run = tmp_path / f"killed-{number}-{before}"
            written.clear()
            with monkeypatch.context() as patch:
                patch.setattr(Path, "replace", counting(number, before=before))
                with pytest.raises(KilledError):
                    train(tree, run)
            train(tree, run, resume=run.exists())
            assert whole_outcome(run) == wanted, (name, before)
            assert not list(run.rglob("resume")), (name, before)


def test_only_the_stage_that_reads_a_view_makes_it(tmp_path: Path, train, alone, outcome_of) -> None:
    """A view that the preparation reads would go through the network's batch normalisation in the training."""

    class Viewing(Objective[Step]):
        name = "viewing"
        trains_network = False
        views = ("second",)

        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(3, 1)

        def forward(self, step: Step) -> Tensor:
            return self.layer(step.views["second"].logits.detach()).square().mean()

    class ViewingConfig(ObjectiveConfig):
        def build(self, task: Task) -> Viewing:
            del task
            return Viewing()

    objectives.objective_configs()["viewing"] = ViewingConfig  # type: ignore[index]  # the fixture's own table
    train(alone({"viewing": {"stage": "preparation"}}), tmp_path / "with")
    train(alone({}), tmp_path / "without")
    weights = "students/alone/seed0/model.safetensors"
    assert outcome_of(tmp_path / "with")[weights] == outcome_of(tmp_path / "without")[weights]


@pytest.mark.parametrize(
    ("terms", "message"),
    [
        (
            {"cross_entropy": {"stage": "preparation"}},
            "students.alone.terms: every term is of the preparation, and a loss needs one in the training",
        ),
        ({"cross_entropy": None}, "students.alone.terms: every term is left out, and a loss needs one in the training"),
        (
            {"first_alone": {"stage": "preparation"}, "second_alone": {"stage": "preparation"}},
            "students.alone.terms: first_alone prepares the network alone, and second_alone wants the same stage: "
            "leave one out, or set stage: training for one of them",
        ),
        (
            {"own": {"stage": "preparation"}, "second_alone": {"stage": "preparation"}},
            "students.alone.terms: second_alone prepares the network alone, and own wants the same stage: leave one "
            "out, or set stage: training for one of them",
        ),
        ({"own": {"stage": "before"}}, "terms.own.stage: should be 'preparation' or 'training', got 'before'"),
    ],
)
def test_stages_that_cannot_be_are_refused_in_one_line(alone, terms: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError) as caught:
        read_study(alone(terms))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_one_that_prepares_alone_may(tmp_path: Path, train, alone) -> None:
    train(alone({"first_alone": {"stage": "preparation"}, "second_alone": {}}), tmp_path / "run")
    assert len(_lines(tmp_path / "run/students/alone/seed0/preparation.jsonl")) == 2


@pytest.mark.parametrize(
    ("epochs", "message"),
    [
        (3, "preparation_epochs: 3 is past the end of 2 epochs"),
        (1.5, "preparation_epochs: 1.5 is neither a share of the run below 1 nor a whole number of epochs"),
        (0, "training.preparation_epochs: should be greater than 0, got 0"),
    ],
)
def test_a_preparation_of_an_impossible_length_is_refused(alone, epochs: float, message: str) -> None:
    with pytest.raises(InputError) as caught:
        read_study(alone({}, preparation_epochs=epochs))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_preparation_goes_at_the_highest_learning_rate() -> None:
    config = TrainingConfig.model_validate(
        {"epochs": 240, "schedule": {"name": "cosine", "warmup_epochs": 5}, "save_every": 10, "batch_size": 7}
    )
    own = config.preparation()
    assert (own.epochs, own.schedule.name, own.schedule.warmup_epochs, own.save_every) == (30, "constant", 0, None)
    assert (own.batch_size, own.optimizer) == (7, config.optimizer)
    assert TrainingConfig(epochs=3).preparation().epochs == 1


EVENT = {"epoch": 1, "epochs": 9, "images_per_second": 1234.5, "stage": "preparation"}
EPOCH = EVENT | {"event": "epoch", "train_loss": 0.5, "train_accuracy": 0.75}
STEP = EVENT | {"event": "step", "step": 2, "steps_per_epoch": 3, "loss": 0.5, "accuracy": 0.75}


def test_a_run_tells_the_preparation_apart(tmp_path: Path, tiny_tree, capsys: pytest.CaptureFixture[str]) -> None:
    write_text(tmp_path / "config.yaml", to_yaml(read_study(tiny_tree())))
    with ProgressDisplay(tmp_path) as display:
        for event in (STEP, EPOCH):
            display(Job("student", "standard-kd", 0), event)
    line = "student standard-kd/seed0: preparation, epoch 2/9, loss 0.500, accuracy 75.0 % train, 1,234 images/s\n"
    assert capsys.readouterr().out == line
    assert (tmp_path / "log.txt").read_text() == line
