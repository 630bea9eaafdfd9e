from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from soteacher.errors import InputError
from soteacher.objectives.student.cat import METHOD, CATConfig, class_activation_maps, class_attention_distance


def draw(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_class_activation_maps_equal_numpy() -> None:
    maps, weight, bias = draw(0, 2, 3, 4, 4), draw(1, 5, 3), draw(2, 5)
    expected = np.einsum("kc,bchw->bkhw", weight.numpy(), maps.numpy())
    np.testing.assert_allclose(class_activation_maps(maps, weight, None).numpy(), expected)
    expected += bias.numpy()[:, None, None]
    np.testing.assert_allclose(class_activation_maps(maps, weight, bias).numpy(), expected)


@pytest.mark.parametrize("name", ["same family", "other family"])
def test_class_activation_maps_have_the_logits_as_their_means(name: str, make_pair: Callable[[str], Any]) -> None:
    pair = make_pair(name)
    step = pair.step(CATConfig().build(pair.task))
    for outputs, parts in ((step.outputs, step.parts), (step.teacher, step.teacher_parts)):
        classifier = parts.classifier
        found = class_activation_maps(outputs.features["maps"], classifier.weight, classifier.bias)
        torch.testing.assert_close(found.mean(dim=(2, 3)), outputs.logits, rtol=1e-4, atol=1e-5)


def test_class_attention_distance_by_hand() -> None:
    student = torch.tensor([3.0, 4.0, 0.0, 0.0]).reshape(1, 1, 2, 2)
    teacher = torch.tensor([0.0, 0.0, 0.0, 2.0]).reshape(1, 1, 2, 2)
    found = class_attention_distance(student, teacher, resolution=2)
    torch.testing.assert_close(found, torch.tensor([(0.6**2 + 0.8**2 + 1) / 4]))
    plain = class_attention_distance(student, teacher, resolution=2, normalize=False)
    torch.testing.assert_close(plain, torch.tensor([(9.0 + 16 + 4) / 4]))


def test_class_attention_distance_equals_released_code(golden: Callable[[str], dict[str, Tensor]]) -> None:
    given = golden("class_attention")
    student, wanted = given["student_class_maps"].requires_grad_(), given["grad_student_class_maps"]
    value = class_attention_distance(student, given["teacher_class_maps"], resolution=int(given["resolution"])).mean()
    torch.testing.assert_close(value, given["value"], rtol=1e-5, atol=0)
    value.backward()
    assert student.grad is not None
    assert (student.grad - wanted).norm() / wanted.norm() < 1e-4


def test_class_attention_distance_equals_numpy() -> None:
    student, teacher = draw(0, 2, 3, 4, 4), draw(1, 2, 3, 8, 8)
    first = student.numpy().reshape(2, 3, 2, 2, 2, 2).mean(axis=(3, 5)).reshape(2, 3, 4)
    second = teacher.numpy().reshape(2, 3, 2, 4, 2, 4).mean(axis=(3, 5)).reshape(2, 3, 4)
    plain = class_attention_distance(student, teacher, resolution=2, normalize=False)
    np.testing.assert_allclose(plain.numpy(), np.square(first - second).mean(axis=(1, 2)))
    first, second = (x / np.linalg.norm(x, axis=2, keepdims=True) for x in (first, second))
    found = class_attention_distance(student, teacher, resolution=2)
    np.testing.assert_allclose(found.numpy(), np.square(first - second).mean(axis=(1, 2)))


def test_class_attention_distance_ignores_how_strongly_a_class_is_seen() -> None:
    student, teacher, strength = draw(0, 2, 3, 4, 4), draw(1, 2, 3, 4, 4), draw(2, 2, 3, 1, 1).abs() + 0.1
    found = class_attention_distance(student, teacher, resolution=2)
    torch.testing.assert_close(class_attention_distance(student * strength, teacher, resolution=2), found)
    nothing = class_attention_distance(teacher * strength, teacher, resolution=2)
    torch.testing.assert_close(nothing, torch.zeros(2, dtype=torch.float64))


def test_class_attention_distance_gradient_reaches_the_student_only() -> None:
    student, teacher = draw(0, 2, 3, 2, 2).requires_grad_(), draw(1, 2, 3, 2, 2).requires_grad_()
    for normalize in (True, False):
        assert torch.autograd.gradcheck(
            lambda s, n=normalize: class_attention_distance(s, teacher, resolution=2, normalize=n), student
        )
    class_attention_distance(student, teacher, resolution=2).sum().backward()
    assert teacher.grad is None


def test_class_attention_distance_of_empty_maps_has_a_finite_gradient() -> None:
    student = torch.zeros(2, 3, 4, 4, requires_grad=True)
    loss = class_attention_distance(student, torch.ones(2, 3, 4, 4), resolution=2).mean()
    loss.backward()
    assert loss == 0.25
    assert student.grad is not None
    assert student.grad.isfinite().all()


def test_functions_refuse_what_does_not_fit() -> None:
    with pytest.raises(InputError, match=r"classes, got \[2, 3, 4, 4\] \(student\) and \[2, 5, 4, 4\] \(teacher\)"):
        class_attention_distance(torch.zeros(2, 3, 4, 4), torch.zeros(2, 5, 4, 4), resolution=2)
    with pytest.raises(InputError, match="resolution must be at least 1, got 0"):
        class_attention_distance(torch.zeros(2, 3, 4, 4), torch.zeros(2, 3, 4, 4), resolution=0)
    with pytest.raises(InputError, match=r"weights \[K, C\], got \[2, 3, 4, 4\] and \[5, 4\]"):
        class_activation_maps(torch.zeros(2, 3, 4, 4), torch.zeros(5, 4), None)


@pytest.mark.parametrize("name", ["same family", "other family"])
@pytest.mark.parametrize("batch", [8, 1])
def test_objective_works_with_real_networks(name: str, batch: int, make_pair: Callable[[str], Any]) -> None:
    pair = make_pair(name)
    objective = CATConfig().build(pair.task)
    step = pair.step(objective, batch=batch)
    loss = objective(step)
    assert loss.dtype == torch.float32
    assert loss > 0
    loss.backward()
    gradients = [p.grad for p in pair.student.parameters()]
    assert all(gradient is not None and gradient.isfinite().all() for gradient in gradients)
    assert pair.student.network.get_submodule(pair.student.network.classifier_module).weight.grad.abs().sum() > 0
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(objective(step), loss)


@pytest.mark.parametrize("settings", [{}, {"resolution": 4}, {"normalize": False}], ids=str)
def test_objective_equals_the_distance_of_whole_class_maps(
    settings: dict[str, Any], make_pair: Callable[[str], Any]
) -> None:
    pair = make_pair("same family")
    config = CATConfig.model_validate(settings)
    step = pair.step(objective := config.build(pair.task))
    student, teacher = (
        class_activation_maps(outputs.features["maps"], parts.classifier.weight, parts.classifier.bias)
        for outputs, parts in ((step.outputs, step.parts), (step.teacher, step.teacher_parts))
    )
    expected = class_attention_distance(
        student, teacher, resolution=config.resolution, normalize=config.normalize
    ).mean()
    torch.testing.assert_close(objective(step), expected)


@pytest.mark.parametrize("name", ["transformer teacher", "transformer student"])
def test_networks_without_global_average_pooling_are_refused(name: str, make_pair: Callable[[str], Any]) -> None:
    with pytest.raises(InputError, match=r"cat: tap .* timm/test_vit does not take in the mean of such maps: take a"):
        CATConfig().build(make_pair(name).task)


def test_config_refuses_taps_that_the_classifier_does_not_take_in(make_pair: Callable[[str], Any]) -> None:
    task = make_pair("same family").task
    with pytest.raises(InputError, match="the classifier of student wrn_10_1 does not take in the mean"):
        CATConfig(student_taps=("stage2",)).build(task)
    with pytest.raises(InputError, match="cat compares one pair of taps, got 2"):
        CATConfig(student_taps=("maps", "maps"), teacher_taps=("maps", "maps")).build(task)
    assert CATConfig(student_taps=("maps",)).build(task).features == ("maps",)


def test_objective_needs_a_live_teacher(make_pair: Callable[[str], Any]) -> None:
    pair = make_pair("same family")
    step = pair.step(objective := CATConfig().build(pair.task))
    with pytest.raises(InputError, match="needs a live one"):
        objective(replace(step, teacher_parts=None))


def test_method_has_a_published_weight_and_resolution() -> None:
    assert METHOD.terms == {"cross_entropy": {}, "cat": {"weight": 40.0}}
    assert CATConfig().resolution == 2
