from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from soteacher.errors import InputError
from soteacher.functional import released_running_mean, running_mean, squared_distance
from soteacher.objective import weighted_losses
from soteacher.objectives.teacher.consistency import Consistency, ConsistencyConfig
from soteacher.objectives.teacher.consistency_released import ConsistencyReleased, ConsistencyReleasedConfig
from soteacher.types import DistillStep, Outputs, Step, Task

MakeStep = Callable[..., DistillStep]


def test_squared_distance_by_hand() -> None:
    predictions, average = torch.tensor([[1.0, 0.0], [1.0, 0.0]]), torch.tensor([[0.5, 0.5], [0.5, 0.5]])
    assert squared_distance(predictions, average, torch.tensor([3, 0])).tolist() == [0.5, 0.0]


def test_squared_distance_is_zero_at_the_average_and_the_same_for_permuted_classes() -> None:
    torch.manual_seed(0)
    predictions, average = torch.rand(2, 4, 5).softmax(dim=-1)
    count, order = torch.ones(4, dtype=torch.int64), torch.randperm(5)
    assert not squared_distance(average, average, count).any()
    torch.testing.assert_close(
        squared_distance(predictions[:, order], average[:, order], count), squared_distance(predictions, average, count)
    )


def test_squared_distance_gradient_reaches_the_predictions_only() -> None:
    torch.manual_seed(0)
    predictions, average = (torch.rand(3, 4, dtype=torch.float64, requires_grad=True) for _ in range(2))
    count = torch.tensor([0, 1, 2])
    assert torch.autograd.gradcheck(lambda p: squared_distance(p, average.detach(), count), predictions)
    squared_distance(predictions, average, count).sum().backward()
    assert average.grad is None
    assert predictions.grad is not None
    assert not predictions.grad[0].any()


def test_running_mean_is_the_mean() -> None:
    torch.manual_seed(0)
    values = torch.rand(6, 2, 3, dtype=torch.float64)
    mean = torch.full((2, 3), 9.0, dtype=torch.float64)  # of no values: must leave no trace
    for past, value in enumerate(values):
        mean = running_mean(mean, value, torch.tensor([past, past]))
        torch.testing.assert_close(mean, values[: past + 1].mean(dim=0))


def test_released_running_mean_counts_the_first_value_twice() -> None:
    torch.manual_seed(0)
    values = torch.rand(6, 2, 3, dtype=torch.float64)
    average = torch.zeros(2, 3, dtype=torch.float64)
    for past, value in enumerate(values):
        average = released_running_mean(average, value, torch.tensor([past, past]))
        torch.testing.assert_close(average, (values[0] + values[: past + 1].sum(dim=0)) / (past + 2))


@pytest.mark.parametrize("function", [squared_distance, running_mean, released_running_mean])
@pytest.mark.parametrize(
    ("first", "second", "count"), [((2, 3), (2, 4), (2,)), ((2, 3), (2, 3), (3,)), ((3,), (3,), (3,))], ids=str
)
def test_wrong_shapes_are_refused(
    function: Callable[..., Tensor], first: tuple[int, ...], second: tuple[int, ...], count: tuple[int, ...]
) -> None:
    with pytest.raises(InputError, match="of one shape"):
        function(torch.zeros(first), torch.zeros(second), torch.zeros(count, dtype=torch.int64))


@pytest.mark.parametrize("config", [ConsistencyConfig(), ConsistencyReleasedConfig()])
def test_other_number_of_classes_is_refused(
    config: ConsistencyConfig | ConsistencyReleasedConfig, network: nn.Module, make_step: MakeStep
) -> None:
    objective = config.build(Task(num_examples=12, num_classes=7))
    with pytest.raises(InputError, match=r"\[4, 5\], \[4, 7\] and \[4\]"):
        objective(make_step(network))
    with pytest.raises(InputError, match=r"\[4, 7\], \[4, 5\] and \[4\]"):
        objective.update(make_step(network))


@pytest.mark.parametrize("config", [ConsistencyConfig(), ConsistencyReleasedConfig()])
def test_examples_that_are_new_cost_nothing(
    config: ConsistencyConfig | ConsistencyReleasedConfig, task: Task, network: nn.Module, make_step: MakeStep
) -> None:
    objective = config.build(task)
    first, second = make_step(network, indices=(0, 1)), make_step(network, indices=(1, 2), seed=1)
    assert objective(first) == 0
    objective.update(first)
    moved = second.outputs.logits.softmax(dim=-1)[0] - first.outputs.logits.softmax(dim=-1)[1]
    torch.testing.assert_close(objective(second), moved.square().sum() / 2)  # example 2 is new: half the batch
    objective.update(second)
    assert objective.count.tolist() == [1, 2, 1] + [0] * 9
    assert not objective.average[3:].any()


def test_consistency_keeps_the_mean_of_all_epochs(task: Task, network: nn.Module, make_step: MakeStep) -> None:
    objective: Consistency = ConsistencyConfig().build(task)
    steps = [make_step(network, seed=seed, dtype=torch.bfloat16) for seed in range(5)]
    for step in steps:
        objective.update(step)
    predictions = torch.stack([step.outputs.logits.float().softmax(dim=-1) for step in steps])
    torch.testing.assert_close(objective.average[steps[0].indices], predictions.mean(dim=0))
    assert objective.average.dtype == torch.float32


def test_consistency_released_equals_released_code(golden: Callable[[str], dict[str, Tensor]]) -> None:
    given = golden("consistency_released")
    num_epochs, num_examples, num_classes = given["logits"].shape
    term = ConsistencyReleasedConfig().term(Task(num_examples=num_examples, num_classes=num_classes))
    assert isinstance(term.objective, ConsistencyReleased)
    for epoch in range(num_epochs):
        losses: list[Tensor] = []
        for indices in given["batches"]:
            step = logits_step(given["logits"][epoch][indices], indices, epoch=epoch, num_epochs=num_epochs)
            losses.append(weighted_losses([term], step)[0])
            term.objective.update(step)
        torch.testing.assert_close(torch.stack(losses), given["weighted_losses"][epoch], rtol=1e-5, atol=0)
        torch.testing.assert_close(
            term.objective.average, given["averages_after_epoch"][epoch], rtol=1e-5, atol=1e-8, msg=str(epoch)
        )


def logits_step(logits: Tensor, indices: Tensor, *, epoch: int, num_epochs: int) -> Step:
    return Step(
        images=torch.zeros(len(indices), 1, 1, 1), labels=torch.zeros_like(indices), indices=indices,
        outputs=Outputs(logits=logits, features={}), model=nn.Identity(),
        epoch=epoch, num_epochs=num_epochs, progress=epoch / num_epochs,
    )  # fmt: skip
