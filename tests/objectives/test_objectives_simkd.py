from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from soteacher.errors import InputError
from soteacher.models.inspection import inspect_network
from soteacher.models.parts import Parts
from soteacher.models.takeover import take_over_classifier
from soteacher.objective import ReusedClassifier
from soteacher.objectives.student.simkd import METHOD, SimKDConfig, projected_distance
from soteacher.types import NetworkFacts, Task

PAIRS = ("same family", "other family", "transformer teacher", "transformer student")


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


@pytest.fixture
def make_reused(make_pair: Callable[..., Any]) -> Callable[[str], Any]:
    """Build a pair whose student ends in the teacher's classifier."""

    def make(name: str) -> Any:
        pair = make_pair(name)
        images = torch.full((2, 3, 32, 32), 0.5)
        torch.manual_seed(0)
        take_over_classifier(pair.student, pair.teacher, images, reduction=2, names=("student", "teacher"))
        facts = inspect_network(pair.student, images, name="student")
        task = Task(num_examples=24, num_classes=5, network=facts, teacher=pair.task.teacher)
        return type(pair)(pair.student, pair.teacher, task)

    return make


def test_value_by_hand() -> None:
    ours, theirs = draw(3, 4, 6, 6), draw(3, 4, 6, 6, seed=1)
    wanted = ((ours.numpy() - theirs.numpy()) ** 2).reshape(3, -1).mean(1)
    np.testing.assert_allclose(projected_distance(ours, theirs), wanted, rtol=1e-5)


def test_larger_maps_are_averaged_down() -> None:
    small, large = draw(2, 4, 3, 3), draw(2, 4, 6, 6, seed=1)
    averaged = large.numpy().reshape(2, 4, 3, 2, 3, 2).mean((3, 5))
    wanted = ((small.numpy() - averaged) ** 2).reshape(2, -1).mean(1)
    np.testing.assert_allclose(projected_distance(small, large), wanted, rtol=1e-5)
    np.testing.assert_allclose(projected_distance(large, small), wanted, rtol=1e-5)


def test_vectors_are_compared_as_they_are() -> None:
    ours, theirs = draw(3, 7), draw(3, 7, seed=1)
    np.testing.assert_allclose(
        projected_distance(ours, theirs), ((ours.numpy() - theirs.numpy()) ** 2).mean(1), rtol=1e-5
    )


def test_zero_at_agreement_and_order_of_the_batch() -> None:
    ours, theirs = draw(3, 4, 5, 5), draw(3, 4, 5, 5, seed=1)
    assert projected_distance(ours, ours).abs().max() == 0
    assert torch.equal(projected_distance(ours.flip(0), theirs.flip(0)), projected_distance(ours, theirs).flip(0))


def test_gradient_is_right_and_the_teacher_is_a_constant() -> None:
    ours, theirs = draw(2, 3, 4, 4, dtype=torch.float64).requires_grad_(), draw(2, 3, 2, 2, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda value: projected_distance(value, theirs), (ours,))
    assert not projected_distance(ours.detach(), theirs.requires_grad_()).requires_grad


@pytest.mark.parametrize("shapes", [((2, 3, 4, 4), (2, 3)), ((2, 3, 4, 4), (2, 4, 4, 4)), ((2, 3), (3, 3))])
def test_features_that_do_not_fit_are_refused(shapes: tuple[tuple[int, ...], tuple[int, ...]]) -> None:
    with pytest.raises(InputError, match=r"wanted two maps \[B, D, H, W\] or two vectors"):
        projected_distance(draw(*shapes[0]), draw(*shapes[1]))


@pytest.mark.parametrize("name", PAIRS)
def test_it_trains_the_student_of_every_pair(name: str, make_reused: Callable[[str], Any]) -> None:
    pair = make_reused(name)
    objective = SimKDConfig().build(pair.task)
    vectors = name.startswith("transformer")
    assert objective.teacher_features == (("pooled",) if vectors else ("maps",))
    step = pair.step(objective)
    loss = objective(step)
    assert loss.isfinite()
    assert loss > 0
    wanted = projected_distance(
        step.outputs.features["projected"], step.teacher.features[objective.teacher_features[0]]
    )
    assert torch.equal(loss, wanted.mean())
    loss.backward()
    trained = {key: value.grad for key, value in pair.student.named_parameters() if value.grad is not None}
    assert all(gradient.isfinite().all() for gradient in trained.values())
    frozen = [value for value in pair.student.parameters() if not value.requires_grad]
    assert len(frozen) == 2
    assert frozen[0] is Parts(pair.student).classifier.weight
    assert any("projector" in key for key in trained)
    assert max(trained[key].abs().max().item() for key in trained if "projector" not in key) > 0


def test_full_agreement_gives_the_teachers_logits(make_reused: Callable[[str], Any]) -> None:
    pair = make_reused("same family")
    step = pair.step(SimKDConfig().build(pair.task))
    pooled = step.teacher.features["maps"].mean((2, 3))
    torch.testing.assert_close(Parts(pair.student).classifier(pooled), step.teacher.logits)


def test_two_steps_lower_the_loss(make_reused: Callable[[str], Any]) -> None:
    pair = make_reused("same family")
    objective = SimKDConfig().build(pair.task)
    optimizer = torch.optim.SGD([value for value in pair.student.parameters() if value.requires_grad], lr=0.05)
    losses: list[float] = []
    for _ in range(3):
        loss = objective(pair.step(objective))
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[2] < losses[1] < losses[0]


def test_half_precision_and_autocast_give_a_float32_loss(make_reused: Callable[[str], Any]) -> None:
    pair = make_reused("other family")
    objective = SimKDConfig().build(pair.task)
    step = pair.step(objective, dtype=torch.bfloat16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = objective(step)
    assert mixed.dtype == torch.float32
    torch.testing.assert_close(mixed, objective(step), rtol=1e-6, atol=0)


def test_settings_say_that_the_classifier_is_reused() -> None:
    assert SimKDConfig(reduction=4).reuse() == ReusedClassifier(reduction=4)
    assert METHOD.terms == {"simkd": {}}  # as published, without labels


def test_a_student_without_projector_is_refused(make_pair: Callable[..., Any]) -> None:
    with pytest.raises(InputError, match=r"^simkd: student \S+ has no projector"):
        SimKDConfig().build(make_pair("same family").task)


@pytest.mark.parametrize("taps", [{}, {"maps": (32, 8, 8)}])
def test_another_teacher_than_that_of_the_classifier_is_refused(taps: dict[str, tuple[int, ...]]) -> None:
    student = NetworkFacts(name="student s", taps={"projected": (64, 8, 8)}, num_logits=5)
    teacher = NetworkFacts(name="teacher t", taps=taps, num_logits=5)
    with pytest.raises(
        InputError, match=r"^simkd: student s projects to \[64, 8, 8\], and teacher t has no tap 'maps'"
    ):
        SimKDConfig().build(Task(num_examples=4, num_classes=5, network=student, teacher=teacher))


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # the compiler's own look
def test_compiled_it_gives_the_same(make_reused: Callable[[str], Any]) -> None:
    pair = make_reused("same family")
    objective = SimKDConfig().build(pair.task)
    step = pair.step(objective)
    torch.compiler.reset()
    compiled: Any = torch.compile(objective, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(step), objective(step), rtol=1e-6, atol=0)
