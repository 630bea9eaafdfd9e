"""What every objective must do, whichever method it is: one suite over the whole table, with real networks."""

import copy
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor, nn

from soteacher.errors import InputError
from soteacher.objective import Objective, ObjectiveConfig, Term, weighted_losses
from soteacher.objectives import METHODS, OBJECTIVES
from soteacher.types import DistillStep, Outputs

IMPOSSIBLE = {  # what no connector bridges, and how the error says it
    ("fsp", "other family"): "channels",
    ("fsp", "transformer teacher"): "channels",
    ("fsp", "transformer student"): "channels",
    ("kdsvd", "other family"): "channels",
    ("kdsvd", "transformer teacher"): "channels",
    ("kdsvd", "transformer student"): "channels",
    ("sdd", "transformer teacher"): "maps",
    ("sdd", "transformer student"): "maps",
    ("cat", "transformer teacher"): "maps",
    ("cat", "transformer student"): "maps",
}
GRAPH_BREAKS = {  # what the compiler runs in pieces, and why
    "crd": "draws its negatives in a generator of its own",
    "fcfd": "sends features through the networks, whose modules it stands in for",
    "sftn": "sends features through its branches likewise",
}
SETTINGS = {"sftn": {"student": "resnet8"}}  # what has to be said
THROUGH_NETWORKS = ("fcfd", "sftn")
"""Whose features go through networks, which autocast rounds as it does in training."""
BELOW_ZERO = ("srd", "class_information", "class_information_frozen")
"""Whose value is the logarithm of a distance, or the negative of an information."""
WITH_A_PAST = ("consistency", "consistency_released", "averaged_predictions", "confidence_ranking")
"""Whose value is 0 as long as no epoch lies behind them."""
PAIRS = ("same family", "other family", "transformer teacher", "transformer student")


