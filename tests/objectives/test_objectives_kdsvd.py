"""Singular vectors of maps and their relations."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from soteacher.errors import InputError
from soteacher.objectives.student.kdsvd import (
    KDSVDConfig,
    aligned_vectors,
    singular_vector_distance,
    singular_vectors,
)
from soteacher.types import NetworkFacts, Task


def maps(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def distance_in_numpy(students: list[Tensor], teachers: list[Tensor], num_vectors: int) -> np.ndarray:
    """Compute the distance example by example with NumPy's own decomposition of the maps themselves."""
    result = np.zeros(len(students[0]))
    for example in range(len(result)):
        sides: list[tuple[np.ndarray, np.ndarray]] = []
        for student, teacher in zip(students, teachers, strict=True):
            candidates = np.linalg.svd(student[example].flatten(1).numpy().T)[2][: num_vectors + 3]
            _, values, vectors = np.linalg.svd(teacher[example].flatten(1).numpy().T)
            vectors = np.array([vector * np.sign(vector[np.abs(vector).argmax()]) for vector in vectors])
            weights = values[:num_vectors] / np.linalg.norm(values[:num_vectors])
            chosen = [candidates[np.abs(candidates @ vector).argmax()] for vector in vectors[:num_vectors]]
            signed = [c * np.sign(c @ vector) for c, vector in zip(chosen, vectors, strict=False)]
            sides.append((np.array(signed).T * weights, vectors[:num_vectors].T * weights))
        for lower, upper in pairwise(sides):
            relations = [np.exp(-((low[:, None] - up[None]) ** 2) / 8) for low, up in zip(lower, upper, strict=True)]
            result[example] += ((relations[0] - relations[1]) ** 2).sum()
    return result


@pytest.mark.parametrize("shape", [(2, 5, 4, 4), (2, 20, 3, 3)], ids=["more pixels", "more channels"])
def test_singular_vectors_equal_numpy(shape: tuple[int, ...]) -> None:
    given = maps(0, *shape)
    values, vectors = singular_vectors(given, num_vectors=3)
    _, wanted, right = np.linalg.svd(given.flatten(2).mT.numpy())
    torch.testing.assert_close(values, torch.from_numpy(wanted[:, :3]))
    torch.testing.assert_close(vectors.abs(), torch.from_numpy(right[:, :3]).mT.abs())
    torch.testing.assert_close(vectors.amax(dim=1), vectors.abs().amax(dim=1))


@pytest.mark.parametrize("shape", [(2, 3, 2, 3), (2, 7, 1, 4)], ids=["more pixels", "more channels"])
def test_singular_vectors_have_the_gradient_of_the_decomposition(shape: tuple[int, ...]) -> None:
    given = maps(1, *shape).requires_grad_()

    def projector(x: Tensor) -> Tensor:  # free of the sign
        _, vectors = singular_vectors(x, num_vectors=2)
        return vectors[:, :, None] * vectors[:, None]

    # The bound on the gradient changes it by the square of 1e-4 of the largest eigenvalue over the gap.
    assert torch.autograd.gradcheck(projector, given, atol=1e-5, rtol=1e-3)


@pytest.mark.parametrize("value", [0.0, 2.0])
@pytest.mark.parametrize("shape", [(2, 3, 4, 4), (2, 8, 2, 2)], ids=["more pixels", "more channels"])
def test_degenerate_maps_give_bounded_gradients(shape: tuple[int, ...], value: float) -> None:
    given = torch.full(shape, value).requires_grad_()
    _, vectors = singular_vectors(given, num_vectors=2)
    (gradient,) = torch.autograd.grad((vectors * torch.randn(vectors.shape)).sum(), given)
    assert vectors.isfinite().all()
    assert gradient.isfinite().all()


def test_maps_that_are_not_finite_show_in_the_value() -> None:
    given = torch.randn(2, 3, 4, 4)
    given[0, 0, 0, 0] = float("nan")
    other = torch.randn(2, 3, 4, 4)
    assert singular_vector_distance([given, other], [other, other], num_vectors=1).isnan().tolist() == [True, False]
    assert singular_vector_distance([other, other], [given, other], num_vectors=1).isnan().tolist() == [True, False]


def test_aligned_vectors_choose_the_nearest_with_its_sign() -> None:
    student = torch.eye(3)[None]
    teacher = torch.tensor([[[0.1, -0.9], [-0.8, 0.1], [0.2, 0.2]]])
    expected = torch.tensor([[[0.0, -1.0], [-1.0, 0.0], [0.0, 0.0]]])
    torch.testing.assert_close(aligned_vectors(student, teacher), expected)
    with pytest.raises(InputError, match=r"\[B, C, n\] with one B and C, got \[1, 3, 3\] \(student\) and \[1, 2, 2\]"):
        aligned_vectors(student, torch.zeros(1, 2, 2))


