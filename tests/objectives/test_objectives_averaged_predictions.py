from collections.abc import Callable

import numpy as np
import pytest
import torch
from scipy.special import log_softmax, softmax
from scipy.stats import entropy
from torch import nn

from soteacher.errors import InputError
from soteacher.objectives.teacher.averaged_predictions import (
    METHOD,
    AveragedPredictionsConfig,
    cross_entropy_with_average,
)
from soteacher.objectives.teacher.consistency import ConsistencyConfig
from soteacher.types import DistillStep, Task

MakeStep = Callable[..., DistillStep]
SEEN = torch.tensor([1, 2, 3])


def test_cross_entropy_with_average_by_hand() -> None:
    logits = torch.tensor([[np.log(3), 0.0], [np.log(3), 0.0]], dtype=torch.float64)
    average = torch.tensor([[0.5, 0.5], [0.5, 0.5]], dtype=torch.float64)
    found = cross_entropy_with_average(logits, average, torch.tensor([2, 0]))
    expected = -0.5 * (np.log(0.75) + np.log(0.25))
    torch.testing.assert_close(found, torch.tensor([expected, 0.0], dtype=torch.float64))


def test_cross_entropy_with_average_is_divergence_plus_entropy_of_the_average() -> None:
    torch.manual_seed(0)
    logits, average = torch.randn(3, 5, dtype=torch.float64), torch.randn(3, 5, dtype=torch.float64).softmax(dim=-1)
    divergence = entropy(average.numpy(), softmax(logits.numpy(), axis=1), axis=1)
    found = cross_entropy_with_average(logits, average, SEEN)
    np.testing.assert_allclose(found.numpy(), divergence + entropy(average.numpy(), axis=1))
    agreed = cross_entropy_with_average(average.log(), average, SEEN)
    np.testing.assert_allclose(agreed.numpy(), entropy(average.numpy(), axis=1))


def test_cross_entropy_with_average_gradient_is_the_difference_of_the_predictions() -> None:
    torch.manual_seed(0)
    logits = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    average = torch.rand(3, 4, dtype=torch.float64).softmax(dim=-1).requires_grad_()
    count = torch.tensor([0, 1, 2])
    assert torch.autograd.gradcheck(lambda z: cross_entropy_with_average(z, average.detach(), count), logits)
    cross_entropy_with_average(logits, average, count).sum().backward()
    assert average.grad is None
    assert logits.grad is not None
    expected = (logits.detach().softmax(dim=-1) - average.detach()) * (count > 0).unsqueeze(-1)
    torch.testing.assert_close(logits.grad, expected)


def test_cross_entropy_with_average_ignores_a_shift_of_the_logits() -> None:
    torch.manual_seed(0)
    logits, average = torch.randn(3, 4), torch.rand(3, 4).softmax(dim=-1)
    torch.testing.assert_close(
        cross_entropy_with_average(logits + 5, average, SEEN), cross_entropy_with_average(logits, average, SEEN)
    )


@pytest.mark.parametrize(
    ("logits", "average", "count"), [((2, 3), (2, 4), (2,)), ((2, 3), (2, 3), (3,)), ((3,), (3,), (3,))], ids=str
)
def test_wrong_shapes_are_refused(logits: tuple[int, ...], average: tuple[int, ...], count: tuple[int, ...]) -> None:
    with pytest.raises(InputError, match="of one shape"):
        cross_entropy_with_average(torch.zeros(logits), torch.zeros(average), torch.zeros(count, dtype=torch.int64))


def test_examples_that_are_new_cost_nothing(task: Task, network: nn.Module, make_step: MakeStep) -> None:
    objective = AveragedPredictionsConfig().build(task)
    first, second = make_step(network, indices=(0, 1)), make_step(network, indices=(1, 2), seed=1)
    assert objective(first) == 0
    objective.update(first)
    label = softmax(first.outputs.logits[1].detach().numpy())
    expected = -(label * log_softmax(second.outputs.logits[0].detach().numpy())).sum() / 2  # example 2 is new
    assert objective(second).item() == pytest.approx(expected, rel=1e-5)
    objective.update(second)
    assert objective.count.tolist() == [1, 2, 1] + [0] * 9
    assert not objective.average[3:].any()


def test_averages_are_those_of_consistency(task: Task, network: nn.Module, make_step: MakeStep) -> None:
    objective, consistency = AveragedPredictionsConfig().build(task), ConsistencyConfig().build(task)
    for seed in range(4):
        step = make_step(network, seed=seed, indices=(seed, seed + 1, seed + 2), dtype=torch.bfloat16)
        objective.update(step)
        consistency.update(step)
    assert torch.equal(objective.average, consistency.average)
    assert torch.equal(objective.count, consistency.count)


def test_a_resumed_memory_is_the_same(task: Task, network: nn.Module, make_step: MakeStep) -> None:
    objective = AveragedPredictionsConfig().build(task)
    objective.update(make_step(network))
    resumed = AveragedPredictionsConfig().build(task)
    resumed.load_state_dict(objective.state_dict())
    step = make_step(network, seed=1)
    assert objective(step) > 0
    for each in (objective, resumed):
        each.update(step)
    again = make_step(network, seed=2)
    assert torch.equal(resumed(again), objective(again))


def test_other_number_of_classes_is_refused(network: nn.Module, make_step: MakeStep) -> None:
    objective = AveragedPredictionsConfig().build(Task(num_examples=12, num_classes=7))
    with pytest.raises(InputError, match=r"\[4, 5\], \[4, 7\] and \[4\]"):
        objective(make_step(network))


def test_method_has_the_terms_of_consistency_in_soteacher() -> None:
    assert METHOD.terms == {"cross_entropy": {}, "averaged_predictions": {"weight": 1.0, "ramp": "linear"}}
