"""The optimiser with a momentum for the task's gradient and another one for the distillation's."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from soteacher.config import Student, StudyConfig
from soteacher.errors import InputError, InterruptedRunError
from soteacher.objective import Method, Objective, Term
from soteacher.objectives.student.dot import METHOD
from soteacher.settings import parse
from soteacher.train.config import AdamWConfig, SGDConfig, TrainingConfig
from soteacher.train.optimizer import TwoMomentaSGD, backward_apart, backward_for, backward_sum, build_optimizer
from soteacher.types import Step

RATES = (0.1, 0.1, 0.05, 0.05, 0.01)


class Nothing(Objective[Step]):
    """An objective whose loss somebody else computes."""

    name = "nothing"

    def forward(self, step: Step) -> Tensor:
        raise NotImplementedError


TERMS = tuple(Term(objective=Nothing(), distils=distils) for distils in (False, True, True))


def _plain(loss: Tensor, **options: Any) -> None:
    loss.backward(**options)


def _steps(
    losses: Callable[[int, list[Tensor]], list[Tensor]], start: list[np.ndarray], terms: Any = TERMS, **settings: Any
) -> list[np.ndarray]:
    """Make five steps with the losses of a step; return where the parameters are."""
    config = SGDConfig(**settings)
    parameters = [nn.Parameter(torch.from_numpy(value.copy())) for value in start]
    optimizer, backward = build_optimizer(config, parameters), backward_for(config)
    for number, rate in enumerate(RATES):
        optimizer.param_groups[0]["lr"] = rate
        optimizer.zero_grad(set_to_none=True)
        backward(losses(number, parameters), terms, optimizer, _plain)
        optimizer.step()
    return [parameter.detach().numpy() for parameter in parameters]


@pytest.mark.parametrize(("momentum", "difference"), [(0.9, 0.075), (0.5, 0.5 - 1e-9), (0.3, 0.3)])
def test_five_steps_are_the_recursion_by_hand(momentum: float, difference: float) -> None:
    random = np.random.default_rng(0)
    theta, phi, psi = start = [random.normal(size=4) for _ in range(3)]
    task, first, second = random.normal(size=(3, 5, 4))

    def losses(number: int, parameters: list[Tensor]) -> list[Tensor]:
        both, of_task, of_distillation = parameters  # what each of the losses reaches
        weights = [torch.from_numpy(value[number]) for value in (task, first, second)]
        return [
            (weights[0] * (both.square() + of_task.sin())).sum(),
            (weights[1] * both.cos()).sum(),
            3 * (weights[2] * (both + of_distillation.square())).sum(),
        ]

    found = _steps(losses, start, momentum=momentum, momentum_difference=difference, weight_decay=0.02)
    v_task, v_distillation, v_phi, v_psi = np.zeros((4, 4))
    for number, rate in enumerate(RATES):
        g_task = 2 * task[number] * theta + 0.02 * theta
        g_distillation = -first[number] * np.sin(theta) + 3 * second[number]
        g_phi, g_psi = task[number] * np.cos(phi) + 0.02 * phi, 6 * second[number] * psi + 0.02 * psi
        v_task = (momentum - difference) * v_task + g_task
        v_distillation = (momentum + difference) * v_distillation + g_distillation
        v_phi, v_psi = momentum * v_phi + g_phi, momentum * v_psi + g_psi
        theta = theta - rate * (v_task + v_distillation)
        phi, psi = phi - rate * v_phi, psi - rate * v_psi
    for value, wanted in zip(found, (theta, phi, psi), strict=True):
        np.testing.assert_allclose(value, wanted, rtol=1e-12)


def test_a_difference_near_zero_is_ordinary_momentum() -> None:
    start = [np.random.default_rng(1).normal(size=3)]

    def losses(number: int, parameters: list[Tensor]) -> list[Tensor]:
        (x,) = parameters
        return [x.square().sum(), (x + number).sin().sum(), x.exp().sum()]

    plain, near, far = (
        _steps(losses, start, momentum=0.9, momentum_difference=value, weight_decay=0.01)[0]
        for value in (0.0, 1e-14, 0.075)
    )
    np.testing.assert_allclose(near, plain, rtol=1e-10)
    assert np.abs(far - plain).max() > 1e-3


def test_without_distillation_it_is_ordinary_momentum() -> None:
    start = [np.random.default_rng(2).normal(size=3)]

    def losses(number: int, parameters: list[Tensor]) -> list[Tensor]:
        return [(number + 1) * parameters[0].square().sum()]

    one, two = (_steps(losses, start, TERMS[:1], momentum=0.9, momentum_difference=value)[0] for value in (0.0, 0.05))
    np.testing.assert_allclose(one, two, rtol=1e-12)


def test_a_loss_without_gradient_is_passed_over() -> None:
    def losses(number: int, parameters: list[Tensor]) -> list[Tensor]:
        return [parameters[0].square().sum(), torch.tensor(float(number)), torch.tensor(1.0)]

    start = [np.ones(2)]
    (found,) = _steps(losses, start, momentum_difference=0.05, weight_decay=0.0)
    (wanted,) = _steps(losses, start, momentum_difference=0.0, weight_decay=0.0)
    np.testing.assert_allclose(found, wanted, rtol=1e-12)


def test_a_gradient_that_was_taken_counts_once() -> None:
    parameter = nn.Parameter(torch.ones(2))
    optimizer = TwoMomentaSGD([parameter], lr=0.1, momentum=0.9, momentum_difference=0.05, weight_decay=0.0)
    parameter.grad = torch.ones(2)
    optimizer.take_distillation()
    assert parameter.grad is None
    optimizer.step()
    after = parameter.detach().clone()
    optimizer.step()  # there is no gradient any more
    assert torch.equal(parameter, after)
    assert set(optimizer.state[parameter]) == {"distillation"}


def test_the_settings_choose_optimizer_and_backward() -> None:
    parameters = [nn.Parameter(torch.ones(2))]
    two = SGDConfig(momentum_difference=0.05)
    assert isinstance(build_optimizer(two, parameters), TwoMomentaSGD)
    assert backward_for(two) is backward_apart
    for config in (SGDConfig(), AdamWConfig(name="adamw")):
        assert backward_for(config) is backward_sum
        assert not isinstance(build_optimizer(config, parameters), TwoMomentaSGD)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"optimizer": {"momentum_difference": 0.1}},
            "optimizer: momentum_difference must leave both momenta in [0, 1), got 0.9 - 0.1 and 0.9 + 0.1",
        ),
        (
            {"optimizer": {"momentum": 0.05, "momentum_difference": 0.1}},
            "optimizer: momentum_difference must leave both momenta in [0, 1), got 0.05 - 0.1 and 0.05 + 0.1",
        ),
        (
            {"optimizer": {"momentum_difference": -0.1}},
            "optimizer.momentum_difference: should be greater than or equal to 0, got -0.1",
        ),
        (
            {"optimizer": {"momentum_difference": 0.05, "nesterov": True}},
            "optimizer: nesterov needs one momentum, got momentum_difference 0.05; leave one out",
        ),
        (
            {"optimizer": {"momentum_difference": 0.05}, "gradient_clip": 2},
            "gradient_clip wants one gradient, and optimizer.momentum_difference 0.05 makes two; leave one out",
        ),
        (
            {"optimizer": {"momentum_difference": 0.05}, "compile": True},
            "compile wants one backward pass in a step, and optimizer.momentum_difference 0.05 makes two; leave",
        ),
        (
            {"optimizer": {"name": "adamw", "momentum_difference": 0.05}},
            "optimizer: unknown key 'momentum_difference'; known:",
        ),
    ],
)
def test_impossible_settings_are_refused_in_one_line(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError) as caught:
        parse(TrainingConfig, settings)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_terms_know_whether_they_distil() -> None:
    from soteacher.objectives.cross_entropy import CrossEntropyConfig
    from soteacher.objectives.student.kd import KDConfig
    from soteacher.types import Task

    task = Task(num_examples=4, num_classes=3)
    assert KDConfig().term(task).distils
    assert not CrossEntropyConfig().term(task).distils


KD = {"cross_entropy": {"weight": 0.1}, "kd": {"weight": 0.9}}


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("steps", [1, 3, 4, 5])
def test_a_training_stopped_after_any_step_goes_on_bit_for_bit(make_training, steps: int, channels_last: bool) -> None:
    def make(folder: str) -> Any:
        optimizer = {"learning_rate": 0.1, "momentum_difference": 0.075}
        training = make_training(folder, terms=KD, distil=True, optimizer=optimizer, channels_last=channels_last)
        training.trainee = replace(training.trainee, backward=backward_for(training.trainee.config.optimizer))
        return training

    whole = make("whole")
    whole.run()
    assert {name.split(".")[2] for name in whole.state() if name.startswith("optimizer.")} == {"task", "distillation"}
    with pytest.raises(InterruptedRunError):
        make("stopped").run(stop_after=steps)
    resumed = make("stopped")
    resumed.run()
    assert resumed.state().keys() == whole.state().keys()
    for name, value in whole.state().items():
        assert torch.equal(resumed.state()[name], value), name


@pytest.fixture
def dot_known(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let studies know the method, whether or not the table lists it."""
    from soteacher import objectives

    known: dict[str, Method] = {**objectives.methods(), "dot": METHOD}
    monkeypatch.setattr(objectives, "methods", lambda: known)


