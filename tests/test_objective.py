import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from soteacher.errors import InputError
from soteacher.objective import Objective, Ramp, Term, ramp_factor, weighted_losses
from soteacher.types import Outputs, Step

RAMPS: dict[Ramp, list[float]] = {  # shares 1/4, 2/4, 3/4, 4/4 of the run
    "constant": [1, 1, 1, 1],
    "linear": [0.25, 0.5, 0.75, 1],
    "cosine": [(1 - math.sqrt(0.5)) / 2, 0.5, (1 + math.sqrt(0.5)) / 2, 1],
    "quarter_circle": [1 - math.sqrt(15) / 4, 1 - math.sqrt(3) / 2, 1 - math.sqrt(7) / 4, 1],
    "step": [0, 0, 1, 1],
}


class Logit(Objective[Step]):
    """The sum of the logits, times a factor."""

    name = "logit"

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, step: Step) -> Tensor:
        return self.factor * step.outputs.logits.sum()


def make_step(logits: Tensor, *, epoch: int) -> Step:
    labels = torch.zeros(len(logits), dtype=torch.int64)
    return Step(
        images=torch.zeros(len(logits), 1, 1, 1), labels=labels, indices=labels, model=nn.Identity(),
        outputs=Outputs(logits=logits, features={}), epoch=epoch, num_epochs=4, progress=epoch / 4,
    )  # fmt: skip


@pytest.mark.parametrize(("ramp", "expected"), RAMPS.items(), ids=RAMPS)
def test_ramp_factor_by_hand(ramp: Ramp, expected: list[float]) -> None:
    assert [ramp_factor(ramp, epoch=epoch, num_epochs=4) for epoch in range(4)] == pytest.approx(expected)


@pytest.mark.parametrize("ramp", RAMPS)
def test_ramp_factor_never_falls_and_ends_at_one(ramp: Ramp) -> None:
    factors = [ramp_factor(ramp, epoch=epoch, num_epochs=240) for epoch in range(240)]
    assert factors == sorted(factors)
    assert factors[0] >= 0
    assert factors[-1] == 1
    assert ramp_factor(ramp, epoch=0, num_epochs=1) == 1


@pytest.mark.parametrize("weight", [0.0, -1.0, float("nan"), float("inf"), -float("inf")])
def test_term_refuses_a_weight(weight: float) -> None:
    with pytest.raises(InputError, match=f"weight of logit must be positive, got {weight}"):
        Term(objective=Logit(1), weight=weight)


def test_term_grows_its_weight_by_the_ramp() -> None:
    term = Term(objective=Logit(1), weight=8.0, ramp="linear")
    assert [term.weight_at(epoch=epoch, num_epochs=4) for epoch in range(4)] == [2, 4, 6, 8]
    assert Term(objective=Logit(1)).weight_at(epoch=0, num_epochs=4) == 1


def test_weighted_losses_are_in_order_and_sum_to_the_loss() -> None:
    logits = torch.tensor([[1.0, 2.0], [3.0, 4.0]], requires_grad=True)
    terms = [Term(objective=Logit(1), weight=0.5), Term(objective=Logit(10), weight=2.0, ramp="linear")]
    losses = weighted_losses(terms, make_step(logits, epoch=1))
    assert losses.tolist() == [5.0, 100.0]
    losses.sum().backward()
    assert logits.grad is not None
    assert logits.grad.tolist() == [[10.5, 10.5], [10.5, 10.5]]


def test_update_of_a_stateless_objective_does_nothing() -> None:
    objective: Objective[Any] = Logit(1)
    objective.update(make_step(torch.zeros(1, 2), epoch=0))
    assert not objective.state_dict()
