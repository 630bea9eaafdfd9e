from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from soteacher.errors import InputError
from soteacher.objectives.student.factor_transfer import METHOD, FactorTransferConfig, factor_distance
from soteacher.objectives.student.paraphraser import ParaphraserConfig, reconstruction_distance
from soteacher.types import Task

PAIRS = ["same family", "other family", "transformer teacher", "transformer student"]


def factors(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_factor_distance_by_hand() -> None:
    student = torch.tensor([[3.0, 0.0], [0.0, 0.0]]).reshape(1, 2, 1, 2)  # mean squares 4.5, 0: direction (1, 0)
    teacher = torch.tensor([3.0**0.5, 2.0]).reshape(1, 1, 1, 2)  # squares 3, 4: direction (0.6, 0.8)
    torch.testing.assert_close(factor_distance(student, teacher), torch.tensor([(0.4 + 0.8) / 2]))


def test_factor_distance_equals_released_code(golden: Callable[[str], dict[str, Tensor]]) -> None:
    given = golden("factor_transfer")
    student, wanted = given["student_stage3"].requires_grad_(), given["grad_student_stage3"]
    value = factor_distance(student, given["teacher_stage3"]).mean()
    torch.testing.assert_close(value, given["value"], rtol=1e-5, atol=0)
    value.backward()
    assert student.grad is not None
    assert (student.grad - wanted).norm() / wanted.norm() < 1e-4


def test_factor_distance_of_other_sizes_equals_numpy() -> None:
    student, teacher = factors(3, 2, 4, 4, seed=0), factors(3, 5, 2, 2, seed=1)
    pooled = student.numpy().reshape(3, 2, 2, 2, 2, 2).mean(axis=(3, 5))
    sides = [np.square(x).mean(axis=1).reshape(3, -1) for x in (pooled, teacher.numpy())]
    first, second = (side / np.linalg.norm(side, axis=1, keepdims=True) for side in sides)
    np.testing.assert_allclose(factor_distance(student, teacher).numpy(), np.abs(first - second).mean(axis=1))


def test_factor_distance_ignores_sign_and_size_of_the_factors() -> None:
    student, teacher = factors(3, 2, 4, 4, seed=0), factors(3, 2, 4, 4, seed=1)
    torch.testing.assert_close(factor_distance(-3 * student, 2 * teacher), factor_distance(student, teacher))
    torch.testing.assert_close(factor_distance(-3 * student, student), torch.zeros(3, dtype=torch.float64))


def test_distances_have_right_gradients_for_the_student_only() -> None:
    student, teacher = factors(2, 2, 2, 2, seed=0).requires_grad_(), factors(2, 2, 2, 2, seed=1).requires_grad_()
    for distance in (factor_distance, reconstruction_distance):
        assert torch.autograd.gradcheck(lambda s, d=distance: d(s, teacher), student)
        distance(student, teacher).sum().backward()
    assert teacher.grad is None


def test_reconstruction_distance_equals_numpy() -> None:
    first, second = factors(3, 2, 4, 4, seed=0), factors(3, 2, 4, 4, seed=1)
    expected = np.square(first.numpy() - second.numpy()).mean(axis=(1, 2, 3))
    np.testing.assert_allclose(reconstruction_distance(first, second).numpy(), expected)
    assert reconstruction_distance(first, first).eq(0).all()


def test_distances_refuse_what_does_not_fit() -> None:
    with pytest.raises(InputError, match=r"one batch, got \[2, 3, 4, 4\] \(student\) and \[3, 3, 4, 4\] \(teacher\)"):
        factor_distance(torch.zeros(2, 3, 4, 4), torch.zeros(3, 3, 4, 4))
    with pytest.raises(InputError, match="must be"):
        factor_distance(torch.zeros(2, 3), torch.zeros(2, 3))
    with pytest.raises(InputError, match=r"one shape, got \[2, 3, 4, 4\] and \[2, 3, 4, 5\]"):
        reconstruction_distance(torch.zeros(2, 3, 4, 4), torch.zeros(2, 3, 4, 5))


@pytest.mark.parametrize("name", PAIRS)
@pytest.mark.parametrize("batch", [8, 1])
def test_objectives_work_with_real_networks(name: str, batch: int, make_pair: Callable[[str], Any]) -> None:
    pair = make_pair(name)
    torch.manual_seed(0)
    paraphraser, objective = ParaphraserConfig().build(pair.task), FactorTransferConfig().build(pair.task)
    objective.start({"paraphraser": paraphraser})
    for trained in (paraphraser, objective):
        step = pair.step(trained, batch=batch)
        loss = trained(step)
        assert loss.dtype == torch.float32
        assert loss > 0
        loss.backward()
        gradients = [p.grad for p in trained.parameters() if p.requires_grad]
        assert all(gradient is not None and gradient.isfinite().all() for gradient in gradients)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert torch.equal(trained(step), loss)
    # The paraphraser's loss reaches nothing of the student's, the transfer's all that lies before the last stage.
    reached = [p.grad for p in pair.student.parameters() if p.grad is not None]
    assert sum(gradient.abs().sum() for gradient in reached) > 0
    assert all(p.grad is None for p in objective.paraphraser.parameters())


def test_paraphraser_needs_nothing_of_the_student(make_pair: Callable[[str], Any]) -> None:
    pair = make_pair("same family")
    paraphraser = ParaphraserConfig().build(Task(num_examples=24, num_classes=5, teacher=pair.task.teacher))
    assert paraphraser.features == ()
    assert paraphraser.teacher_features == ("stage3",)
    assert not paraphraser.trains_network
    step = pair.step(paraphraser)
    found = torch.autograd.grad(paraphraser(step), list(pair.student.parameters()), allow_unused=True)
    assert all(gradient is None for gradient in found)


def test_paraphraser_learns_to_rebuild(make_pair: Callable[[str], Any]) -> None:
    pair = make_pair("same family")
    torch.manual_seed(0)
    paraphraser = ParaphraserConfig().build(pair.task)
    step = pair.step(paraphraser)
    optimizer = torch.optim.Adam(paraphraser.parameters(), lr=0.003)
    first = paraphraser(step).item()
    for _ in range(15):
        optimizer.zero_grad()
        paraphraser(step).backward()
        optimizer.step()
    assert paraphraser(step).item() < 0.98 * first


def test_start_takes_the_encoder_over_frozen(make_pair: Callable[[str], Any]) -> None:
    pair = make_pair("same family")
    torch.manual_seed(0)
    paraphraser, objective = ParaphraserConfig().build(pair.task), FactorTransferConfig().build(pair.task)
    step = pair.step(paraphraser, objective)
    before = objective(step)
    objective.start({"paraphraser": paraphraser})
    assert not torch.equal(objective(step), before)
    own, theirs = objective.paraphraser.state_dict(), paraphraser.encoder.state_dict()
    assert all(torch.equal(own[key], theirs[key]) for key in theirs)
    assert {name for name, p in objective.named_parameters() if not p.requires_grad} == {
        f"paraphraser.{key}" for key in theirs
    }
    resumed = FactorTransferConfig().build(pair.task)
    resumed.load_state_dict(objective.state_dict())
    assert torch.equal(resumed(step), objective(step))
    with torch.no_grad():
        next(iter(paraphraser.encoder.parameters())).zero_()  # a copy: what happens to the original does not matter
    assert torch.equal(resumed(step), objective(step))


def test_start_refuses_a_missing_or_another_paraphraser(make_pair: Callable[[str], Any]) -> None:
    task = make_pair("same family").task
    objective = FactorTransferConfig().build(task)
    with pytest.raises(InputError, match=r"add the term 'paraphraser: \{stage: preparation\}'"):
        objective.start({})
    with pytest.raises(InputError, match=r"factor_rate 0\.5 and its paraphraser 0\.25; give both the same one"):
        objective.start({"paraphraser": ParaphraserConfig(factor_rate=0.25).build(task)})
    with pytest.raises(InputError, match="tap 'stage3' of the teacher and its paraphraser 'stage2'"):
        objective.start({"paraphraser": ParaphraserConfig(teacher_tap="stage2").build(task)})


def test_configs_refuse_what_they_cannot_use(make_pair: Callable[[str], Any]) -> None:
    task = make_pair("same family").task
    two = ("stage2", "stage3")
    with pytest.raises(InputError, match="factor_transfer compares one pair of taps, got 2"):
        FactorTransferConfig(student_taps=two, teacher_taps=two).build(task)
    with pytest.raises(InputError, match="give Task"):
        ParaphraserConfig().build(replace(task, teacher=None))
    bare = replace(task.teacher, taps={"pooled": (4,)})
    with pytest.raises(InputError, match="names no stages; set teacher_tap"):
        ParaphraserConfig().build(replace(task, teacher=bare))


def test_factors_have_a_share_of_the_teachers_channels(make_pair: Callable[[str], Any]) -> None:
    task = make_pair("wider teacher").task
    for rate, channels in ((0.5, 64), (0.25, 32), (0.001, 1)):
        objective = FactorTransferConfig(factor_rate=rate).build(task)
        assert objective.translator(torch.zeros(1, 64, 2, 2)).shape[1] == channels
        assert objective.paraphraser(torch.zeros(1, 128, 2, 2)).shape[1] == channels


def test_method_prepares_the_paraphraser() -> None:
    assert METHOD.terms["paraphraser"] == {"stage": "preparation"}
    assert ParaphraserConfig().stage == "preparation"
