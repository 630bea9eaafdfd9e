import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from soteacher.errors import InputError
from soteacher.objectives.student import ctkd, ctkd_standardized
from soteacher.objectives.student.ctkd import (
    CTKD,
    CTKDConfig,
    bounded_temperature,
    divergence_at_temperature,
    reversal_strength,
    reversed_gradient,
)
from soteacher.objectives.student.kd import kd_divergence
from soteacher.train.config import SGDConfig
from soteacher.train.optimizer import build_optimizer
from soteacher.types import DistillStep

MakeStep = Callable[..., DistillStep]


@pytest.fixture
def logits() -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    return 3 * torch.randn(4, 6, dtype=torch.float64), 3 * torch.randn(4, 6, dtype=torch.float64)


@pytest.mark.parametrize("temperature", [1.0, 4.0, 15.6])
def test_the_value_is_that_of_distillation(logits: tuple[Tensor, Tensor], temperature: float) -> None:
    found = divergence_at_temperature(*logits, torch.tensor(temperature, dtype=torch.float64))
    torch.testing.assert_close(found, kd_divergence(*logits, temperature=temperature))


def test_divergence_at_temperature_gradients(logits: tuple[Tensor, Tensor]) -> None:
    student, teacher = (z.requires_grad_() for z in logits)
    temperature = torch.tensor(3.0, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda z, t: divergence_at_temperature(z, teacher, t), (student, temperature))
    divergence_at_temperature(student, teacher, temperature).sum().backward()
    assert teacher.grad is None


def test_divergence_at_temperature_refuses_what_it_cannot_use(logits: tuple[Tensor, Tensor]) -> None:
    student, teacher = logits
    with pytest.raises(InputError, match=r"got \[4, 6\] \(student\) and \[4, 5\] \(teacher\)"):
        divergence_at_temperature(student, teacher[:, 1:], torch.tensor(4.0))
    with pytest.raises(InputError, match=r"temperature must be a scalar, got a tensor of shape \[4\]"):
        divergence_at_temperature(student, teacher, torch.ones(4))


def test_bounded_temperature_stays_between_its_bounds() -> None:
    position = torch.tensor([-200.0, 0.0, math.log(3.0), 200.0])
    found = bounded_temperature(position, lowest_temperature=1.0, temperature_range=20.0)
    torch.testing.assert_close(found, torch.tensor([1.0, 11.0, 16.0, 21.0]))
    for numbers in (
        {"lowest_temperature": 0.0, "temperature_range": 20.0},
        {"lowest_temperature": 1.0, "temperature_range": -1.0},
    ):
        with pytest.raises(InputError, match="must be positive and finite"):
            bounded_temperature(position, **numbers)


def test_reversal_strength_grows_as_published() -> None:
    found = [reversal_strength(epoch=epoch, num_epochs=240, curriculum=10 / 240) for epoch in range(240)]
    expected = [(1 - math.cos(math.pi * number / 10)) / 2 for number in range(1, 11)] + [1.0] * 230
    assert found == pytest.approx(expected)
    assert found[4] == pytest.approx(0.5)


def test_reversal_strength_scales_with_the_run() -> None:
    short = [reversal_strength(epoch=epoch, num_epochs=48, curriculum=10 / 240) for epoch in range(3)]
    assert short == pytest.approx([0.5, 1.0, 1.0])
    assert reversal_strength(epoch=1, num_epochs=4, curriculum=1.0) == pytest.approx(0.5)
    for curriculum in (0.0, 1.5):
        with pytest.raises(InputError, match=rf"curriculum must be in \(0, 1\], got {curriculum}"):
            reversal_strength(epoch=0, num_epochs=4, curriculum=curriculum)


def test_reversed_gradient_is_the_identity_turned_round() -> None:
    value = torch.tensor([1.0, -2.0], requires_grad=True)
    found = reversed_gradient(value, strength=0.25)
    assert torch.equal(found, value)
    (3 * found).sum().backward()
    torch.testing.assert_close(value.grad, torch.tensor([-0.75, -0.75]))


def test_the_temperature_starts_as_published() -> None:
    objective = CTKD(CTKDConfig())
    torch.testing.assert_close(objective.temperature, torch.tensor(1 + 20 / (1 + math.exp(-1))))
    assert not objective.temperature.requires_grad
    assert list(objective.state_dict()) == ["position"]


@pytest.mark.parametrize("epoch", [0, 9, 100])
def test_the_temperature_climbs_the_loss_with_the_strength_of_the_epoch(
    epoch: int, network: nn.Module, make_step: MakeStep
) -> None:
    objective = CTKD(CTKDConfig())
    step = make_step(network, logits=torch.linspace(-3, 3, 20).sin().reshape(4, 5), epoch=epoch, num_epochs=240)
    objective(step).backward()
    position = torch.tensor(1.0, requires_grad=True)
    temperature = bounded_temperature(position, lowest_temperature=1.0, temperature_range=20.0)
    divergence_at_temperature(step.outputs.logits, step.teacher.logits, temperature).mean().backward()
    assert position.grad is not None
    strength = reversal_strength(epoch=epoch, num_epochs=240, curriculum=10 / 240)
    torch.testing.assert_close(objective.position.grad, -strength * position.grad)


def test_the_student_descends_and_the_temperature_ascends(network: nn.Module, make_step: MakeStep) -> None:
    objective = CTKD(CTKDConfig(curriculum=1.0))
    step = make_step(network, epoch=3, num_epochs=4)
    before = objective(step)
    parameters: list[nn.Parameter] = [*objective.parameters()]
    optimizer = build_optimizer(SGDConfig(learning_rate=0.05, weight_decay=0.0), parameters)
    before.backward()
    optimizer.step()
    assert objective(step) > before


def test_forward_is_at_the_temperature_in_force(network: nn.Module, make_step: MakeStep) -> None:
    objective = CTKD(CTKDConfig(lowest_temperature=2.0, temperature_range=4.0))
    with torch.no_grad():
        objective.position.fill_(0.0)
    assert objective.temperature == 4.0
    step = make_step(network)
    expected = kd_divergence(step.outputs.logits, step.teacher.logits, temperature=4.0).mean()
    torch.testing.assert_close(objective(step), expected)


def test_the_methods_have_the_published_settings() -> None:
    def config(method: Any) -> CTKDConfig:
        assert method.METHOD.terms["cross_entropy"] == {"weight": 0.1}
        return CTKDConfig(**method.METHOD.terms["ctkd"])

    assert config(ctkd) == CTKDConfig(weight=0.9, lowest_temperature=1.0, temperature_range=20.0, curriculum=10 / 240)
    assert config(ctkd_standardized) == CTKDConfig(weight=9.0, standardize=True)
