import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from scipy.special import log_softmax
from torch import Tensor, nn

from soteacher.errors import InputError
from soteacher.objectives.student.fcfd import FCFD, METHOD, FCFDConfig, appearance_distance
from soteacher.types import DistillStep

PAIRS = ("same family", "other family", "transformer teacher", "transformer student")


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def build(pair: Any, **settings: Any) -> FCFD:
    torch.manual_seed(0)
    return FCFDConfig(**settings).build(pair.task)


def norm(parameters: Any) -> float:
    return sum(value.grad.norm().item() for value in parameters if value.grad is not None)


def test_appearance_by_hand() -> None:
    ours, theirs = draw(3, 4, 5, 5), draw(3, 4, 5, 5, seed=1)
    first, second = ours.numpy(), theirs.numpy()
    wanted = ((first - second) ** 2).reshape(3, -1).mean(1)
    np.testing.assert_allclose(appearance_distance(ours, theirs), wanted, rtol=1e-5)
    averages = [np.maximum(maps, 0).mean((2, 3)) for maps in (first, second)]
    wanted += ((averages[0] - averages[1]) ** 2).mean(1)
    np.testing.assert_allclose(appearance_distance(ours, theirs, pooled=True), wanted, rtol=1e-5)
    assert appearance_distance(ours, ours, pooled=True).abs().max() == 0


def test_appearance_gradient_is_right_and_the_teacher_is_a_constant() -> None:
    ours, theirs = draw(2, 3, 4, 4, dtype=torch.float64).requires_grad_(), draw(2, 3, 4, 4, seed=1, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda value: appearance_distance(value, theirs, pooled=True), (ours,))
    assert not appearance_distance(ours.detach(), theirs.requires_grad_()).requires_grad


@pytest.mark.parametrize("shapes", [((2, 3, 4, 4), (2, 3, 2, 2)), ((2, 3), (2, 3)), ((2, 3, 4, 4), (2, 4, 4, 4))])
def test_maps_that_do_not_fit_are_refused(shapes: tuple[tuple[int, ...], tuple[int, ...]]) -> None:
    with pytest.raises(InputError, match=r"must have one shape \[B, C, H, W\]"):
        appearance_distance(draw(*shapes[0]), draw(*shapes[1]))


def divergence(read: Tensor, teacher: Tensor, temperature: float) -> float:
    log_read, log_teacher = (log_softmax(value.detach().numpy() / temperature, axis=1) for value in (read, teacher))
    return temperature**2 * (np.exp(log_teacher) * (log_teacher - log_read)).sum(1).mean()


def rest_of(network: Any, stage: int, maps: Tensor) -> Tensor:
    """Send maps through what follows a stage of a wide ResNet."""
    for block in (network.block1, network.block2, network.block3)[stage + 1 :]:
        maps = block(maps)
    return network.fc(torch.relu(network.bn1(maps)).mean((2, 3)))


def connected(bridge: Any, maps: Tensor) -> Tensor:
    values = nn.functional.conv2d(maps, bridge.convolution.weight, padding=1)
    mean = values.mean((0, 2, 3), keepdim=True)
    return (values - mean) / torch.sqrt(values.var((0, 2, 3), unbiased=False, keepdim=True) + 1e-5)