def _study(**training: Any) -> StudyConfig:
    return StudyConfig.model_validate(
        {
            "data": {"source": "cifar100"},
            "training": {"optimizer": {"learning_rate": 0.01}} | training,
            "teachers": {"standard": {"model": "resnet8"}},
            "students": {
                "dot": {"model": "resnet8", "method": "dot"},
                "less": {
                    "model": "resnet8", "method": "dot", "training": {"optimizer": {"momentum_difference": 0.05}}
                },
            },
        }
    )  # fmt: skip


@pytest.mark.usefixtures("dot_known")
def test_the_method_adds_its_momenta_to_the_studys_settings() -> None:
    study = _study()
    optimizer = study.training_of(study.students["dot"]).optimizer
    assert isinstance(optimizer, SGDConfig)
    assert (optimizer.learning_rate, optimizer.momentum, optimizer.momentum_difference) == (0.01, 0.9, 0.075)
    less = study.training_of(study.students["less"]).optimizer
    assert isinstance(less, SGDConfig)
    assert (less.learning_rate, less.momentum_difference) == (0.01, 0.05)
    assert study.training_of(Student(model="resnet8", method="kd")).optimizer == SGDConfig(learning_rate=0.01)


@pytest.mark.usefixtures("dot_known")
@pytest.mark.parametrize(
    ("training", "message"),
    [
        ({"optimizer": {"name": "adamw"}}, "students.dot.training.optimizer: unknown key 'momentum_difference'"),
        ({"gradient_clip": 1.0}, "students.dot.training: gradient_clip wants one gradient"),
    ],
)
def test_a_study_that_the_method_cannot_be_trained_in_is_refused(training: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message.replace(".", r"\.")):
        _study(**training)


@pytest.mark.usefixtures("dot_known", "one_core", "no_report")
def test_a_study_trains_by_the_method(tmp_path: Path, train, tiny_study) -> None:
    tree = tiny_study(students={name: {"model": "tiny", "method": name} for name in ("dot", "kd")}, baseline=None)
    del tree["teachers"]["soteacher"]
    tree["students"]["kd"]["terms"] = {"cross_entropy": {"weight": 0.1}, "kd": {"weight": 0.9}}
    train(tree, tmp_path / "run")
    weights = [tmp_path / f"run/students/standard-{name}/seed0/model.safetensors" for name in ("dot", "kd")]
    assert weights[0].read_bytes() != weights[1].read_bytes()
