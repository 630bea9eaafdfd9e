from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from soteacher.errors import InputError
from soteacher.objectives.teacher.confidence_ranking import METHOD, ConfidenceRankingConfig, ranking_violation
from soteacher.types import DistillStep, Outputs, Step, Task

MakeStep = Callable[..., DistillStep]


def answers_step(answers: list[int], labels: list[int], indices: list[int], *, logit: float = 4.0) -> Step:
    """Return a step whose predictions are the given classes of three."""
    logits = logit * torch.eye(3)[answers]
    return Step(
        images=torch.zeros(len(indices), 1, 1, 1), labels=torch.tensor(labels), indices=torch.tensor(indices),
        outputs=Outputs(logits=logits, features={}), model=nn.Identity(), epoch=0, num_epochs=2, progress=0.0,
    )  # fmt: skip


def test_ranking_violation_by_hand() -> None:
    confidence = torch.tensor([0.9, 0.5, 0.6, 0.6])
    correctness = torch.tensor([1.0, 0.75, 0.75, 0.25])
    # 0.9 leads 0.5 by more than 0.25; two of one correctness; 0.6 leads 0.6 by 0, wanted 0.5; 0.6 leads 0.9 by -0.3
    torch.testing.assert_close(ranking_violation(confidence, correctness), torch.tensor([0.0, 0.0, 0.5, 0.75 - 0.3]))


def test_ranking_violation_equals_the_margin_ranking_loss_of_torch() -> None:
    """The released form: a margin ranking loss of margin 0, where the neighbour's confidence is moved by the margin."""
    torch.manual_seed(0)
    confidence, correctness = torch.rand(64), torch.randint(0, 5, (64,)) / 4
    other, target = confidence.roll(-1), (correctness - correctness.roll(-1)).sign()
    moved = other + (correctness - correctness.roll(-1)).abs() / torch.where(target == 0, torch.ones(64), target)
    expected = nn.MarginRankingLoss(margin=0.0, reduction="none")(confidence, moved, target)
    torch.testing.assert_close(ranking_violation(confidence, correctness), expected)
    assert expected.count_nonzero() > 10


def test_ranking_violation_is_the_same_from_any_beginning_and_for_reversed_batches() -> None:
    torch.manual_seed(0)
    confidence, correctness = torch.rand(2, 9)
    value = ranking_violation(confidence, correctness)
    torch.testing.assert_close(ranking_violation(confidence.roll(4), correctness.roll(4)), value.roll(4))
    reverse = ranking_violation(confidence.flip(0), correctness.flip(0))
    torch.testing.assert_close(reverse.sort().values, value.sort().values)


def test_ranking_violation_is_zero_for_a_perfect_ranking_and_for_a_batch_of_one() -> None:
    correctness = torch.tensor([0.0, 0.4, 1.0, 0.2])
    assert not ranking_violation(correctness, correctness).any()
    assert ranking_violation(torch.tensor([0.3]), torch.tensor([0.7])).tolist() == [0.0]


def test_ranking_violation_gradient_reaches_the_confidence_only() -> None:
    torch.manual_seed(0)
    confidence, correctness = (torch.rand(6, dtype=torch.float64, requires_grad=True) for _ in range(2))
    assert torch.autograd.gradcheck(lambda value: ranking_violation(value, correctness.detach()), confidence)
    ranking_violation(confidence, correctness).sum().backward()
    assert correctness.grad is None
    assert confidence.grad is not None
    assert confidence.grad.any()


@pytest.mark.parametrize(("confidence", "correctness"), [((3,), (2,)), ((2, 3), (2, 3)), ((2,), (2, 1))], ids=str)
def test_wrong_shapes_are_refused(confidence: tuple[int, ...], correctness: tuple[int, ...]) -> None:
    with pytest.raises(InputError, match=r"of one shape \[B\]"):
        ranking_violation(torch.zeros(confidence), torch.zeros(correctness))


def test_update_counts_steps_and_right_predictions() -> None:
    objective = ConfidenceRankingConfig().build(Task(num_examples=5, num_classes=3))
    objective.update(answers_step([0, 1, 2], [0, 1, 1], [0, 3, 4]))
    objective.update(answers_step([0, 1, 2], [0, 2, 2], [3, 0, 1]))
    assert objective.right.tolist() == [1, 1, 0, 2, 0]
    assert objective.count.tolist() == [2, 1, 0, 2, 1]


def test_forward_ranks_by_the_share_of_right_predictions_before_the_step() -> None:
    objective = ConfidenceRankingConfig().build(Task(num_examples=4, num_classes=3))
    first = answers_step([0, 1, 2], [0, 1, 1], [0, 1, 2])
    assert objective(first) == 0  # nothing is known yet
    objective.update(first)
    objective.update(answers_step([0, 1], [1, 1], [0, 1]))
    step = answers_step([0, 1, 2, 0], [0, 0, 0, 0], [0, 1, 2, 3], logit=2.0)
    correctness = np.array([0.5, 1.0, 0.0, 0.0])  # all are equally confident: what is left is the margins
    expected = np.abs(correctness - np.roll(correctness, -1)).mean()
    assert objective(step).item() == pytest.approx(expected, rel=1e-6)


def test_confidence_is_the_largest_probability() -> None:
    objective = ConfidenceRankingConfig().build(Task(num_examples=2, num_classes=3))
    objective.update(answers_step([0, 1], [0, 0], [0, 1]))
    logits = torch.tensor([[0.0, 1.0, 2.0], [3.0, 0.0, 0.0]])
    step = replace(answers_step([0, 1], [0, 0], [0, 1]), outputs=Outputs(logits=logits, features={}))
    lead = np.exp(2) / (1 + np.e + np.exp(2)) - np.exp(3) / (2 + np.exp(3))  # of the one that was right: negative
    assert objective(step).item() == pytest.approx(1 - lead, rel=1e-6)


def test_descent_makes_the_ranking_right() -> None:
    objective = ConfidenceRankingConfig().build(Task(num_examples=3, num_classes=3))
    objective.update(answers_step([0, 1, 0], [0, 0, 0], [0, 1, 2]))
    objective.update(answers_step([1, 1, 0], [0, 0, 0], [0, 1, 2]))  # right: half, never, always
    logits: Tensor = torch.tensor([[0.5, 0.0, 0.0]] * 3, requires_grad=True)
    step = answers_step([0, 0, 0], [0, 0, 0], [0, 1, 2])
    for _ in range(200):
        loss = objective(replace(step, outputs=Outputs(logits=logits, features={})))
        logits = (logits - torch.autograd.grad(loss, logits)[0]).detach().requires_grad_()
    confidence = logits.softmax(dim=-1).amax(dim=-1).tolist()
    assert confidence[1] < confidence[0] < confidence[2]


def test_a_resumed_memory_is_the_same(task: Task, network: nn.Module, make_step: MakeStep) -> None:
    objective = ConfidenceRankingConfig().build(task)
    step = make_step(network)
    right = step.outputs.logits.argmax(dim=-1)
    objective.update(replace(step, labels=torch.where(torch.arange(4) < 2, right, right + 1)))  # two of four are right
    resumed = ConfidenceRankingConfig().build(task)
    resumed.load_state_dict(objective.state_dict())
    again = make_step(network, seed=1)
    assert objective(again) > 0
    assert torch.equal(resumed(again), objective(again))


def test_method_has_the_released_weight() -> None:
    assert METHOD.terms == {"cross_entropy": {}, "confidence_ranking": {"weight": 1.0}}
