"""What all methods that compare logits have in common."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from soteacher.objective import Objective, ObjectiveConfig, Term
from soteacher.objectives.student.ctkd import CTKDConfig
from soteacher.objectives.student.dist import DISTConfig
from soteacher.objectives.student.dkd import DKDConfig
from soteacher.objectives.student.nkd import NKDConfig
from soteacher.objectives.student.ttm import TTMConfig
from soteacher.objectives.student.wttm import WTTMConfig
from soteacher.types import DistillStep, Outputs, Task

CONFIGS: dict[str, type[ObjectiveConfig]] = {
    "dkd": DKDConfig, "nkd": NKDConfig, "dist": DISTConfig, "ttm": TTMConfig, "wttm": WTTMConfig, "ctkd": CTKDConfig,
}  # fmt: skip
MakeStep = Callable[..., DistillStep]


@pytest.fixture(params=CONFIGS)
def config(request: pytest.FixtureRequest) -> ObjectiveConfig:
    return CONFIGS[request.param]()


@pytest.fixture
def objective(config: ObjectiveConfig, task: Task) -> Objective[Any]:
    return config.build(task)


@pytest.fixture
def step(network: nn.Module, make_step: MakeStep) -> DistillStep:
    torch.manual_seed(1)
    return make_step(network, logits=3 * torch.randn(4, 5))


def with_logits(step: DistillStep, change: Callable[[Tensor], Tensor], **more: Any) -> DistillStep:
    """Return a step whose logits of both sides are changed."""
    student, teacher = (Outputs(logits=change(side.logits), features={}) for side in (step.outputs, step.teacher))
    return replace(step, outputs=student, teacher=teacher, **more)


def gradient(objective: Objective[Any], step: DistillStep) -> Tensor:
    """Return the gradient that reaches the student's logits."""
    logits = step.outputs.logits.detach().requires_grad_()
    loss = objective(replace(step, outputs=Outputs(logits=logits, features={})))
    return torch.autograd.grad(loss, logits)[0]


def test_a_table_of_names_holds(config: ObjectiveConfig, objective: Objective[Any]) -> None:
    assert CONFIGS[objective.name] is type(config)
    assert config.needs_teacher
    assert config.standardizable


def test_a_shift_of_the_logits_changes_nothing(objective: Objective[Any], step: DistillStep) -> None:
    shift = torch.tensor([[-3.0], [0.0], [2.0], [5.0]])
    torch.testing.assert_close(objective(with_logits(step, lambda z: z + shift)), objective(step))


def test_the_order_of_the_classes_changes_nothing(objective: Objective[Any], step: DistillStep) -> None:
    order = torch.tensor([3, 0, 4, 1, 2])
    turned = with_logits(step, lambda z: z[:, order], labels=order.argsort()[step.labels])
    torch.testing.assert_close(objective(turned), objective(step))


def test_the_order_of_the_batch_changes_nothing(objective: Objective[Any], step: DistillStep) -> None:
    turned = with_logits(step, lambda z: z.flip(0), labels=step.labels.flip(0))
    torch.testing.assert_close(objective(turned), objective(step))


def test_standardised_it_ignores_the_scale(config: ObjectiveConfig, task: Task, step: DistillStep) -> None:
    term = Term(objective=config.build(task), standardize=True)
    scale = torch.tensor([[0.1], [1.0], [3.0], [20.0]])
    torch.testing.assert_close(term.weighted_loss(with_logits(step, lambda z: scale * z)), term.weighted_loss(step))
    plain = Term(objective=config.build(task))
    assert (plain.weighted_loss(with_logits(step, lambda z: scale * z)) - plain.weighted_loss(step)).abs() > 1e-3


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_extreme_logits_give_finite_gradients(objective: Objective[Any], step: DistillStep, dtype: torch.dtype) -> None:
    logits = torch.full((4, 5), -60.0).fill_diagonal_(60.0)
    student, teacher = (Outputs(logits=z.to(dtype), features={}) for z in (logits, logits.flip(1)))
    for extreme in (
        replace(step, outputs=student, teacher=teacher),
        replace(step, outputs=student, teacher=student),
        with_logits(step, lambda z: torch.full_like(z, 60.0).to(dtype)),
        with_logits(step, lambda z: torch.zeros_like(z).to(dtype)),
    ):
        assert objective(extreme).dtype == torch.float32
        assert objective(extreme).isfinite()
        assert gradient(objective, extreme).isfinite().all()


def test_one_example_is_a_batch(objective: Objective[Any], step: DistillStep) -> None:
    one = with_logits(step, lambda z: z[:1], labels=step.labels[:1])
    assert objective(one).shape == ()
    assert objective(one) > 0
    assert gradient(objective, one).isfinite().all()
    assert gradient(objective, one).norm() > 0


def test_autocast_rounds_nothing(objective: Objective[Any], step: DistillStep) -> None:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = objective(step)
    torch.testing.assert_close(mixed, objective(step), rtol=1e-6, atol=0)


def test_it_compiles_to_one_graph(objective: Objective[Any], step: DistillStep) -> None:
    def loss(logits: Tensor) -> Tensor:
        return objective(replace(step, outputs=Outputs(logits=logits, features={})))

    torch.compiler.reset()
    logits = step.outputs.logits.clone().requires_grad_()
    found = torch.compile(loss, backend="eager", fullgraph=True)(logits)
    torch.testing.assert_close(found, loss(logits))
    (gradient_found,) = torch.autograd.grad(found, logits)
    torch.testing.assert_close(gradient_found, gradient(objective, step))


def test_two_steps_lower_the_loss(objective: Objective[Any], network: nn.Module, make_step: MakeStep) -> None:
    optimizer = torch.optim.SGD([*network.parameters(), *objective.parameters()], lr=1e-3)
    losses = []
    for _ in range(3):
        loss = objective(make_step(network))
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[0] > losses[1] > losses[2]


@pytest.mark.parametrize("name", ["same family", "other family", "transformer teacher", "transformer student"])
def test_every_pair_of_networks_can_be_trained(name: str, make_pair: Callable[[str], Any]) -> None:
    pair = make_pair(name)
    for config in CONFIGS.values():
        objective = config().build(pair.task)
        step = pair.step(objective)
        loss = objective(step)
        assert loss.isfinite()
        assert loss > 0
        found = torch.autograd.grad(loss, list(pair.student.parameters()), materialize_grads=True)
        assert all(value.isfinite().all() for value in found)
        assert sum(value.abs().sum() for value in found) > 0