@pytest.mark.parametrize("seed", range(4))
def test_loss_by_hand(seed: int, make_pair: Callable[..., Any]) -> None:
    pair = make_pair("same family")
    objective = build(pair, appearance_weight=3.0, function_weight=0.5, temperature=2.0)
    step = pair.step(objective, seed=seed)
    assert (step.epoch, step.num_epochs) == (1, 4)
    drawn = torch.randint(2, (2,), generator=torch.Generator().manual_seed(seed)).tolist()
    features, targets = step.outputs.features, step.teacher.features
    wanted = 0.0
    for number, bridge in enumerate(objective.to_teacher):
        name = f"stage{number + 1}"
        bridged = connected(bridge, features[name])
        wanted += 3.0 * appearance_distance(bridged, targets[name], pooled=number == 2).mean().item()
        if number == drawn[0]:
            read = rest_of(pair.teacher.network, number, bridged)
            wanted += 0.5 * divergence(read, step.teacher.logits, 2.0)
    returned = connected(objective.to_student[drawn[1]], targets[f"stage{drawn[1] + 1}"])
    read = rest_of(copy.deepcopy(pair.student.network).train(), drawn[1], returned)
    wanted += 0.5 * divergence(read, step.teacher.logits, 2.0)
    assert objective(step).item() == pytest.approx(wanted, rel=1e-4)


def test_the_appearance_grows_over_the_first_epochs(make_pair: Callable[..., Any]) -> None:
    pair = make_pair("same family")
    objective = build(pair)
    step = pair.step(objective)
    values = [objective(replace(step, epoch=epoch, num_epochs=240)).item() for epoch in (0, 9, 19, 100)]
    assert values[3] == values[2]  # 20 of 240 epochs
    appearance = (values[2] - values[0]) / (1 - 1 / 20)
    assert values[1] == pytest.approx(values[2] - appearance * 0.5, rel=1e-5)
    constant = build(pair, appearance_ramp="constant")
    assert constant(replace(step, epoch=0, num_epochs=240)).item() == pytest.approx(values[3], rel=1e-6)


@pytest.mark.parametrize("name", PAIRS)
def test_it_trains_the_student_of_every_pair(name: str, make_pair: Callable[..., Any]) -> None:
    pair = make_pair(name)
    objective = build(pair)
    step = pair.step(objective)
    loss = objective(step)
    assert loss.isfinite()
    assert loss > 0
    assert loss.dtype == torch.float32
    loss.backward()
    trained = [*pair.student.parameters(), *objective.parameters()]
    assert all(value.grad is None or value.grad.isfinite().all() for value in trained)
    assert norm(pair.student.parameters()) > 0
    assert norm(objective.to_teacher.parameters()) > 0
    assert norm(objective.to_student.parameters()) > 0
    assert all(value.grad is None for value in pair.teacher.parameters())


@pytest.mark.parametrize("name", ["same family", "transformer teacher", "transformer student"])
def test_later_layers_reach_features_and_bridges(name: str, make_pair: Callable[..., Any]) -> None:
    """Without the appearance, the student's early layers learn through the teacher, its late ones through itself."""
    pair = make_pair(name)
    objective = build(pair, appearance_weight=1e-12)
    step = pair.step(objective)
    objective(step).backward()
    assert norm(objective.to_teacher.parameters()) > 1e-6
    assert norm(objective.to_student.parameters()) > 1e-6
    first, *_, last = pair.student.network.parameters()
    assert first.grad is not None
    assert last.grad is not None
    assert min(first.grad.norm(), last.grad.norm()) > 1e-6


def everything(pair: Any) -> dict[str, Tensor]:
    state = {f"student {name}": value.clone() for name, value in pair.student.state_dict().items()}
    return state | {f"teacher {name}": value.clone() for name, value in pair.teacher.state_dict().items()}


@pytest.mark.parametrize("dropout", [False, True])
def test_forward_leaves_networks_and_generators_as_they_were(dropout: bool, make_pair: Callable[..., Any]) -> None:
    pair = make_pair("same family")
    if dropout:
        pair.student.network.avgpool = nn.Sequential(pair.student.network.avgpool, nn.Dropout(0.5))
    objective = build(pair)
    step = pair.step(objective)
    before, random = everything(pair), torch.get_rng_state()
    first, second = objective(step), objective(step)
    assert torch.equal(first, second)
    assert torch.equal(torch.get_rng_state(), random)
    assert all(torch.equal(value, before[name]) for name, value in everything(pair).items())
    assert pair.student.training
    assert not pair.teacher.training


