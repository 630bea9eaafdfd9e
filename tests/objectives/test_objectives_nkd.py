from collections.abc import Callable

import numpy as np
import pytest
import torch
from scipy.special import log_softmax, softmax
from torch import Tensor

from soteacher.errors import InputError
from soteacher.objectives.student.nkd import METHOD, NKDConfig, nkd_cross_entropy

Logits = tuple[Tensor, Tensor, Tensor]


@pytest.fixture
def logits() -> Logits:
    torch.manual_seed(0)
    return 3 * torch.randn(4, 6, dtype=torch.float64), 3 * torch.randn(4, 6, dtype=torch.float64), torch.arange(4) + 1


@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_nkd_cross_entropy_equals_numpy(logits: Logits, temperature: float) -> None:
    expected = []
    for z_s, z_t, y in zip(logits[0].numpy(), logits[1].numpy(), logits[2].tolist(), strict=True):
        target = -softmax(z_t)[y] * log_softmax(z_s)[y]
        others = -(softmax(np.delete(z_t, y) / temperature) * log_softmax(np.delete(z_s, y) / temperature)).sum()
        expected.append(target + 2.5 * temperature**2 * others)
    found = nkd_cross_entropy(*logits, temperature=temperature, non_target_weight=2.5)
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64))


def test_nkd_cross_entropy_by_hand() -> None:
    found = nkd_cross_entropy(
        torch.zeros(1, 3), torch.zeros(1, 3), torch.tensor([2]), temperature=1.0, non_target_weight=1.5
    )
    torch.testing.assert_close(found, torch.tensor([np.log(3) / 3 + 1.5 * np.log(2)]).float())


def test_nkd_cross_entropy_equals_released_code(golden: Callable[[str], dict[str, Tensor]]) -> None:
    given = golden("nkd")
    student = given["student_logits"].requires_grad_()
    numbers = {"temperature": float(given["temperature"]), "non_target_weight": float(given["gamma"])}
    value = nkd_cross_entropy(student, given["teacher_logits"], given["labels"], **numbers).mean()
    torch.testing.assert_close(value, given["value"], rtol=1e-5, atol=0)
    value.backward()
    assert student.grad is not None
    assert (student.grad - given["grad_student_logits"]).norm() < 1e-4 * given["grad_student_logits"].norm()


def test_the_others_are_lowest_where_they_agree(logits: Logits) -> None:
    _, teacher, labels = logits
    student = teacher.clone().requires_grad_()
    nkd_cross_entropy(student, teacher, labels, temperature=2.0, non_target_weight=1e6).sum().backward()
    assert student.grad is not None
    pull = student.grad[torch.arange(4), labels]  # of the label, which alone is left
    torch.testing.assert_close(student.grad.sum(dim=1), torch.zeros(4, dtype=torch.float64), rtol=0, atol=1e-8)
    assert (pull < 0).all()
    assert (pull > -1).all()


def test_nkd_cross_entropy_gradient_reaches_the_student_only(logits: Logits) -> None:
    student, teacher, labels = logits
    student.requires_grad_(), teacher.requires_grad_()
    numbers = {"temperature": 2.0, "non_target_weight": 1.5}
    assert torch.autograd.gradcheck(lambda z: nkd_cross_entropy(z, teacher, labels, **numbers), student)
    nkd_cross_entropy(student, teacher, labels, **numbers).sum().backward()
    assert teacher.grad is None


def test_nkd_refuses_what_it_cannot_use(logits: Logits) -> None:
    student, teacher, labels = logits
    with pytest.raises(InputError, match=r"labels must be integer class ids \[4\], got \[3\] of torch.int64"):
        nkd_cross_entropy(student, teacher, labels[1:], temperature=1.0, non_target_weight=1.5)
    with pytest.raises(InputError, match="temperature must be positive and finite, got nan"):
        nkd_cross_entropy(student, teacher, labels, temperature=float("nan"), non_target_weight=1.5)
    with pytest.raises(InputError, match="non_target_weight must be positive and finite, got 0"):
        nkd_cross_entropy(student, teacher, labels, temperature=1.0, non_target_weight=0.0)


def test_the_method_has_the_published_settings() -> None:
    assert METHOD.terms["cross_entropy"] == {"weight": 1.0}
    assert NKDConfig(**METHOD.terms["nkd"]) == NKDConfig(weight=1.0, temperature=1.0, non_target_weight=1.5)
