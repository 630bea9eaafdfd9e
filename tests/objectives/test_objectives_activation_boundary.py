from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from soteacher.errors import InputError
from soteacher.objectives.connectors import MapConnector
from soteacher.objectives.student.activation_boundary import (
    METHOD,
    ActivationBoundaryConfig,
    activation_boundary_distance,
)


def maps(*shapes: tuple[int, ...], seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(2, *shape, generator=generator, dtype=torch.float64) for shape in shapes]


def test_activation_boundary_distance_by_hand() -> None:
    student = torch.tensor([-3.0, -0.5, 0.5, 3.0, -0.5, 3.0]).reshape(1, 6, 1, 1)
    teacher = torch.tensor([-1.0, -1.0, 0.0, -9.0, 0.2, 0.2]).reshape(1, 6, 1, 1)
    expected = (0 + 0.5**2 + 1.5**2 + 4.0**2 + 1.5**2 + 0) * 3 / 1000
    found = activation_boundary_distance([student], [teacher], margin=1.0)
    torch.testing.assert_close(found, torch.tensor([expected]))


def test_activation_boundary_distance_equals_released_code(golden: Callable[[str], dict[str, Tensor]]) -> None:
    given = golden("activation_boundary")
    students = [given[f"student_stage{number}"].requires_grad_() for number in (1, 2, 3)]
    teachers = [given[f"teacher_stage{number}"] for number in (1, 2, 3)]
    value = activation_boundary_distance(students, teachers, margin=1.0).mean()
    torch.testing.assert_close(value, given["value"], rtol=1e-5, atol=0)
    value.backward()
    for number, student in enumerate(students, start=1):
        wanted = given[f"grad_student_stage{number}"]
        assert student.grad is not None
        assert (student.grad - wanted).norm() / wanted.norm() < 1e-4


def test_activation_boundary_distance_equals_a_loop_in_numpy() -> None:
    student, teacher = maps((2, 2, 2), (3, 1, 1)), maps((2, 2, 2), (3, 1, 1), seed=1)
    expected = np.zeros(2)
    for stage, weight in ((0, 0.5), (1, 1.0)):
        for example in range(2):
            own, wanted = student[stage][example].numpy().ravel(), teacher[stage][example].numpy().ravel()
            for value, goal in zip(own, wanted, strict=True):
                side = 1 if goal > 0 else -1
                expected[example] += weight * 3 / 1000 * max(0.0, 0.7 - side * value) ** 2
    np.testing.assert_allclose(activation_boundary_distance(student, teacher, margin=0.7).numpy(), expected)


def test_activation_boundary_distance_reads_the_teachers_signs_only() -> None:
    student, teacher = maps((2, 3, 3)), maps((2, 3, 3), seed=1)
    found = activation_boundary_distance(student, teacher, margin=1.0)
    torch.testing.assert_close(activation_boundary_distance(student, [teacher[0] * 50], margin=1.0), found)
    decided = activation_boundary_distance([teacher[0].sign() * 1.5], teacher, margin=1.0)
    torch.testing.assert_close(decided, torch.zeros(2, dtype=torch.float64))


def test_activation_boundary_distance_gradient_reaches_the_student_only() -> None:
    (student,), (teacher,) = maps((2, 2, 2)), maps((2, 2, 2), seed=1)
    student.requires_grad_()
    teacher.requires_grad_()
    assert torch.autograd.gradcheck(lambda s: activation_boundary_distance([s], [teacher], margin=1.0), student)
    activation_boundary_distance([student], [teacher], margin=1.0).sum().backward()
    assert teacher.grad is None


def test_activation_boundary_distance_refuses_what_does_not_fit() -> None:
    with pytest.raises(InputError, match="one shape, got \\[1, 2, 3, 3\\] and \\[1, 3, 3, 3\\]"):
        activation_boundary_distance([torch.zeros(1, 2, 3, 3)], [torch.zeros(1, 3, 3, 3)], margin=1.0)
    with pytest.raises(InputError, match="at least one: got 0 and 0"):
        activation_boundary_distance([], [], margin=1.0)
    with pytest.raises(InputError, match="margin must be positive and finite, got 0"):
        activation_boundary_distance(maps((1, 1, 1)), maps((1, 1, 1)), margin=0.0)


@pytest.mark.parametrize("name", ["same family", "other family", "transformer teacher", "transformer student"])
@pytest.mark.parametrize("batch", [8, 1])
def test_objective_works_with_real_networks(name: str, batch: int, make_pair: Callable[[str], Any]) -> None:
    pair = make_pair(name)
    torch.manual_seed(0)
    objective = ActivationBoundaryConfig().build(pair.task)
    step = pair.step(objective, batch=batch)
    loss = objective(step)
    assert loss.dtype == torch.float32
    assert loss > 0
    loss.backward()
    gradients = [p.grad for p in [*pair.student.parameters(), *objective.parameters()] if p.grad is not None]
    assert all(gradient.isfinite().all() for gradient in gradients)
    assert sum(gradient.abs().sum() for gradient in gradients) > 0
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(objective(step), loss)


def test_objective_reads_pre_activations_and_bridges_other_shapes_only(make_pair: Callable[[str], Any]) -> None:
    pair = make_pair("wider teacher")
    objective = ActivationBoundaryConfig().build(pair.task)
    assert objective.features == ("preactivation1", "preactivation2", "preactivation3") == objective.teacher_features
    assert all(isinstance(connector, MapConnector) for connector in objective.connectors)
    alike = type(pair.task)(num_examples=24, num_classes=5, network=pair.task.teacher, teacher=pair.task.teacher)
    assert all(isinstance(connector, nn.Identity) for connector in ActivationBoundaryConfig().build(alike).connectors)


def test_method_prepares_the_student_by_this_loss_alone() -> None:
    assert METHOD.terms == {"cross_entropy": {}, "activation_boundary": {"weight": 1.0, "stage": "preparation"}}
    assert ActivationBoundaryConfig.prepares_alone
