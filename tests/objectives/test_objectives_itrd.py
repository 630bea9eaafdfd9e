from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from soteacher.errors import InputError
from soteacher.objectives.student.itrd import METHOD, ITRDConfig, correlation_gap, mutual_information_gap
from soteacher.types import DistillStep, NetworkFacts, Task


@pytest.fixture
def vectors() -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    return torch.randn(6, 4, dtype=torch.float64), torch.randn(6, 4, dtype=torch.float64)


@pytest.mark.parametrize("order", [1.01, 1.5])
def test_correlation_gap_equals_numpy(vectors: tuple[Tensor, Tensor], order: float) -> None:
    student, teacher = (x.numpy() for x in vectors)
    matrix = np.corrcoef(student.T, teacher.T)[:4, 4:]
    correlation = np.diag(matrix) * 5 / 6  # sample deviations, mean over the batch
    expected = np.log2((np.abs(correlation - 1) ** (2 * order)).sum())
    torch.testing.assert_close(correlation_gap(*vectors, order=order), torch.tensor(expected), rtol=1e-6, atol=0)


def test_correlation_gap_of_perfect_and_of_no_correlation(vectors: tuple[Tensor, Tensor]) -> None:
    student = vectors[0]
    perfect = correlation_gap(3 * student + 7, student, order=1.0)
    torch.testing.assert_close(perfect, torch.tensor(4 / 36.0).double().log2(), rtol=1e-6, atol=0)  # 1 - 5/6 each
    none = correlation_gap(torch.ones(6, 4), torch.randn(6, 4), order=1.01)
    torch.testing.assert_close(none, torch.tensor(2.0))


def test_mutual_information_gap_equals_numpy(vectors: tuple[Tensor, Tensor]) -> None:
    student, teacher = vectors[0].numpy(), np.random.default_rng(0).standard_normal((6, 3))
    unit = [x / np.linalg.norm(x, axis=1, keepdims=True) for x in (student, teacher)]
    own, other = (x @ x.T for x in unit)
    joint = own * other
    expected = ((own / np.trace(own)) ** 2 - (joint / np.trace(joint)) ** 2).sum()
    found = mutual_information_gap(vectors[0], torch.from_numpy(teacher))
    torch.testing.assert_close(found, torch.tensor(expected))


def test_mutual_information_gap_is_zero_where_the_teacher_tells_nothing_apart(vectors: tuple[Tensor, Tensor]) -> None:
    # All cosines of the teacher are 1, so that the student's geometry is all in common.
    assert mutual_information_gap(vectors[0], torch.ones(6, 2).double()).abs() < 1e-12
    assert mutual_information_gap(*vectors) > 0
    torch.testing.assert_close(mutual_information_gap(2 * vectors[0], vectors[1]), mutual_information_gap(*vectors))


def test_gradients_reach_the_student_only(vectors: tuple[Tensor, Tensor]) -> None:
    student, teacher = (x.requires_grad_() for x in vectors)
    assert torch.autograd.gradcheck(lambda x: correlation_gap(x, teacher.detach(), order=1.01), student)
    assert torch.autograd.gradcheck(lambda x: mutual_information_gap(x, teacher.detach()), student)
    (correlation_gap(student, teacher, order=1.01) + mutual_information_gap(student, teacher)).backward()
    assert teacher.grad is None


def test_functions_refuse_what_does_not_fit() -> None:
    with pytest.raises(InputError, match=r"got \[4, 3\] and \[4, 2\]"):
        correlation_gap(torch.zeros(4, 3), torch.zeros(4, 2), order=1.0)
    with pytest.raises(InputError, match="order must be positive and finite, got -1"):
        correlation_gap(torch.zeros(4, 3), torch.zeros(4, 3), order=-1.0)
    with pytest.raises(InputError, match=r"got \[4, 3\] and \[5, 3\]"):
        mutual_information_gap(torch.zeros(4, 3), torch.zeros(5, 3))


@pytest.mark.parametrize("size", [4, 3])
def test_itrd_is_the_weighted_sum_and_embeds_for_the_geometry_only_where_sizes_differ(
    make_step: Callable[..., DistillStep], size: int
) -> None:
    torch.manual_seed(0)
    task = Task(
        num_examples=9,
        num_classes=3,
        network=NetworkFacts(name="student", taps={"stage1": (size, 2, 2), "pooled": (size,)}, num_logits=3),
        teacher=NetworkFacts(name="teacher", taps={"stage1": (4, 2, 2), "pooled": (4,)}, num_logits=3),
    )
    objective = ITRDConfig(correlation_weight=3.0, information_weight=5.0, order=1.2).build(task)
    student, teacher = torch.randn(4, size), torch.randn(4, 4)
    step = make_step(
        nn.Identity(), logits=torch.randn(4, 3), features={"pooled": student}, teacher_features={"pooled": teacher}
    )
    embedded = objective.embedding(student)
    placed = student if size == 4 else embedded
    expected = 3 * correlation_gap(embedded, teacher, order=1.2) + 5 * mutual_information_gap(placed, teacher)
    torch.testing.assert_close(objective(step), expected)


def test_itrd_has_the_released_settings() -> None:
    config = ITRDConfig()
    assert (config.correlation_weight, config.information_weight, config.order) == (2.0, 1.0, 1.01)
    assert METHOD.terms == {"cross_entropy": {"weight": 1.0}, "itrd": {"weight": 1.0}}
