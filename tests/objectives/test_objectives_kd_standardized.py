from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from soteacher.objectives.student.kd import KDConfig
from soteacher.objectives.student.kd_standardized import METHOD
from soteacher.types import DistillStep, Outputs, Task


def _step(student: Tensor, teacher: Tensor) -> DistillStep:
    labels = torch.zeros(len(student), dtype=torch.int64)
    return DistillStep(
        images=torch.zeros(len(student), 1, 1, 1), labels=labels, indices=labels, model=nn.Identity(),
        outputs=Outputs(logits=student, features={}), epoch=0, num_epochs=4, progress=0.0,
        teacher=Outputs(logits=teacher, features={}),
    )  # fmt: skip


def test_the_term_equals_released_code(golden: Callable[[str], dict[str, Tensor]], task: Task) -> None:
    given = golden("kd_standardized")
    student = given["student_logits"].requires_grad_()
    term = KDConfig(temperature=float(given["temperature"]), standardize=True).term(task)
    value = term.weighted_loss(_step(student, given["teacher_logits"]))
    torch.testing.assert_close(value, given["value"], rtol=1e-5, atol=0)
    value.backward()
    assert student.grad is not None
    error = (student.grad - given["grad_student_logits"]).norm() / given["grad_student_logits"].norm()
    assert error < 1e-4


def test_the_term_ignores_the_size_of_either_sides_logits(
    golden: Callable[[str], dict[str, Tensor]], task: Task
) -> None:
    given = golden("kd_standardized")
    student, teacher = given["student_logits"], given["teacher_logits"]
    term = KDConfig(standardize=True).term(task)
    value = term.weighted_loss(_step(student, teacher))
    torch.testing.assert_close(term.weighted_loss(_step(3 * student - 1, teacher / 4 + 2)), value, rtol=1e-4, atol=0)
    assert term.weighted_loss(_step(5 * teacher + 1, teacher)).item() == pytest.approx(0, abs=1e-5)


def test_the_method_has_the_published_settings() -> None:
    assert METHOD.name == "kd_standardized"
    assert METHOD.terms == {
        "cross_entropy": {"weight": 0.1},
        "kd": {"weight": 9.0, "temperature": 2.0, "standardize": True},
    }
    assert KDConfig.model_validate(METHOD.terms["kd"]).standardize
