from collections.abc import Callable

import numpy as np
import pytest
import torch
from scipy.special import rel_entr, softmax
from torch import Tensor

from soteacher.errors import InputError
from soteacher.objectives.student import dkd, dkd_standardized
from soteacher.objectives.student.dkd import (
    DKDConfig,
    dkd_divergence,
    non_target_class_divergence,
    target_class_divergence,
)
from soteacher.objectives.student.kd import kd_divergence

Logits = tuple[Tensor, Tensor, Tensor]


@pytest.fixture
def logits() -> Logits:
    torch.manual_seed(0)
    return 3 * torch.randn(4, 6, dtype=torch.float64), 3 * torch.randn(4, 6, dtype=torch.float64), torch.arange(4) + 1


def parts_by_hand(logits: Logits, temperature: float) -> tuple[np.ndarray, np.ndarray]:
    """Both divergences from probabilities, example by example."""
    student, teacher = (softmax(z.numpy() / temperature, axis=1) for z in logits[:2])
    target, others = [], []
    for p_s, p_t, y in zip(student, teacher, logits[2].tolist(), strict=True):
        target.append(rel_entr([p_t[y], 1 - p_t[y]], [p_s[y], 1 - p_s[y]]).sum())
        q_s, q_t = np.delete(p_s, y) / (1 - p_s[y]), np.delete(p_t, y) / (1 - p_t[y])
        others.append(rel_entr(q_t, q_s).sum())
    return temperature**2 * np.array(target), temperature**2 * np.array(others)


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_the_parts_equal_scipy(logits: Logits, temperature: float) -> None:
    target, others = parts_by_hand(logits, temperature)
    torch.testing.assert_close(target_class_divergence(*logits, temperature=temperature), torch.from_numpy(target))
    torch.testing.assert_close(non_target_class_divergence(*logits, temperature=temperature), torch.from_numpy(others))
    found = dkd_divergence(*logits, temperature=temperature, target_weight=0.5, non_target_weight=3.0)
    torch.testing.assert_close(found, torch.from_numpy(0.5 * target + 3 * others))


def test_dkd_divergence_by_hand() -> None:
    third = float(np.log(2.0))  # teacher (1/2, 1/4, 1/4), student (1/3, 1/3, 1/3)
    teacher, student = torch.tensor([[third, 0.0, 0.0]]), torch.zeros(1, 3)
    expected = 0.5 * np.log(1.5) + 0.5 * np.log(0.75)  # (1/2, 1/2) from (1/3, 2/3); the others stand alike
    found = dkd_divergence(
        student, teacher, torch.tensor([0]), temperature=1.0, target_weight=1.0, non_target_weight=8.0
    )
    torch.testing.assert_close(found, torch.tensor([expected]).float())


def test_dkd_divergence_equals_released_code(golden: Callable[[str], dict[str, Tensor]]) -> None:
    given = golden("dkd")
    student = given["student_logits"].requires_grad_()
    numbers = {key: float(given[key]) for key in ("temperature", "target_weight", "non_target_weight")}
    value = dkd_divergence(student, given["teacher_logits"], given["labels"], **numbers).mean()
    torch.testing.assert_close(value, given["value"], rtol=1e-5, atol=0)
    value.backward()
    assert student.grad is not None
    assert (student.grad - given["grad_student_logits"]).norm() < 1e-4 * given["grad_student_logits"].norm()


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_the_parts_make_knowledge_distillation(logits: Logits, temperature: float) -> None:
    student, teacher, labels = logits
    rest = 1 - (teacher / temperature).softmax(dim=1)[torch.arange(4), labels]
    torch.testing.assert_close(
        target_class_divergence(*logits, temperature=temperature)
        + rest * non_target_class_divergence(*logits, temperature=temperature),
        kd_divergence(student, teacher, temperature=temperature),
    )


def test_the_parts_see_only_their_own(logits: Logits) -> None:
    student, _, labels = logits
    target = torch.nn.functional.one_hot(labels, 6)
    surer = student + 2.0 * target  # the others among themselves as before
    zeros = torch.zeros(4, dtype=torch.float64)
    torch.testing.assert_close(non_target_class_divergence(surer, student, labels, temperature=4.0), zeros)
    assert (target_class_divergence(surer, student, labels, temperature=4.0) > 0).all()
    turned = student.clone()
    turned[:, [0, 5]] = student[:, [5, 0]]  # neither is a target: as sure of it as before
    torch.testing.assert_close(target_class_divergence(turned, student, labels, temperature=4.0), zeros)
    assert (non_target_class_divergence(turned, student, labels, temperature=4.0) > 0).all()


def test_dkd_divergence_gradient_reaches_the_student_only(logits: Logits) -> None:
    student, teacher, labels = logits
    student.requires_grad_(), teacher.requires_grad_()
    numbers = {"temperature": 3.0, "target_weight": 1.0, "non_target_weight": 8.0}
    assert torch.autograd.gradcheck(lambda z: dkd_divergence(z, teacher, labels, **numbers), student)
    dkd_divergence(student, teacher, labels, **numbers).sum().backward()
    assert teacher.grad is None


def test_a_teacher_that_is_sure_beyond_precision_gives_finite_gradients() -> None:
    student = torch.tensor([[-60.0, 60.0, 0.0], [60.0, -60.0, 0.0]], requires_grad=True)
    value = dkd_divergence(
        student, -student, torch.tensor([0, 0]), temperature=0.5, target_weight=1.0, non_target_weight=8.0
    )
    value.sum().backward()
    assert value.isfinite().all()
    assert student.grad is not None
    assert student.grad.isfinite().all()


def test_dkd_refuses_what_it_cannot_use(logits: Logits) -> None:
    student, teacher, labels = logits
    for part in (target_class_divergence, non_target_class_divergence):
        with pytest.raises(InputError, match=r"got \[4, 6\] \(student\) and \[4, 5\] \(teacher\)"):
            part(student, teacher[:, 1:], labels, temperature=1.0)
        with pytest.raises(InputError, match="temperature must be positive and finite, got 0"):
            part(student, teacher, labels, temperature=0.0)
    with pytest.raises(InputError, match="non_target_weight must be positive and finite, got -1"):
        dkd_divergence(student, teacher, labels, temperature=1.0, target_weight=1.0, non_target_weight=-1.0)


def test_the_methods_have_the_published_settings() -> None:
    assert dkd.METHOD.terms["cross_entropy"] == dkd_standardized.METHOD.terms["cross_entropy"] == {"weight": 1.0}
    plain, standardized = (DKDConfig(**method.METHOD.terms["dkd"]) for method in (dkd, dkd_standardized))
    assert plain == DKDConfig(ramp="warmup", temperature=4.0, target_weight=1.0, non_target_weight=8.0)
    assert standardized == DKDConfig(weight=9.0, ramp="warmup", standardize=True, temperature=2.0)
