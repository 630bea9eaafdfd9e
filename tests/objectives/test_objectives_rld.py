from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from scipy.special import rel_entr, softmax
from torch import Tensor, nn

from soteacher.errors import InputError
from soteacher.objectives.student.rld import RLDConfig, masked_correlation_divergence, sample_confidence_divergence
from soteacher.types import DistillStep, Task

FUNCTIONS = [sample_confidence_divergence, masked_correlation_divergence]


@pytest.fixture
def given() -> tuple[Tensor, Tensor, Tensor]:
    """Student, teacher and labels; the label is the teacher's first, last and some other choice."""
    torch.manual_seed(0)
    student, teacher = torch.randn(6, 5, dtype=torch.float64), torch.randn(6, 5, dtype=torch.float64)
    labels = torch.tensor([1, 2, 3, 4, 0, 1])
    labels[0], labels[1] = teacher[0].argmax(), teacher[1].argmin()
    return student, teacher, labels


def test_sample_confidence_divergence_equals_scipy(given: tuple[Tensor, Tensor, Tensor]) -> None:
    student, teacher, labels = given
    p_student, p_teacher = (softmax(z.numpy() / 4, axis=1) for z in (student, teacher))
    of_label, of_choice = p_student[np.arange(6), labels], p_teacher.max(axis=1)
    expected = 16 * (rel_entr(of_choice, of_label) + rel_entr(1 - of_choice, 1 - of_label))
    torch.testing.assert_close(sample_confidence_divergence(*given, temperature=4.0), torch.from_numpy(expected))


def test_masked_correlation_divergence_equals_scipy(given: tuple[Tensor, Tensor, Tensor]) -> None:
    student, teacher, labels = (value.numpy() for value in given)
    expected = []
    for s, t, label in zip(student, teacher, labels, strict=True):
        kept = t < t[label]
        expected.append(16 * rel_entr(softmax(t[kept] / 4), softmax(s[kept] / 4)).sum() if kept.any() else 0.0)
    assert expected[1] == 0.0  # the label is the teacher's last choice: no class is left
    found = masked_correlation_divergence(*given, temperature=4.0)
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64))


def test_masked_correlation_divergence_leaves_ties_out() -> None:
    teacher, labels = torch.tensor([[1.0, 1.0, 0.0, -1.0]]), torch.tensor([0])
    student = torch.tensor([[0.0, 7.0, 0.0, 0.0]])
    without = masked_correlation_divergence(student[:, [0, 2, 3]], teacher[:, [0, 2, 3]], labels, temperature=2.0)
    torch.testing.assert_close(masked_correlation_divergence(student, teacher, labels, temperature=2.0), without)


def test_divergences_at_agreement(given: tuple[Tensor, Tensor, Tensor]) -> None:
    _, teacher, labels = given
    none = torch.zeros(6, dtype=torch.float64)
    torch.testing.assert_close(masked_correlation_divergence(teacher + 3, teacher, labels, temperature=4.0), none)
    choice = teacher.argmax(dim=1)
    torch.testing.assert_close(sample_confidence_divergence(teacher - 2, teacher, choice, temperature=4.0), none)
    wrong = sample_confidence_divergence(teacher, teacher, labels, temperature=4.0)
    assert (wrong[labels != choice] > 0).all()


@pytest.mark.parametrize("divergence", FUNCTIONS)
def test_divergences_have_the_right_gradient(
    divergence: Callable[..., Tensor], given: tuple[Tensor, Tensor, Tensor]
) -> None:
    student, teacher, labels = given
    teacher.requires_grad_()
    assert torch.autograd.gradcheck(
        lambda z: divergence(z, teacher.detach(), labels, temperature=3.0), student.requires_grad_()
    )
    divergence(student, teacher, labels, temperature=3.0).sum().backward()
    assert teacher.grad is None
    extreme = (60.0 * torch.eye(5) * 2 - 60).requires_grad_()
    divergence(extreme, -extreme.detach(), torch.arange(5), temperature=1.0).sum().backward()
    assert extreme.grad is not None
    assert extreme.grad.isfinite().all()


def test_rld_weighs_both_parts(network: nn.Module, make_step: Callable[..., DistillStep], task: Task) -> None:
    step = make_step(network)
    parts = [f(step.outputs.logits, step.teacher.logits, step.labels, temperature=2.0).mean() for f in FUNCTIONS]
    config = RLDConfig(temperature=2.0, confidence_weight=3.0, correlation_weight=0.5)
    torch.testing.assert_close(config.build(task)(step), 3 * parts[0] + 0.5 * parts[1])
    assert config.ramp == "warmup"


@pytest.mark.parametrize("pair_name", ["same family", "other family", "transformer teacher", "transformer student"])
def test_rld_trains_every_pair(make_pair: Callable[[str], Any], pair_name: str) -> None:
    pair = make_pair(pair_name)
    objective = RLDConfig().build(pair.task)
    step = pair.step(objective)
    loss = objective(step)
    assert loss.isfinite()
    assert loss > 0
    assert torch.autograd.grad(loss, step.outputs.logits)[0].abs().sum() > 0


@pytest.mark.parametrize("divergence", FUNCTIONS)
def test_divergences_refuse_impossible_input(
    divergence: Callable[..., Tensor], given: tuple[Tensor, Tensor, Tensor]
) -> None:
    student, teacher, labels = given
    with pytest.raises(InputError, match="temperature must be positive and finite, got 0"):
        divergence(student, teacher, labels, temperature=0.0)
    with pytest.raises(InputError, match="one shape"):
        divergence(student, teacher[:, :3], labels, temperature=1.0)
    with pytest.raises(InputError, match="labels"):
        divergence(student, teacher, labels[:3], temperature=1.0)
