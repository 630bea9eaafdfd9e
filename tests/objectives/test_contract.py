"""What every objective must do, whichever method it is: one suite over the whole table."""

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor, nn

from soteacher.objective import Objective, ObjectiveConfig, Term, weighted_losses
from soteacher.objectives import OBJECTIVES
from soteacher.types import DistillStep, Outputs, Task

MakeStep = Callable[..., DistillStep]


@pytest.fixture(params=OBJECTIVES)
def name(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def config(name: str) -> type[ObjectiveConfig]:
    return OBJECTIVES[name]


@pytest.fixture
def warm(config: type[ObjectiveConfig], task: Task, network: nn.Module, make_step: MakeStep) -> Objective[Any]:
    """The objective with default settings after one earlier step with the same examples."""
    objective = config().build(task)
    objective.update(make_step(network, seed=1))
    return objective


def state(module: nn.Module) -> dict[str, Tensor]:
    return {key: value.detach().clone() for key, value in module.state_dict().items()}


def assert_same(first: dict[str, Tensor], second: dict[str, Tensor]) -> None:
    assert first.keys() == second.keys()
    for key, value in first.items():
        torch.testing.assert_close(value, second[key], rtol=0, atol=0, equal_nan=True, msg=key)


def gradient(network: nn.Module, loss: Tensor) -> Tensor:
    gradients = torch.autograd.grad(loss, list(network.parameters()), retain_graph=True, materialize_grads=True)
    return torch.cat([value.flatten() for value in gradients])


def test_is_named_as_in_the_table(name: str, config: type[ObjectiveConfig], task: Task) -> None:
    assert config().build(task).name == name


def test_config_survives_writing_and_reading(config: type[ObjectiveConfig]) -> None:
    assert config.model_validate(config().model_dump()) == config()
    assert config.model_validate_json(config().model_dump_json()) == config()
    changed = config.model_validate({"weight": 0.25, "ramp": "cosine"})
    assert config.model_validate(changed.model_dump()) == changed != config()


@pytest.mark.parametrize(
    "settings", [{"weight": 0.0}, {"weight": -1.0}, {"weight": float("inf")}, {"ramp": "up"}, {"unknown": 1}], ids=str
)
def test_config_refuses_impossible_settings(config: type[ObjectiveConfig], settings: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        config.model_validate(settings)


def test_config_is_frozen(config: type[ObjectiveConfig]) -> None:
    with pytest.raises(ValidationError, match="frozen"):
        setattr(config(), "weight", 3.0)  # noqa: B010 - the type checker refuses the assignment


def test_term_has_the_settings(name: str, config: type[ObjectiveConfig], task: Task) -> None:
    term = config.model_validate({"weight": 0.25, "ramp": "cosine"}).term(task)
    assert (term.objective.name, term.weight, term.ramp) == (name, 0.25, "cosine")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_loss_is_a_finite_float32_scalar(
    warm: Objective[Any], network: nn.Module, make_step: MakeStep, dtype: torch.dtype
) -> None:
    logits = torch.linspace(-3, 3, 20).sin().reshape(4, 5).to(dtype)
    step = make_step(network, logits=logits, dtype=dtype)
    loss = warm(step)
    assert loss.shape == ()
    assert loss.dtype == torch.float32
    assert loss.isfinite()
    assert loss > 0
    single = replace(
        step,
        outputs=Outputs(logits=step.outputs.logits.float(), features={}),
        teacher=Outputs(logits=step.teacher.logits.float(), features={}),
    )
    torch.testing.assert_close(loss, warm(single), rtol=1e-6, atol=0)  # no step of the sum is rounded to half


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_extreme_half_precision_logits_give_finite_gradients(
    warm: Objective[Any], network: nn.Module, make_step: MakeStep, dtype: torch.dtype
) -> None:
    logits = torch.full((4, 5), -60.0)
    logits.fill_diagonal_(60.0)
    logits.requires_grad_()
    loss = warm(make_step(network, logits=logits, dtype=dtype))
    loss.backward()
    assert loss.isfinite()
    assert logits.grad is None or logits.grad.isfinite().all()


def test_autocast_changes_neither_precision_nor_much_of_the_value(
    warm: Objective[Any], network: nn.Module, make_step: MakeStep
) -> None:
    step = make_step(network)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = warm(step)
    torch.testing.assert_close(mixed, warm(step), rtol=1e-6, atol=0)


def test_gradients_flow_to_the_network(warm: Objective[Any], network: nn.Module, make_step: MakeStep) -> None:
    found = gradient(network, warm(make_step(network)))
    assert found.isfinite().all()
    assert found.abs().sum() > 0


def test_forward_leaves_everything_as_it_was(warm: Objective[Any], network: nn.Module, make_step: MakeStep) -> None:
    step = make_step(network)
    tensors = {
        "images": step.images, "labels": step.labels, "indices": step.indices,
        "logits": step.outputs.logits, "teacher": step.teacher.logits,
    }  # fmt: skip
    before, own, models = {key: value.clone() for key, value in tensors.items()}, state(warm), state(network)
    random = torch.get_rng_state()
    first, second = warm(step), warm(step)
    assert torch.equal(first, second)
    assert_same(state(warm), own)
    assert_same(state(network), models)
    assert_same(tensors, before)
    assert torch.equal(torch.get_rng_state(), random)


def test_update_changes_only_its_own_state(warm: Objective[Any], network: nn.Module, make_step: MakeStep) -> None:
    step = make_step(network)
    models, logits = state(network), step.outputs.logits.clone()
    warm.update(step)
    assert_same(state(network), models)
    assert torch.equal(step.outputs.logits, logits)
    assert not any(value.requires_grad for value in warm.state_dict().values())


def test_resumed_objective_has_the_same_next_loss(
    config: type[ObjectiveConfig], warm: Objective[Any], network: nn.Module, make_step: MakeStep, task: Task
) -> None:
    saved = copy.deepcopy(warm.state_dict())
    step = make_step(network)
    resumed = config().build(task)
    resumed.load_state_dict(saved)
    assert torch.equal(resumed(step), warm(step))


def test_a_sum_with_the_other_objectives_keeps_every_term(
    name: str, warm: Objective[Any], network: nn.Module, make_step: MakeStep, task: Task
) -> None:
    others = [other().term(task) for key, other in OBJECTIVES.items() if key != name and not other.needs_teacher]
    earlier, step = make_step(network, seed=1), make_step(network)
    for term in others:
        term.objective.update(earlier)
    terms = [Term(objective=warm, weight=0.5), *others]
    losses = weighted_losses(terms, step)
    alone = [term.weight_at(epoch=0, num_epochs=4) * term.objective(step) for term in terms]
    torch.testing.assert_close(losses, torch.stack(alone), rtol=0, atol=0)
    parts = torch.stack([gradient(network, loss) for loss in alone])
    assert (parts.norm(dim=1) > 0).all()
    torch.testing.assert_close(gradient(network, losses.sum()), parts.sum(dim=0), rtol=1e-5, atol=1e-6)
