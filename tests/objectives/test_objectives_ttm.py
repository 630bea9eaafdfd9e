from collections.abc import Callable

import numpy as np
import pytest
import torch
from scipy.special import rel_entr, softmax
from torch import Tensor

from soteacher.errors import InputError
from soteacher.objectives.student import ttm, wttm
from soteacher.objectives.student.kd import kd_divergence
from soteacher.objectives.student.ttm import TTMConfig, ttm_divergence
from soteacher.objectives.student.wttm import WTTMConfig, wttm_divergence

FUNCTIONS = {"ttm": ttm_divergence, "wttm": wttm_divergence}


@pytest.fixture
def logits() -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    return 3 * torch.randn(4, 6, dtype=torch.float64), 3 * torch.randn(4, 6, dtype=torch.float64)


@pytest.mark.parametrize("exponent", [0.2, 1.0, 3.0])
def test_the_divergences_equal_scipy(logits: tuple[Tensor, Tensor], exponent: float) -> None:
    student, teacher = (softmax(z.numpy(), axis=1) for z in logits)
    powers = teacher**exponent
    sums = powers.sum(axis=1, keepdims=True)
    expected = rel_entr(powers / sums, student).sum(axis=1)
    torch.testing.assert_close(ttm_divergence(*logits, exponent=exponent), torch.from_numpy(expected))
    torch.testing.assert_close(wttm_divergence(*logits, exponent=exponent), torch.from_numpy(sums[:, 0] * expected))


def test_the_divergences_by_hand() -> None:
    teacher = torch.tensor([[np.log(16.0), 0.0]]).float()  # (16/17, 1/17); its square roots 4/5 and 1/5 of their sum
    expected = 0.8 * np.log(1.6) + 0.2 * np.log(0.4)
    student = torch.zeros(1, 2)
    torch.testing.assert_close(ttm_divergence(student, teacher, exponent=0.5), torch.tensor([expected]).float())
    torch.testing.assert_close(
        wttm_divergence(student, teacher, exponent=0.5), torch.tensor([5 / np.sqrt(17) * expected]).float()
    )


@pytest.mark.parametrize("name", FUNCTIONS)
def test_the_divergences_equal_released_code(name: str, golden: Callable[[str], dict[str, Tensor]]) -> None:
    given = golden(name)
    student = given["student_logits"].requires_grad_()
    value = FUNCTIONS[name](student, given["teacher_logits"], exponent=float(given["exponent"])).mean()
    torch.testing.assert_close(value, given["value"], rtol=1e-5, atol=0)
    value.backward()
    assert student.grad is not None
    assert (student.grad - given["grad_student_logits"]).norm() < 1e-4 * given["grad_student_logits"].norm()


def test_at_exponent_one_both_are_distillation_at_temperature_one(logits: tuple[Tensor, Tensor]) -> None:
    expected = kd_divergence(*logits, temperature=1.0)
    torch.testing.assert_close(ttm_divergence(*logits, exponent=1.0), expected)
    torch.testing.assert_close(wttm_divergence(*logits, exponent=1.0), expected)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_the_divergences_are_zero_where_the_student_is_the_softened_teacher(
    name: str, logits: tuple[Tensor, Tensor]
) -> None:
    teacher = logits[1]
    found = FUNCTIONS[name](0.2 * teacher + 7, teacher, exponent=0.2)
    torch.testing.assert_close(found, torch.zeros(4, dtype=torch.float64))


def test_the_weight_grows_with_the_smoothness_of_the_teacher(logits: tuple[Tensor, Tensor]) -> None:
    student, _ = logits
    for teacher, weight in ((torch.zeros_like(student), 6**0.8), (1e3 * torch.eye(6, dtype=torch.float64)[:4], 1.0)):
        ratio = wttm_divergence(student, teacher, exponent=0.2) / ttm_divergence(student, teacher, exponent=0.2)
        torch.testing.assert_close(ratio, torch.full((4,), weight, dtype=torch.float64))


@pytest.mark.parametrize("name", FUNCTIONS)
def test_gradients_reach_the_student_only(name: str, logits: tuple[Tensor, Tensor]) -> None:
    student, teacher = (z.requires_grad_() for z in logits)
    assert torch.autograd.gradcheck(lambda z: FUNCTIONS[name](z, teacher, exponent=0.2), student)
    FUNCTIONS[name](student, teacher, exponent=0.2).sum().backward()
    assert teacher.grad is None


@pytest.mark.parametrize("name", FUNCTIONS)
def test_the_divergences_refuse_what_they_cannot_use(name: str, logits: tuple[Tensor, Tensor]) -> None:
    student, teacher = logits
    with pytest.raises(InputError, match=r"got \[6\] \(student\) and \[6\] \(teacher\)"):
        FUNCTIONS[name](student[0], teacher[0], exponent=0.2)
    with pytest.raises(InputError, match=r"exponent must be positive and finite, got -0\.1"):
        FUNCTIONS[name](student, teacher, exponent=-0.1)


def test_the_methods_have_the_settings_of_the_authors_examples() -> None:
    assert ttm.METHOD.terms["cross_entropy"] == wttm.METHOD.terms["cross_entropy"] == {"weight": 1.0}
    assert TTMConfig(**ttm.METHOD.terms["ttm"]) == TTMConfig(weight=45.0, exponent=0.1)
    assert WTTMConfig(**wttm.METHOD.terms["wttm"]) == WTTMConfig(weight=4.0, exponent=0.2)
