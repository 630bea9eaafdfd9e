from collections.abc import Callable

import numpy as np
import pytest
import torch
from scipy.special import softmax
from scipy.stats import pearsonr
from torch import Tensor

from soteacher.errors import InputError
from soteacher.objectives.student.dist import (
    METHOD,
    DISTConfig,
    dist_distance,
    inter_class_distance,
    intra_class_distance,
    pearson_distance,
)

NUMBERS = {"temperature": 4.0, "inter_class_weight": 2.0, "intra_class_weight": 1.5}


@pytest.fixture
def logits() -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    return 3 * torch.randn(4, 6, dtype=torch.float64), 3 * torch.randn(4, 6, dtype=torch.float64)


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_the_distances_equal_scipy(logits: tuple[Tensor, Tensor], temperature: float) -> None:
    student, teacher = (softmax(z.numpy() / temperature, axis=1) for z in logits)
    examples = [temperature**2 * (1 - pearsonr(s, t)[0]) for s, t in zip(student, teacher, strict=True)]
    classes = [temperature**2 * (1 - pearsonr(s, t)[0]) for s, t in zip(student.T, teacher.T, strict=True)]
    close = {"rtol": 1e-4, "atol": 0}  # SciPy has no epsilon
    torch.testing.assert_close(
        inter_class_distance(*logits, temperature=temperature), torch.tensor(examples).double(), **close
    )
    torch.testing.assert_close(
        intra_class_distance(*logits, temperature=temperature), torch.tensor(classes).double(), **close
    )
    found = dist_distance(*logits, temperature=temperature, inter_class_weight=2.0, intra_class_weight=0.5)
    torch.testing.assert_close(found, torch.tensor(2 * np.mean(examples) + 0.5 * np.mean(classes)), **close)


def test_dist_distance_equals_released_code(golden: Callable[[str], dict[str, Tensor]]) -> None:
    given = golden("dist")
    student = given["student_logits"].requires_grad_()
    value = dist_distance(student, given["teacher_logits"], **{key: float(given[key]) for key in NUMBERS})
    torch.testing.assert_close(value, given["value"], rtol=1e-5, atol=0)
    value.backward()
    assert student.grad is not None
    assert (student.grad - given["grad_student_logits"]).norm() < 1e-4 * given["grad_student_logits"].norm()


def test_pearson_distance_ignores_shift_and_positive_scale() -> None:
    torch.manual_seed(0)
    rows, others = torch.randn(3, 7, dtype=torch.float64), torch.randn(3, 7, dtype=torch.float64)
    expected = pearson_distance(rows, others)
    torch.testing.assert_close(pearson_distance(5 * rows + 2, others - 3), expected)
    torch.testing.assert_close(pearson_distance(-rows, others), 2 - expected)
    torch.testing.assert_close(pearson_distance(rows, 2 * rows + 1), torch.zeros(3).double(), rtol=0, atol=1e-7)


def test_pearson_distance_of_constant_rows_is_one_without_gradient() -> None:
    torch.manual_seed(0)
    rows = torch.tensor([[0.1] * 7, [0.0] * 7, [1 / 3] * 7], requires_grad=True)
    found = pearson_distance(rows, torch.randn(3, 7))
    found.sum().backward()
    torch.testing.assert_close(found, torch.ones(3), rtol=0, atol=0)
    torch.testing.assert_close(rows.grad, torch.zeros(3, 7), rtol=0, atol=0)


@pytest.mark.parametrize("batch", [1, 3])
def test_constant_logits_give_small_gradients(batch: int) -> None:
    student = torch.full((batch, 10), 0.3, requires_grad=True)
    torch.manual_seed(0)
    dist_distance(student, torch.randn(batch, 10), **NUMBERS).backward()
    assert student.grad is not None
    assert student.grad.isfinite().all()
    assert student.grad.norm() < 100


def test_a_batch_of_one_learns_over_the_classes() -> None:
    torch.manual_seed(0)
    student = torch.randn(1, 5, requires_grad=True)
    teacher = torch.randn(1, 5)
    torch.testing.assert_close(intra_class_distance(student, teacher, temperature=4.0), torch.full((5,), 16.0))
    dist_distance(student, teacher, **NUMBERS).backward()
    assert student.grad is not None
    assert student.grad.norm() > 0


def test_dist_distance_is_zero_at_agreement(logits: tuple[Tensor, Tensor]) -> None:
    student, _ = logits
    found = dist_distance(student, student + 3, **NUMBERS)
    torch.testing.assert_close(found, torch.zeros((), dtype=torch.float64), rtol=0, atol=1e-3)


def test_dist_distance_gradient_reaches_the_student_only(logits: tuple[Tensor, Tensor]) -> None:
    student, teacher = (z.requires_grad_() for z in logits)
    assert torch.autograd.gradcheck(lambda z: dist_distance(z, teacher, **NUMBERS), student)
    dist_distance(student, teacher, **NUMBERS).backward()
    assert teacher.grad is None


def test_dist_refuses_what_it_cannot_use(logits: tuple[Tensor, Tensor]) -> None:
    student, teacher = logits
    for distance in (inter_class_distance, intra_class_distance):
        with pytest.raises(InputError, match=r"one shape \[B, K\], got \[4, 6\] \(student\) and \[3, 6\]"):
            distance(student, teacher[1:], temperature=4.0)
        with pytest.raises(InputError, match="temperature must be positive and finite, got inf"):
            distance(student, teacher, temperature=float("inf"))
    with pytest.raises(InputError, match="intra_class_weight must be positive and finite, got 0"):
        dist_distance(student, teacher, temperature=4.0, inter_class_weight=2.0, intra_class_weight=0.0)


def test_the_method_has_the_published_settings() -> None:
    assert METHOD.terms["cross_entropy"] == {"weight": 1.0}
    assert DISTConfig(**METHOD.terms["dist"]) == DISTConfig(
        weight=1.0, temperature=4.0, inter_class_weight=2.0, intra_class_weight=2.0
    )
