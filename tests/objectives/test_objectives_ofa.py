from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from scipy.special import log_softmax, softmax
from torch import Tensor, nn

from soteacher.errors import InputError
from soteacher.objectives.student.ofa import OFAConfig, enhanced_target_cross_entropy
from soteacher.types import NetworkFacts, Task

PAIRS = ["same family", "other family", "transformer teacher", "transformer student"]


@pytest.fixture
def given() -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    student, teacher = torch.randn(4, 6, dtype=torch.float64), torch.randn(4, 6, dtype=torch.float64)
    return student, teacher, torch.tensor([0, 5, 2, 2])


def test_enhanced_target_cross_entropy_equals_released_code(golden: Callable[[str], dict[str, Tensor]]) -> None:
    found = golden("ofa")
    student = found["student_logits"].requires_grad_()
    value = enhanced_target_cross_entropy(
        student,
        found["teacher_logits"],
        found["labels"],
        exponent=float(found["exponent"]),
        temperature=float(found["temperature"]),
    ).mean()
    torch.testing.assert_close(value, found["value"], rtol=1e-5, atol=0)
    value.backward()
    assert student.grad is not None
    wanted = found["grad_student_logits"]
    assert (student.grad - wanted).norm() < 1e-4 * wanted.norm()


@pytest.mark.parametrize("exponent", [0.5, 1.0, 1.5])
def test_enhanced_target_cross_entropy_equals_numpy(given: tuple[Tensor, Tensor, Tensor], exponent: float) -> None:
    student, teacher, labels = (value.numpy() for value in given)
    label = np.eye(6)[labels]
    target = (softmax(teacher / 2, axis=1) + label) ** exponent - label
    expected = -(target * log_softmax(student / 2, axis=1)).sum(axis=1)
    found = enhanced_target_cross_entropy(*given, exponent=exponent, temperature=2.0)
    torch.testing.assert_close(found, torch.from_numpy(expected))


def test_enhanced_target_cross_entropy_has_the_right_gradient(given: tuple[Tensor, Tensor, Tensor]) -> None:
    student, teacher, labels = given
    teacher.requires_grad_()

    def value(logits: Tensor) -> Tensor:
        return enhanced_target_cross_entropy(logits, teacher.detach(), labels, exponent=1.5, temperature=1.0)

    assert torch.autograd.gradcheck(value, student.requires_grad_())
    enhanced_target_cross_entropy(student, teacher, labels, exponent=1.5, temperature=1.0).sum().backward()
    assert teacher.grad is None


@pytest.mark.parametrize("pair_name", PAIRS)
def test_ofa_trains_every_pair_and_its_exits(make_pair: Callable[[str], Any], pair_name: str) -> None:
    pair = make_pair(pair_name)
    torch.manual_seed(0)
    objective = OFAConfig().build(pair.task)
    assert objective.features == tuple(tap for tap in pair.task.network.taps if tap.startswith("stage"))
    assert objective.teacher_features == ()
    step = pair.step(objective)
    loss = objective(step)
    assert loss.isfinite()
    assert loss > 0
    parameters = [*objective.parameters(), *pair.student.parameters()]
    gradients = torch.autograd.grad(loss, parameters, materialize_grads=True)
    assert all(value.isfinite().all() for value in gradients)
    assert all(value.abs().sum() > 0 for value in gradients[: len(list(objective.parameters()))])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(objective(step), loss, rtol=1e-6, atol=0)


def test_ofa_is_the_sum_over_exits_and_the_network(make_pair: Callable[[str], Any]) -> None:
    pair = make_pair("same family")
    torch.manual_seed(0)
    objective = OFAConfig(student_taps=("stage2", "stage3"), exponent=1.2, temperature=3.0).build(pair.task)
    step = pair.step(objective)
    answers = [objective.exits[i](step.outputs.features[tap]) for i, tap in enumerate(("stage2", "stage3"))]
    expected = [
        enhanced_target_cross_entropy(z, step.teacher.logits, step.labels, exponent=1.2, temperature=3.0).mean()
        for z in (*answers, step.outputs.logits)
    ]
    assert len(objective.exits) == 2
    torch.testing.assert_close(objective(step), torch.stack(expected).sum())


def test_ofa_learns_a_fixed_batch_and_a_single_example(make_pair: Callable[[str], Any]) -> None:
    pair = make_pair("same family")
    torch.manual_seed(0)
    objective = OFAConfig().build(pair.task)
    step = pair.step(objective)
    optimizer = torch.optim.SGD(objective.parameters(), lr=0.05)
    before = objective(step)
    before.backward(retain_graph=True)
    optimizer.step()
    assert objective(step) < before
    assert objective(pair.step(objective, batch=1)).isfinite()


def test_ofa_refuses_what_it_cannot_have_exits_on(given: tuple[Tensor, Tensor, Tensor]) -> None:
    bare = Task(num_examples=4, num_classes=6)
    with pytest.raises(InputError, match="need to know the student"):
        OFAConfig().build(bare)
    facts = NetworkFacts(name="student plain", taps={"pooled": (8,)}, num_logits=6)
    with pytest.raises(InputError, match="student plain names no stages; set student_taps"):
        OFAConfig().build(replace(bare, network=facts))
    with pytest.raises(ValidationError):
        OFAConfig(student_taps=())
    for wrong in ({"exponent": 0.0}, {"temperature": -1.0}):
        with pytest.raises(InputError, match="must be positive"):
            enhanced_target_cross_entropy(*given, **({"exponent": 1.5, "temperature": 1.0} | wrong))
    with pytest.raises(InputError, match="one shape"):
        enhanced_target_cross_entropy(given[0], given[1][:, :2], given[2], exponent=1.5, temperature=1.0)


def test_exits_are_halved_as_often_as_there_are_deeper_ones(make_pair: Callable[[str], Any]) -> None:
    objective = OFAConfig().build(make_pair("same family").task)  # stages of 16, 32 and 64 channels

    def shapes(leave: Any) -> list[tuple[int, int, tuple[int, int]]]:
        """Channels in and out of the convolutions over all channels, and the sides that a map of 8 x 8 ends with."""
        convolutions = [m for m in leave.projector.modules() if isinstance(m, nn.Conv2d) and m.groups == 1]
        end = leave.projector(torch.rand(2, convolutions[0].in_channels, 8, 8)).shape
        return [(m.in_channels, m.out_channels, (end[2], end[3])) for m in convolutions]

    assert [shapes(leave) for leave in objective.exits] == [
        [(16, 16, (2, 2)), (16, 32, (2, 2)), (32, 32, (2, 2)), (32, 64, (2, 2))],
        [(32, 32, (4, 4)), (32, 64, (4, 4))],
        [(64, 64, (8, 8))],
    ]
