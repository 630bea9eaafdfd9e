from collections.abc import Callable

import numpy as np
import pytest
import torch
from scipy.special import rel_entr, softmax
from torch import Tensor

from soteacher.errors import InputError
from soteacher.functional import kd_divergence


@pytest.fixture
def logits() -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    return torch.randn(4, 6, dtype=torch.float64), torch.randn(4, 6, dtype=torch.float64)


def test_kd_divergence_by_hand() -> None:
    student, teacher = torch.tensor([[0.0, 0.0]]), torch.tensor([[2 * np.log(3.0), 0.0]]).float()
    expected = 4 * (0.75 * np.log(1.5) + 0.25 * np.log(0.5))  # softened teacher (3/4, 1/4), student (1/2, 1/2)
    torch.testing.assert_close(kd_divergence(student, teacher, temperature=2.0), torch.tensor([expected]).float())


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
def test_kd_divergence_equals_scipy(logits: tuple[Tensor, Tensor], temperature: float) -> None:
    student, teacher = (softmax(z.numpy() / temperature, axis=1) for z in logits)
    expected = temperature**2 * rel_entr(teacher, student).sum(axis=1)
    torch.testing.assert_close(kd_divergence(*logits, temperature=temperature), torch.from_numpy(expected))


def test_kd_divergence_equals_released_code(golden: Callable[[str], dict[str, Tensor]]) -> None:
    given = golden("kd")
    student = given["student_logits"].requires_grad_()
    value = kd_divergence(student, given["teacher_logits"], temperature=float(given["temperature"])).mean()
    torch.testing.assert_close(value, given["value"], rtol=1e-5, atol=0)
    value.backward()
    assert student.grad is not None
    error = (student.grad - given["grad_student_logits"]).norm() / given["grad_student_logits"].norm()
    assert error < 1e-4


def test_kd_divergence_is_zero_at_agreement_and_ignores_shifts(logits: tuple[Tensor, Tensor]) -> None:
    student, teacher = logits
    torch.testing.assert_close(
        kd_divergence(student, student + 3, temperature=4.0), torch.zeros(4, dtype=torch.float64)
    )
    torch.testing.assert_close(
        kd_divergence(student + 2, teacher - 5, temperature=4.0), kd_divergence(student, teacher, temperature=4.0)
    )


def test_kd_divergence_gradient_reaches_the_student_only(logits: tuple[Tensor, Tensor]) -> None:
    student, teacher = (z.requires_grad_() for z in logits)
    assert torch.autograd.gradcheck(lambda z: kd_divergence(z, teacher.detach(), temperature=3.0), student)
    kd_divergence(student, teacher, temperature=3.0).sum().backward()
    assert teacher.grad is None


@pytest.mark.parametrize("temperature", [0.0, -1.0, float("nan"), float("inf")])
def test_kd_divergence_refuses_a_temperature(logits: tuple[Tensor, Tensor], temperature: float) -> None:
    with pytest.raises(InputError, match=f"temperature must be positive and finite, got {temperature}"):
        kd_divergence(*logits, temperature=temperature)


def test_kd_divergence_refuses_other_classes() -> None:
    with pytest.raises(InputError, match=r"got \[2, 10\] \(student\) and \[2, 100\] \(teacher\)"):
        kd_divergence(torch.zeros(2, 10), torch.zeros(2, 100), temperature=4.0)
    with pytest.raises(InputError, match="one shape"):
        kd_divergence(torch.zeros(10), torch.zeros(10), temperature=4.0)