@pytest.mark.parametrize("num_vectors", [1, 3])
def test_singular_vector_distance_equals_numpy(num_vectors: int) -> None:
    students = [maps(0, 2, 6, 4, 4), maps(1, 2, 8, 3, 3), maps(2, 2, 12, 3, 3)]
    teachers = [maps(3, 2, 6, 3, 3), maps(4, 2, 8, 4, 4), maps(5, 2, 12, 2, 5)]
    found = singular_vector_distance(students, teachers, num_vectors=num_vectors)
    torch.testing.assert_close(found, torch.from_numpy(distance_in_numpy(students, teachers, num_vectors)))


def test_singular_vector_distance_is_zero_at_agreement_and_ignores_factors_and_pixels() -> None:
    students, teachers = [maps(0, 2, 6, 4, 4), maps(1, 2, 9, 2, 2)], [maps(2, 2, 6, 4, 4), maps(3, 2, 9, 2, 2)]
    expected = singular_vector_distance(students, teachers, num_vectors=1)
    changed = [-5 * students[0].flip(2), students[1].mT]
    torch.testing.assert_close(singular_vector_distance(changed, teachers, num_vectors=1), expected)
    zero = singular_vector_distance(students, [2 * value for value in students], num_vectors=2)
    torch.testing.assert_close(zero, torch.zeros(2, dtype=torch.float64), rtol=0, atol=1e-12)


def test_singular_vector_distance_trains_the_student_only() -> None:
    students, teachers = [maps(0, 1, 3, 2, 3), maps(1, 1, 5, 2, 2)], [maps(2, 1, 3, 2, 3), maps(3, 1, 5, 2, 2)]
    inputs = tuple(value.requires_grad_() for value in students)
    constants = [value.requires_grad_() for value in teachers]
    assert torch.autograd.gradcheck(
        lambda *s: singular_vector_distance(s, [value.detach() for value in teachers], num_vectors=1),
        inputs,
        atol=1e-5,
        rtol=1e-3,
    )
    singular_vector_distance(students, constants, num_vectors=1).sum().backward()
    assert all(value.grad is None for value in constants)


def test_fewer_vectors_are_compared_where_maps_have_fewer() -> None:
    students, teachers = [maps(0, 2, 6, 4, 4), maps(1, 2, 9, 1, 1)], [maps(2, 2, 6, 4, 4), maps(3, 2, 9, 1, 1)]
    one = singular_vector_distance(students, teachers, num_vectors=1)
    torch.testing.assert_close(singular_vector_distance(students, teachers, num_vectors=4), one)


def test_singular_vectors_refuse_what_is_not_there() -> None:
    with pytest.raises(InputError, match=r"with 4 or more of C and H \* W, got \[2, 3, 4, 4\]"):
        singular_vectors(torch.zeros(2, 3, 4, 4), num_vectors=4)
    with pytest.raises(InputError, match=r"got \[2, 3\]"):
        singular_vectors(torch.zeros(2, 3), num_vectors=1)


def test_singular_vector_distance_refuses_other_layers() -> None:
    one, other = torch.zeros(2, 3, 4, 4), torch.zeros(2, 5, 4, 4)
    with pytest.raises(InputError, match=r"same \[B, C\] are wanted, got 1, \[\[2, 3\], \[2, 3\]\] \(student\)"):
        singular_vector_distance([one, one], [one, other], num_vectors=1)
    with pytest.raises(InputError, match="two or more layers"):
        singular_vector_distance([one], [one], num_vectors=1)
    with pytest.raises(InputError, match="num_vectors of 1 or more"):
        singular_vector_distance([one, other], [one, other], num_vectors=0)


def test_kdsvd_refuses_other_widths_and_a_single_layer() -> None:
    student = NetworkFacts(name="student a", taps={"stage1": (3, 4, 4), "stage2": (5, 2, 2)}, num_logits=5)
    teacher = NetworkFacts(name="teacher b", taps={"stage1": (3, 4, 4), "stage2": (9, 2, 2)}, num_logits=5)
    task = Task(num_examples=4, num_classes=5, network=student, teacher=teacher)
    with pytest.raises(InputError, match=r"kdsvd: tap 'stage2' of student a is \[5, 2, 2\] and .* equal channels"):
        KDSVDConfig().build(task)
    with pytest.raises(InputError, match="two or more taps of equal channels"):
        KDSVDConfig(student_taps=("stage1",), teacher_taps=("stage1",)).build(task)
    with pytest.raises(ValidationError):
        KDSVDConfig(num_vectors=0)
