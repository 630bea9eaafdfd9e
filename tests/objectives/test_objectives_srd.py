import numpy as np
import pytest
import torch
from torch import Tensor

from soteacher.errors import InputError
from soteacher.objectives.student.srd import METHOD, SRDConfig, log_power_distance


@pytest.fixture
def vectors() -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    return torch.randn(6, 4, dtype=torch.float64), torch.randn(6, 4, dtype=torch.float64)


@pytest.mark.parametrize("exponent", [1.0, 4.0])
def test_log_power_distance_equals_numpy(vectors: tuple[Tensor, Tensor], exponent: float) -> None:
    student, teacher = ((x - x.mean(0)) / np.sqrt(x.var(0) + 1e-4) for x in (y.numpy() for y in vectors))
    expected = np.log((np.abs(student - teacher) ** exponent).sum() + 1e-5)
    torch.testing.assert_close(log_power_distance(*vectors, exponent=exponent), torch.tensor(expected))


def test_log_power_distance_is_least_at_agreement(vectors: tuple[Tensor, Tensor]) -> None:
    student = vectors[0]
    found = log_power_distance(student, student, exponent=4.0)
    torch.testing.assert_close(found, torch.tensor(np.log(1e-5)))
    torch.testing.assert_close(
        log_power_distance(student + 5, vectors[1] - 3, exponent=4.0), log_power_distance(*vectors, exponent=4.0)
    )
    assert log_power_distance(*vectors, exponent=4.0) > found


def test_log_power_distance_gradient_reaches_the_student_only(vectors: tuple[Tensor, Tensor]) -> None:
    student, teacher = (x.requires_grad_() for x in vectors)
    assert torch.autograd.gradcheck(lambda x: log_power_distance(x, teacher.detach(), exponent=4.0), student)
    log_power_distance(student, teacher, exponent=4.0).backward()
    assert teacher.grad is None


def test_log_power_distance_refuses_what_does_not_fit() -> None:
    with pytest.raises(InputError, match=r"got \[4, 3\] and \[4, 2\]"):
        log_power_distance(torch.zeros(4, 3), torch.zeros(4, 2), exponent=4.0)
    with pytest.raises(InputError, match=r"exponent must be at least 1 and finite, got 0\.5"):
        log_power_distance(torch.zeros(4, 3), torch.zeros(4, 3), exponent=0.5)


def test_srd_has_the_released_settings() -> None:
    assert SRDConfig().exponent == 4.0
    assert METHOD.terms == {
        "cross_entropy": {"weight": 1.0},
        "kd": {"weight": 1.0, "temperature": 1.0},
        "srd": {"weight": 2.0},
    }
