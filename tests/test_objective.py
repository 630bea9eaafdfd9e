import math
from dataclasses import replace
from typing import Any, ClassVar, get_args

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor, nn

from soteacher.errors import InputError
from soteacher.logits import standardized_logits
from soteacher.objective import Objective, ObjectiveConfig, Ramp, Term, ramp_factor, weighted_losses
from soteacher.types import DistillStep, Outputs, Step, Task

RAMPS: dict[Ramp, list[float]] = {  # shares 1/4, 2/4, 3/4, 4/4 of the run
    "constant": [1, 1, 1, 1],
    "linear": [0.25, 0.5, 0.75, 1],
    "cosine": [(1 - math.sqrt(0.5)) / 2, 0.5, (1 + math.sqrt(0.5)) / 2, 1],
    "quarter_circle": [1 - math.sqrt(15) / 4, 1 - math.sqrt(3) / 2, 1 - math.sqrt(7) / 4, 1],
    "step": [0, 0, 1, 1],
    "warmup": [1, 1, 1, 1],
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


def test_the_warmup_is_20_epochs_of_240() -> None:
    factors = [ramp_factor("warmup", epoch=epoch, num_epochs=240) for epoch in range(240)]
    assert factors[:20] == pytest.approx([(epoch + 1) / 20 for epoch in range(20)])
    assert factors[19:] == [1.0] * 221
    assert [ramp_factor("warmup", epoch=epoch, num_epochs=24) for epoch in range(3)] == [0.5, 1, 1]


def test_ramp_factor_refuses_an_unknown_ramp() -> None:
    with pytest.raises(InputError, match="unknown ramp 'warm_up'; did you mean warmup"):
        ramp_factor("warm_up", epoch=0, num_epochs=4)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="unknown ramp 'up'"):
        Term(objective=Logit(1), ramp="up")  # type: ignore[arg-type]


def test_every_ramp_is_tested() -> None:
    assert set(RAMPS) == set(get_args(Ramp))


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
    assert [loss.item() for loss in losses] == [5.0, 100.0]
    torch.stack(losses).sum().backward()
    assert logits.grad is not None
    assert logits.grad.tolist() == [[10.5, 10.5], [10.5, 10.5]]


def test_update_of_a_stateless_objective_does_nothing() -> None:
    objective: Objective[Any] = Logit(1)
    objective.update(make_step(torch.zeros(1, 2), epoch=0))
    assert not objective.state_dict()


class Seen(Objective[Step]):
    """Keeps the step that it is shown."""

    name = "seen"
    views = ("second",)

    def forward(self, step: Step) -> Tensor:
        self.step = step
        return step.outputs.logits.square().sum()


class SeenConfig(ObjectiveConfig):
    def build(self, task: Task) -> Seen:
        del task
        return Seen()


class LogitsConfig(SeenConfig):
    needs_teacher: ClassVar[bool] = True
    standardizable: ClassVar[bool] = True


TASK = Task(num_examples=4, num_classes=3)


def _logits(seed: int) -> Outputs:
    values = torch.randn(2, 3, generator=torch.Generator().manual_seed(seed))
    return Outputs(logits=values, features={"pooled": values + 1})


def _distill_step() -> DistillStep:
    step = make_step(torch.zeros(2, 3), epoch=1)
    facts = {name: getattr(step, name) for name in Step.__dataclass_fields__}
    return DistillStep(
        **facts | {"outputs": _logits(0), "views": {"second": _logits(1)}},
        teacher=_logits(2), teacher_views={"second": _logits(3)},
    )  # fmt: skip


def test_a_standardizing_term_shows_standardized_logits_of_all_outputs() -> None:
    step, term = _distill_step(), Term(objective=Seen(), standardize=True, weight=2.0)
    loss = term.weighted_loss(step)
    seen = term.objective.step  # type: ignore[attr-defined]
    pairs = [
        (seen.outputs, step.outputs), (seen.views["second"], step.views["second"]),
        (seen.teacher, step.teacher), (seen.teacher_views["second"], step.teacher_views["second"]),
    ]  # fmt: skip
    for shown, given in pairs:
        assert torch.equal(shown.logits, standardized_logits(given.logits))
        assert shown.features is given.features
    assert loss.item() == pytest.approx(2 * standardized_logits(step.outputs.logits).square().sum().item())
    assert (seen.epoch, seen.labels) == (step.epoch, step.labels)


def test_a_standardizing_term_takes_a_step_without_a_teacher() -> None:
    step = replace(make_step(torch.zeros(2, 3), epoch=0), outputs=_logits(0))
    term = Term(objective=Seen(), standardize=True)
    term.weighted_loss(step)
    assert torch.equal(term.objective.step.outputs.logits, standardized_logits(step.outputs.logits))  # type: ignore[attr-defined]


def test_other_terms_show_the_step_itself() -> None:
    step, term = _distill_step(), Term(objective=Seen())
    term.weighted_loss(step)
    assert term.objective.step is step  # type: ignore[attr-defined]


def test_a_term_has_its_settings() -> None:
    term = LogitsConfig(weight=2.5, ramp="warmup", standardize=True).term(TASK)
    assert (term.weight, term.ramp, term.standardize, term.distils) == (2.5, "warmup", True, True)
    plain = SeenConfig().term(TASK)
    assert (plain.weight, plain.ramp, plain.standardize, plain.distils) == (1.0, "constant", False, False)


def test_only_terms_that_compare_logits_can_standardize() -> None:
    with pytest.raises(ValidationError, match="standardize is for terms on the logits of both networks"):
        SeenConfig(standardize=True)
    with pytest.raises(ValidationError):
        LogitsConfig.model_validate({"stage": "before"})