class Recording:
    """Parts that note where they were entered."""

    def __init__(self) -> None:
        self.taps: list[str] = []

    @property
    def classifier(self) -> nn.Linear:
        raise NotImplementedError

    def run_from(self, tap: str, feature: Tensor, images: Tensor) -> Tensor:
        assert len(feature) == len(images)
        self.taps.append(tap)
        return feature.flatten(1)[:, :5]


def test_another_step_draws_other_paths(make_pair: Callable[..., Any]) -> None:
    pair = make_pair("same family")
    objective, student, teacher = build(pair), Recording(), Recording()
    step = replace(pair.step(objective), parts=student, teacher_parts=teacher)
    for seed in range(32):
        objective(replace(step, seed=seed))
    assert set(zip(teacher.taps, student.taps, strict=True)) == {
        (there, back) for there in ("stage1", "stage2") for back in ("stage1", "stage2")
    }


def test_two_steps_lower_the_loss(make_pair: Callable[..., Any]) -> None:
    pair = make_pair("same family")
    objective = build(pair)
    optimizer = torch.optim.SGD([*pair.student.parameters(), *objective.parameters()], lr=0.001)
    losses: list[float] = []
    for _ in range(3):
        loss = objective(pair.step(objective))
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[2] < losses[1] < losses[0]


def test_a_batch_of_one_is_finite(make_pair: Callable[..., Any]) -> None:
    pair = make_pair("same family")
    objective = build(pair)
    loss = objective(pair.step(objective, batch=1))
    loss.backward()
    assert loss.isfinite()
    assert all(value.grad is None or value.grad.isfinite().all() for value in objective.parameters())


def test_half_precision_features_give_a_float32_loss(make_pair: Callable[..., Any]) -> None:
    pair = make_pair("other family")
    objective = build(pair)
    step = pair.step(objective, dtype=torch.bfloat16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = objective(step)
    loss = objective(step)
    assert mixed.dtype == loss.dtype == torch.float32
    torch.testing.assert_close(mixed, loss, rtol=2e-2, atol=0)  # the networks' own layers are rounded


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # the compiler's own look
def test_compiled_it_gives_the_same(make_pair: Callable[..., Any]) -> None:
    pair = make_pair("same family")
    objective = build(pair)
    step = pair.step(objective)
    torch.compiler.reset()
    compiled: Any = torch.compile(objective, backend="eager")
    torch.testing.assert_close(compiled(step), objective(step), rtol=1e-6, atol=0)


def test_one_pair_of_stages_is_enough(make_pair: Callable[..., Any]) -> None:
    pair = make_pair("same family")
    objective = build(pair, student_taps=("stage2",), teacher_taps=("stage1",))
    assert objective(pair.step(objective)).isfinite()


def test_a_tap_that_nothing_begins_at_is_refused(make_pair: Callable[..., Any]) -> None:
    pair = make_pair("same family")
    with pytest.raises(InputError, match=r"fcfd: later layers begin at a stage; teacher \S+ has stem, .* got 'maps'"):
        build(pair, student_taps=("stage3",), teacher_taps=("maps",))
    with pytest.raises(InputError, match=r"fcfd: later layers begin at a stage; student \S+ has .* got 'block1'"):
        build(pair, student_taps=("block1",), teacher_taps=("stage1",))


@pytest.mark.parametrize("side", ["parts", "teacher_parts"])
def test_networks_that_are_not_there_are_named(side: str, make_pair: Callable[..., Any]) -> None:
    pair = make_pair("same family")
    objective = build(pair)
    step: DistillStep = pair.step(objective)
    without: dict[str, Any] = {side: None}
    with pytest.raises(InputError, match=rf"\b{side}=\.\.\."):
        objective(replace(step, **without))


def test_the_published_terms_are_complete() -> None:
    assert list(METHOD.terms) == ["cross_entropy", "kd", "fcfd"]
