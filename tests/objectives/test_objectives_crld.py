from collections.abc import Callable
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from scipy.special import rel_entr, softmax
from torch import Tensor, nn

from soteacher.errors import InputError
from soteacher.objectives.student.crld import CRLDConfig, cross_view_divergence
from soteacher.types import DistillStep, Outputs, Task

PUBLISHED: dict[str, Any] = {
    "temperature": 4.0, "within_weight": 2.0, "cross_weight": 0.5, "weak_threshold": 0.9, "strong_threshold": 0.2,
}  # fmt: skip


@pytest.fixture
def logits() -> list[Tensor]:
    """Student weak, student strong, teacher weak, teacher strong; the teacher is sure of some."""
    torch.manual_seed(0)
    found = [torch.randn(6, 8, dtype=torch.float64) for _ in range(4)]
    found[2][:3, 0] += 8
    found[3][1:4, 0] += 8
    found[3][4:] *= 0.1
    return found


def reference(logits: list[Tensor]) -> Tensor:
    student, student_strong, teacher, teacher_strong = (z.numpy() for z in logits)

    def divergence(s: Any, t: Any) -> Any:
        return 16 * rel_entr(softmax(t / 4, axis=1), softmax(s / 4, axis=1)).sum(axis=1)

    sure = softmax(teacher, axis=1).max(axis=1) >= 0.9
    sure_strong = softmax(teacher_strong, axis=1).max(axis=1) >= 0.2
    assert sure.tolist() == [True] * 3 + [False] * 3
    assert not sure_strong.all()
    within = (divergence(student, teacher) + divergence(student_strong, teacher_strong)) * sure
    cross = (divergence(student_strong, teacher) + divergence(student, teacher_strong)) * sure_strong
    return torch.from_numpy(2 * within + 0.5 * cross)


def test_cross_view_divergence_equals_scipy(logits: list[Tensor]) -> None:
    torch.testing.assert_close(cross_view_divergence(*logits, **PUBLISHED), reference(logits))


def test_cross_view_divergence_is_zero_at_agreement_or_without_confidence(logits: list[Tensor]) -> None:
    teacher = logits[2]
    none = torch.zeros(6, dtype=torch.float64)
    torch.testing.assert_close(cross_view_divergence(teacher, teacher, teacher, teacher, **PUBLISHED), none)
    unsure = PUBLISHED | {"weak_threshold": 1.0, "strong_threshold": 1.0}
    torch.testing.assert_close(cross_view_divergence(*logits, **unsure), none, rtol=0, atol=0)


def test_cross_view_divergence_gradient_reaches_both_views_of_the_student(logits: list[Tensor]) -> None:
    student, student_strong, teacher, teacher_strong = (z.requires_grad_() for z in logits)

    def value(first: Tensor, second: Tensor) -> Tensor:
        return cross_view_divergence(first, second, teacher.detach(), teacher_strong.detach(), **PUBLISHED)

    assert torch.autograd.gradcheck(value, (student, student_strong))
    cross_view_divergence(student, student_strong, teacher, teacher_strong, **PUBLISHED).sum().backward()
    assert teacher.grad is None
    assert teacher_strong.grad is None


def test_crld_is_the_mean_over_both_views(
    network: nn.Module, make_step: Callable[..., DistillStep], task: Task, logits: list[Tensor]
) -> None:
    student, student_strong, teacher, teacher_strong = (Outputs(logits=z, features={}) for z in logits)
    step = make_step(network, views={"strong": student_strong}, teacher_views={"strong": teacher_strong})
    object.__setattr__(step, "outputs", student)
    object.__setattr__(step, "teacher", teacher)
    objective = CRLDConfig().build(task)
    assert objective.views == ("strong",)
    torch.testing.assert_close(objective(step), reference(logits).mean())


@pytest.mark.parametrize("pair_name", ["same family", "other family", "transformer teacher", "transformer student"])
def test_crld_trains_every_pair(make_pair: Callable[[str], Any], pair_name: str) -> None:
    pair = make_pair(pair_name)
    objective = CRLDConfig(weak_threshold=0.0, strong_threshold=0.0).build(pair.task)  # the teacher is untrained
    step = pair.step(objective)
    loss = objective(step)
    assert loss.isfinite()
    assert loss > 0
    for outputs in (step.outputs, step.views["strong"]):
        assert torch.autograd.grad(loss, outputs.logits, retain_graph=True)[0].abs().sum() > 0


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"within_weight": -1.0}, "weights must be at least 0"),
        ({"strong_threshold": 1.5}, r"thresholds must be in \[0, 1\], got 0.9 \(weak\) and 1.5 \(strong\)"),
        ({"temperature": 0.0}, "temperature must be positive"),
    ],
)
def test_cross_view_divergence_refuses_numbers(logits: list[Tensor], wrong: dict[str, float], message: str) -> None:
    with pytest.raises(InputError, match=message):
        cross_view_divergence(*logits, **(PUBLISHED | wrong))


def test_cross_view_divergence_refuses_other_classes(logits: list[Tensor]) -> None:
    with pytest.raises(InputError, match="one shape"):
        cross_view_divergence(logits[0], logits[1], logits[2], logits[3][:, :3], **PUBLISHED)


@pytest.mark.parametrize("wrong", [{"standardize": True}, {"weak_threshold": 1.1}, {"cross_weight": -0.1}], ids=str)
def test_crld_refuses_settings(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        CRLDConfig.model_validate(wrong)
