import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import truncnorm
from torch import Tensor

from soteacher.errors import InputError
from soteacher.objectives.student.ofd import METHOD, ChannelStatistics, OFDConfig, negative_mean, partial_l2_distance


def maps(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize(("mean", "deviation"), [(0.0, 1.0), (-2.0, 0.5), (1.5, 1.0), (0.3, 4.0), (3.0, 1.0)])
def test_negative_mean_equals_scipy(mean: float, deviation: float) -> None:
    expected = truncnorm.mean(-np.inf, -mean / deviation, loc=mean, scale=deviation)
    found = negative_mean(torch.tensor([mean]).double(), torch.tensor([deviation]).double())
    np.testing.assert_allclose(found.numpy(), [expected], rtol=1e-7)


def test_negative_mean_of_channels_that_are_hardly_ever_negative_or_constant() -> None:
    mean, deviation = torch.tensor([3.2, 50.0, -2.0, 2.0, 0.0]), torch.tensor([1.0, 2.0, 0.0, 0.0, 0.0])
    torch.testing.assert_close(negative_mean(mean, deviation), torch.tensor([-3.0, -6.0, -2.0, 0.0, 0.0]))


def test_partial_l2_distance_by_hand() -> None:
    margins = torch.tensor([-1.0])
    student = torch.tensor([0.5, -3.0, -0.2, -0.8, -2.0, 1.0]).reshape(1, 1, 1, 6)
    teacher = torch.tensor([2.0, 0.5, -0.5, -0.5, -4.0, -4.0]).reshape(1, 1, 1, 6)
    # active: 1.5², 3.5²; below zero: 0.3² above the target, nothing below it; target at the margin: nothing, 2²
    expected = 1.5**2 + 3.5**2 + 0.3**2 + 0 + 0 + 2.0**2
    torch.testing.assert_close(partial_l2_distance(student, teacher, margins=margins), torch.tensor([expected]))


def test_partial_l2_distance_equals_the_three_cases_in_numpy() -> None:
    student, teacher, margins = maps(0, 3, 4, 5, 5), maps(1, 3, 4, 5, 5), -maps(2, 4).abs()
    s, t, m = student.numpy(), teacher.numpy(), margins.numpy()[None, :, None, None]
    expected = (
        (s - m) ** 2 * ((s > m) & (t <= m)) + (s - t) ** 2 * ((s > t) & (t > m) & (t <= 0)) + (s - t) ** 2 * (t > 0)
    ).sum(axis=(1, 2, 3))
    np.testing.assert_allclose(partial_l2_distance(student, teacher, margins=margins).numpy(), expected)


def test_partial_l2_distance_is_zero_where_a_rectifier_sees_no_difference() -> None:
    teacher = maps(1, 2, 3, 4, 4)
    below = teacher.where(teacher > 0, teacher - 1)
    margins = torch.full((3,), -9.0, dtype=torch.float64)
    assert partial_l2_distance(teacher, teacher, margins=margins).eq(0).all()
    assert partial_l2_distance(below, teacher, margins=margins).eq(0).all()


def test_partial_l2_distance_gradient_reaches_the_student_only() -> None:
    student, teacher, margins = (
        maps(0, 2, 3, 2, 2).requires_grad_(),
        maps(1, 2, 3, 2, 2).requires_grad_(),
        -torch.ones(3),
    )
    assert torch.autograd.gradcheck(lambda s: partial_l2_distance(s, teacher, margins=margins), student)
    partial_l2_distance(student, teacher, margins=margins).sum().backward()
    assert teacher.grad is None


def test_functions_refuse_shapes_that_differ() -> None:
    with pytest.raises(InputError, match=r"margins \[C\], got \[1, 2, 3, 3\] \(student\), \[1, 2, 3, 3\] \(teacher\)"):
        partial_l2_distance(torch.zeros(1, 2, 3, 3), torch.zeros(1, 2, 3, 3), margins=torch.zeros(3))
    with pytest.raises(InputError, match=r"\[1, 4, 3, 3\] \(teacher\)"):
        partial_l2_distance(torch.zeros(1, 2, 3, 3), torch.zeros(1, 4, 3, 3), margins=torch.zeros(2))
    with pytest.raises(InputError, match=r"one shape, got \[2\] and \[3\]"):
        negative_mean(torch.zeros(2), torch.ones(3))


def test_channel_statistics_are_those_of_all_examples_seen() -> None:
    batches = [maps(seed, size, 3, 2, 2).float() * (seed + 1) + seed for seed, size in ((0, 4), (1, 1), (2, 7))]
    statistics = ChannelStatistics(3)
    for batch in batches[:-1]:
        statistics.take_in(batch)
    mean, variance = statistics.with_batch(batches[-1])
    everything = torch.cat(batches).numpy()
    np.testing.assert_allclose(mean.numpy(), everything.mean(axis=(0, 2, 3)), rtol=1e-5)
    np.testing.assert_allclose(variance.numpy(), everything.var(axis=(0, 2, 3)), rtol=1e-5)
    assert statistics.num_examples == 5
    assert not list(statistics.parameters())


@pytest.mark.parametrize("name", ["same family", "other family", "transformer teacher", "transformer student"])
@pytest.mark.parametrize("batch", [8, 1])
def test_objective_works_with_real_networks(name: str, batch: int, make_pair: Callable[[str], Any]) -> None:
    pair = make_pair(name)
    torch.manual_seed(0)
    objective = OFDConfig().build(pair.task)
    step = pair.step(objective, batch=batch)
    loss = objective(step)
    assert loss.dtype == torch.float32
    assert loss > 0
    loss.backward()
    gradients = [p.grad for p in [*pair.student.parameters(), *objective.parameters()] if p.grad is not None]
    assert all(gradient.isfinite().all() for gradient in gradients)
    assert sum(gradient.abs().sum() for gradient in gradients) > 0
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(objective(step), loss)


def test_objective_sums_the_stages_with_doubling_weights(make_pair: Callable[[str], Any]) -> None:
    pair = make_pair("same family")
    torch.manual_seed(0)
    objective = OFDConfig().build(pair.task)
    step = pair.step(objective)
    expected = 0.0
    for number, weight in ((1, 0.25), (2, 0.5), (3, 1.0)):
        wanted = step.teacher.features[f"preactivation{number}"]
        deviation, mean = torch.std_mean(wanted, dim=(0, 2, 3), correction=0)
        bridged = objective.connectors[number - 1](step.outputs.features[f"preactivation{number}"])
        distance = partial_l2_distance(bridged, wanted, margins=negative_mean(mean, deviation))
        expected = expected + weight * distance.mean()
    torch.testing.assert_close(objective(step), expected)


def test_update_collects_the_teachers_statistics_and_forward_does_not(make_pair: Callable[[str], Any]) -> None:
    pair = make_pair("same family")
    torch.manual_seed(0)
    objective = OFDConfig().build(pair.task)
    first, second = pair.step(objective, seed=0), pair.step(objective, seed=1)
    before = copy.deepcopy(objective.state_dict())
    loss = objective(first)
    assert all(torch.equal(value, before[key]) for key, value in objective.state_dict().items())
    objective.update(first)
    torch.testing.assert_close(objective(first), loss)  # the same batch twice has the same statistics
    changed = objective(second)
    resumed = OFDConfig().build(pair.task)
    resumed.load_state_dict(objective.state_dict())
    assert torch.equal(resumed(second), changed)


def test_method_has_the_authors_weight() -> None:
    assert METHOD.terms == {"cross_entropy": {}, "ofd": {"weight": 0.001}}