@pytest.fixture(params=OBJECTIVES)
def name(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def config(name: str) -> type[ObjectiveConfig]:
    return OBJECTIVES[name]


def default_config(name: str) -> ObjectiveConfig:
    """Return an objective's settings, with no more than what has to be said."""
    return OBJECTIVES[name].model_validate(SETTINGS.get(name, {}))


def built(name: str, pair: Any) -> Objective[Any]:
    """Return an objective as the training sees it: after its method's preparation, where that has one."""
    torch.manual_seed(0)
    objective = default_config(name).build(pair.task)
    terms = METHODS[name].terms if name in METHODS else {}
    settings = {term: OBJECTIVES[term].model_validate(values) for term, values in terms.items()}
    objective.start({term: made.build(pair.task) for term, made in settings.items() if made.stage == "preparation"})
    return objective


@pytest.fixture
def pair(name: str, make_pair: Callable[..., Any]) -> Any:
    return make_pair("same family", default_config(name))


@pytest.fixture
def warm(name: str, pair: Any) -> Objective[Any]:
    """The objective with default settings after two earlier steps."""
    objective = built(name, pair)
    for seed in (1, 2):
        objective.update(pair.step(objective, seed=seed))
    return objective


def state(module: nn.Module) -> dict[str, Tensor]:
    return {key: value.detach().clone() for key, value in module.state_dict().items()}


def assert_same(first: Mapping[str, Tensor], second: Mapping[str, Tensor]) -> None:
    assert first.keys() == second.keys()
    for key, value in first.items():
        torch.testing.assert_close(value, second[key], rtol=0, atol=0, equal_nan=True, msg=key)


def trained(warm: Objective[Any], pair: Any) -> list[nn.Parameter]:
    parameters = [*pair.student.parameters(), *warm.parameters()]
    return [parameter for parameter in parameters if parameter.requires_grad]


def gradients(parameters: list[nn.Parameter], loss: Tensor) -> list[Tensor]:
    if not parameters:
        return []
    return list(torch.autograd.grad(loss, parameters, retain_graph=True, materialize_grads=True))


def size(tensors: list[Tensor]) -> float:
    return torch.stack([tensor.norm() for tensor in tensors]).norm().item()


def with_features(step: DistillStep, change: Callable[[Tensor], Tensor]) -> DistillStep:
    """Return the step with every feature changed."""

    def changed(outputs: Outputs) -> Outputs:
        return replace(outputs, features={name: change(value) for name, value in outputs.features.items()})

    return replace(
        step,
        outputs=changed(step.outputs),
        teacher=changed(step.teacher),
        views={view: changed(outputs) for view, outputs in step.views.items()},
        teacher_views={view: changed(outputs) for view, outputs in step.teacher_views.items()},
    )


def with_logits(step: DistillStep, logits: Tensor) -> DistillStep:
    """Return the step with other logits of the student, repeated where a view has more examples."""

    def changed(outputs: Outputs) -> Outputs:
        return replace(outputs, logits=logits.repeat(len(outputs.logits) // len(logits), 1))

    return replace(
        step, outputs=changed(step.outputs), views={view: changed(outputs) for view, outputs in step.views.items()}
    )


def test_is_named_as_in_the_table(name: str, warm: Objective[Any]) -> None:
    assert warm.name == name


def test_config_survives_writing_and_reading(config: type[ObjectiveConfig]) -> None:
    assert config.model_validate(config().model_dump()) == config()
    assert config.model_validate_json(config().model_dump_json()) == config()
    changed = config.model_validate({"weight": 0.25, "ramp": "cosine"})
    assert config.model_validate(changed.model_dump()) == changed != config()


@pytest.mark.parametrize(
    "settings",
    [{"weight": 0.0}, {"weight": -1.0}, {"weight": float("inf")}, {"ramp": "up"}, {"stage": "later"}, {"unknown": 1}],
    ids=str,
)
def test_config_refuses_impossible_settings(config: type[ObjectiveConfig], settings: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        config.model_validate(settings)


def test_config_is_frozen(config: type[ObjectiveConfig]) -> None:
    with pytest.raises(ValidationError, match="frozen"):
        setattr(config(), "weight", 3.0)  # noqa: B010 - the type checker refuses the assignment


def test_logits_are_standardised_where_that_makes_sense_only(config: type[ObjectiveConfig]) -> None:
    if config.standardizable:
        assert config.model_validate({"standardize": True}).standardize
    else:
        with pytest.raises(ValidationError, match="standardize is for terms on the logits of both networks"):
            config.model_validate({"standardize": True})


def test_term_has_the_settings(name: str, config: type[ObjectiveConfig], pair: Any) -> None:
    term = config.model_validate({**SETTINGS.get(name, {}), "weight": 0.25, "ramp": "cosine"}).term(pair.task)
    assert (term.objective.name, term.weight, term.ramp) == (name, 0.25, "cosine")


def test_a_term_that_reads_no_teacher_needs_none(config: type[ObjectiveConfig], warm: Objective[Any]) -> None:
    assert config.needs_teacher or not warm.teacher_features


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_loss_is_a_finite_float32_scalar(warm: Objective[Any], pair: Any, dtype: torch.dtype) -> None:
    step = pair.step(warm, dtype=dtype)
    loss = warm(step)
    assert loss.shape == ()
    assert loss.dtype == torch.float32
    assert loss.isfinite()
    assert loss > 0 or warm.name in BELOW_ZERO
    single = with_features(step, torch.Tensor.float)
    single = replace(
        single,
        outputs=replace(single.outputs, logits=single.outputs.logits.float()),
        teacher=replace(single.teacher, logits=single.teacher.logits.float()),
        views={view: replace(value, logits=value.logits.float()) for view, value in single.views.items()},
        teacher_views={
            view: replace(value, logits=value.logits.float()) for view, value in single.teacher_views.items()
        },
    )
    torch.testing.assert_close(loss, warm(single), rtol=1e-5, atol=0)  # no step of the sum is rounded to half


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_extreme_half_precision_logits_give_finite_gradients(
    warm: Objective[Any], pair: Any, dtype: torch.dtype
) -> None:
    logits = torch.full((8, 5), -60.0).index_fill_(1, torch.tensor([0]), 60.0).requires_grad_()
    loss = warm(with_logits(pair.step(warm, dtype=dtype), logits.to(dtype)))
    assert loss.isfinite()
    found = torch.autograd.grad(loss, [logits, *trained(warm, pair)], materialize_grads=True)
    assert all(value.isfinite().all() for value in found)


@pytest.mark.parametrize("value", [0.0, 1.0])
def test_constant_features_give_finite_gradients(warm: Objective[Any], pair: Any, value: float) -> None:
    leaves: list[Tensor] = []

    def constant(feature: Tensor) -> Tensor:
        leaves.append(torch.full_like(feature, value).detach().requires_grad_())
        return leaves[-1]

    loss = warm(with_features(pair.step(warm), constant))
    assert loss.isfinite()
    found = torch.autograd.grad(loss, [*leaves, *trained(warm, pair)], materialize_grads=True, allow_unused=True)
    assert all(gradient.isfinite().all() for gradient in found)


def test_a_batch_of_one_gives_a_finite_loss(warm: Objective[Any], pair: Any) -> None:
    step = pair.step(warm, batch=1)
    loss = warm(step)
    assert loss.isfinite()
    if loss.requires_grad:
        assert all(gradient.isfinite().all() for gradient in gradients(trained(warm, pair), loss))
    warm.update(step)
    assert all(value.isfinite().all() for value in warm.state_dict().values())


def test_autocast_changes_neither_precision_nor_much_of_the_value(warm: Objective[Any], pair: Any) -> None:
    step = pair.step(warm)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = warm(step)
    rtol = 2e-2 if warm.name in THROUGH_NETWORKS else 1e-5
    torch.testing.assert_close(mixed, warm(step), rtol=rtol, atol=0)


def test_gradients_flow_to_the_network_or_to_itself(warm: Objective[Any], pair: Any) -> None:
    loss = warm(pair.step(warm))
    found = gradients(trained(warm, pair), loss)
    assert all(value.isfinite().all() for value in found)
    assert size(found) > 0
    network = [parameter for parameter in pair.student.parameters() if parameter.requires_grad]
    assert (size(gradients(network, loss)) > 0) == warm.trains_network
    own = {name: parameter for name, parameter in warm.named_parameters() if parameter.requires_grad}
    unused = [name for name, value in zip(own, gradients([*own.values()], loss), strict=True) if value.norm() == 0]
    assert len(unused) < max(1, len(own)), "no parameter of its own is trained"


def test_two_steps_on_a_batch_lower_its_own_loss(warm: Objective[Any], pair: Any) -> None:
    for module in pair.student.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 0.0  # a term on running statistics would see them move with every look
    parameters = trained(warm, pair)
    losses = [warm(pair.step(warm))]
    for _ in range(2):
        found = gradients(parameters, losses[-1])
        start = [parameter.detach().clone() for parameter in parameters]
        for share in (1e-3, 1e-4, 1e-5):  # of the weights' size: how far the slope holds depends on the loss
            with torch.no_grad():
                for parameter, value, gradient in zip(parameters, start, found, strict=True):
                    parameter.copy_(value - share * size(start) / size(found) * gradient)
            loss = warm(pair.step(warm))
            if loss < losses[-1]:
                break
        losses.append(loss)
    assert losses[2] < losses[1] < losses[0]


def test_forward_leaves_everything_as_it_was(warm: Objective[Any], pair: Any) -> None:
    step = pair.step(warm)
    tensors = {"images": step.images, "labels": step.labels, "indices": step.indices, "logits": step.outputs.logits}
    tensors |= {"teacher": step.teacher.logits, **step.outputs.features}
    tensors |= {f"teacher {name}": value for name, value in step.teacher.features.items()}
    before, own = {key: value.clone() for key, value in tensors.items()}, state(warm)
    student, teacher, random = state(pair.student), state(pair.teacher), torch.get_rng_state()
    first, second = warm(step), warm(step)
    assert torch.equal(first, second)
    assert_same(state(warm), own)
    assert_same(state(pair.student), student)
    assert_same(state(pair.teacher), teacher)
    assert_same(tensors, before)
    assert torch.equal(torch.get_rng_state(), random)


def test_update_changes_only_its_own_state(warm: Objective[Any], pair: Any) -> None:
    step = pair.step(warm)
    models, logits, random = state(pair.student), step.outputs.logits.clone(), torch.get_rng_state()
    warm.update(step)
    assert_same(state(pair.student), models)
    assert torch.equal(step.outputs.logits, logits)
    assert torch.equal(torch.get_rng_state(), random)
    assert not any(buffer.requires_grad for buffer in warm.buffers())


def test_resumed_objective_has_the_same_next_loss(name: str, warm: Objective[Any], pair: Any) -> None:
    saved, step = copy.deepcopy(warm.state_dict()), pair.step(warm)
    torch.manual_seed(9)  # the first weights are others
    resumed = default_config(name).build(pair.task)
    resumed.load_state_dict(saved)
    assert torch.equal(resumed(step), warm(step))


@pytest.mark.parametrize("networks", PAIRS)
def test_builds_on_networks_of_every_kind(name: str, networks: str, make_pair: Callable[..., Any]) -> None:
    config = default_config(name)
    if (name, networks) in IMPOSSIBLE:
        with pytest.raises(InputError, match=IMPOSSIBLE[name, networks]):
            config.build(make_pair(networks, config).task)
        return
    pair = make_pair(networks, config)
    objective = built(name, pair)
    loss = objective(pair.step(objective))
    assert loss.isfinite()
    assert loss > 0 or name in BELOW_ZERO or name in WITH_A_PAST
    if loss.requires_grad:
        assert all(gradient.isfinite().all() for gradient in gradients(trained(objective, pair), loss))


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # the compiler's own look
@pytest.mark.filterwarnings("ignore:.*autograd.function.Function.* should not be instantiated")  # the compiler does so
def test_compiled_objective_gives_the_same(warm: Objective[Any], pair: Any) -> None:
    step = pair.step(warm)
    torch.compiler.reset()
    compiled: Any = torch.compile(warm, backend="eager", fullgraph=warm.name not in GRAPH_BREAKS)
    torch.testing.assert_close(compiled(step), warm(step), rtol=1e-6, atol=0)


def test_a_sum_with_other_objectives_keeps_every_term(name: str, warm: Objective[Any], pair: Any) -> None:
    others = [
        Term(objective=built(other, pair), weight=2.0)
        for other in ("cross_entropy", "kd", "weight_l1")
        if other != name
    ]
    terms = [Term(objective=warm, weight=0.5), *others]
    step = pair.step(*(term.objective for term in terms))
    losses = torch.stack(weighted_losses(terms, step))
    alone = [term.weight_at(epoch=step.epoch, num_epochs=step.num_epochs) * term.objective(step) for term in terms]
    torch.testing.assert_close(losses, torch.stack(alone), rtol=0, atol=0)
    parameters = trained(warm, pair)
    parts = [gradients(parameters, loss) for loss in alone]
    assert all(size(part) > 0 for part in parts)
    for whole, *summands in zip(gradients(parameters, losses.sum()), *parts, strict=True):
        tolerance = 3e-6 * max(1.0, whole.abs().max().item())
        torch.testing.assert_close(whole, torch.stack(summands).sum(0), rtol=1e-4, atol=tolerance)
