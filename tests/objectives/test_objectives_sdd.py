from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from scipy.special import rel_entr, softmax
from torch import Tensor

from soteacher.errors import InputError
from soteacher.objectives.student import sdd, sdd_dkd, sdd_nkd
from soteacher.objectives.student.sdd import SDDConfig, complementary_regions, regional_logits
from soteacher.types import NetworkFacts, Outputs, Task


@pytest.fixture
def maps() -> Tensor:
    torch.manual_seed(0)
    return torch.randn(2, 3, 4, 4, dtype=torch.float64)


def with_maps(task: Task, shape: tuple[int, int, int]) -> Task:
    """Return the task with other last maps of the student."""
    assert task.network is not None
    taps = dict(task.network.taps) | {"maps": shape}
    return replace(task, network=NetworkFacts(name="student small", taps=taps, num_logits=task.network.num_logits))


def test_regional_logits_by_hand(maps: Tensor) -> None:
    weight, bias = torch.randn(5, 3, dtype=torch.float64), torch.randn(5, dtype=torch.float64)
    found = regional_logits(maps, weight, bias, scales=(1, 2, 4))
    pixels = maps.numpy()
    cells = [pixels.mean(axis=(2, 3))]
    cells += [pixels[:, :, 2 * r : 2 * r + 2, 2 * c : 2 * c + 2].mean(axis=(2, 3)) for r in (0, 1) for c in (0, 1)]
    cells += [pixels[:, :, r, c] for r in range(4) for c in range(4)]
    expected = np.stack(cells, axis=1) @ weight.numpy().T + bias.numpy()
    torch.testing.assert_close(found, torch.from_numpy(expected))
    torch.testing.assert_close(regional_logits(maps, weight, None, scales=(2,)), found[:, 1:5] - bias)
    assert torch.autograd.gradcheck(
        lambda f, w: regional_logits(f, w, bias, scales=(1, 2)), (maps.requires_grad_(), weight.requires_grad_())
    )


def test_complementary_regions_by_hand() -> None:
    right, wrong = [1.0, 0.0], [0.0, 1.0]
    whole = torch.tensor([right, wrong])
    regions = torch.tensor([[right, wrong, right], [right, wrong, wrong]])
    found = complementary_regions(whole, regions, torch.tensor([0, 0]))
    assert found.tolist() == [[False, True, False], [True, False, False]]


def test_sdd_equals_numpy(make_pair: Callable[[str], Any]) -> None:
    pair = make_pair("same family")
    objective = SDDConfig().build(pair.task)
    assert objective.scales == (1, 2, 4)
    step = pair.step(objective)
    torch.manual_seed(1)  # a teacher that says different things of different regions
    classifier = step.teacher_parts.classifier
    answer = {"maps": 3 * torch.randn_like(step.teacher.features["maps"])}
    whole = torch.nn.functional.linear(answer["maps"].mean(dim=(2, 3)), classifier.weight, classifier.bias)
    step = replace(step, teacher=Outputs(logits=whole, features=answer))
    student, teacher = (
        regional_logits(
            outputs.features["maps"].detach().double(),
            parts.classifier.weight.detach().double(),
            parts.classifier.bias.detach().double(),
            scales=(1, 2, 4),
        ).numpy()
        for outputs, parts in ((step.outputs, step.parts), (step.teacher, step.teacher_parts))
    )
    divergence = 16 * rel_entr(softmax(teacher / 4, axis=2), softmax(student / 4, axis=2)).sum(axis=2)
    labels = step.labels.numpy()[:, None]
    right = teacher.argmax(axis=2) == labels
    weight = 1.0 + (right != right[:, :1])
    assert set(weight.ravel()) == {1.0, 2.0}
    assert objective(step).item() == pytest.approx((divergence * weight).mean(), rel=1e-4)


@pytest.mark.parametrize("pair_name", ["same family", "other family"])
def test_regions_of_scale_1_are_the_networks_own_logits(make_pair: Callable[[str], Any], pair_name: str) -> None:
    pair = make_pair(pair_name)
    step = pair.step(SDDConfig().build(pair.task))
    for outputs, parts in ((step.outputs, step.parts), (step.teacher, step.teacher_parts)):
        found = regional_logits(outputs.features["maps"], parts.classifier.weight, parts.classifier.bias, scales=(1,))
        torch.testing.assert_close(found[:, 0], outputs.logits)


@pytest.mark.parametrize("divergence", ["kd", "dkd", "nkd"])
@pytest.mark.parametrize("pair_name", ["same family", "other family"])
def test_sdd_trains_convolutional_pairs(make_pair: Callable[[str], Any], pair_name: str, divergence: str) -> None:
    pair = make_pair(pair_name)
    objective = SDDConfig.model_validate({"divergence": divergence}).build(pair.task)
    assert (objective.features, objective.teacher_features) == (("maps",), ("maps",))
    step = pair.step(objective)
    loss = objective(step)
    assert loss.isfinite()
    assert loss > 0
    gradients = torch.autograd.grad(loss, list(pair.student.parameters()), retain_graph=True)
    assert all(value.isfinite().all() for value in gradients)
    assert sum(value.abs().sum() for value in gradients) > 0
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(objective(step), loss, rtol=1e-6, atol=0)


@pytest.mark.parametrize("pair_name", ["transformer teacher", "transformer student"])
def test_sdd_refuses_a_transformer(make_pair: Callable[[str], Any], pair_name: str) -> None:
    with pytest.raises(InputError, match=r"sdd: tap .*test_vit.*a tap 'maps', and .*test_vit has none"):
        SDDConfig().build(make_pair(pair_name).task)


def test_sdd_takes_the_tokens_of_a_transformer_that_are_named(make_pair: Callable[[str], Any]) -> None:
    pair = make_pair("transformer teacher")
    objective = SDDConfig(student_taps=("maps",), teacher_taps=("stage4",)).build(pair.task)
    assert objective(pair.step(objective)) > 0


def test_sdd_leaves_out_the_scales_that_do_not_fit(make_pair: Callable[[str], Any]) -> None:
    task = make_pair("same family").task
    channels = task.network.taps["maps"][0]
    assert SDDConfig().build(with_maps(task, (channels, 2, 2))).scales == (1, 2)
    with pytest.raises(InputError, match=r"none of the scales \[4\] fits; add 1"):
        SDDConfig(scales=(4,)).build(with_maps(task, (channels, 2, 2)))
    with pytest.raises(InputError, match="as many channels as its 'pooled'"):
        SDDConfig(student_taps=("stage1",), teacher_taps=("maps",)).build(with_maps(task, (channels, 8, 8)))


def test_methods_differ_in_the_divergence() -> None:
    for method, divergence in ((sdd.METHOD, "kd"), (sdd_dkd.METHOD, "dkd"), (sdd_nkd.METHOD, "nkd")):
        config = SDDConfig.model_validate(method.terms["sdd"])
        assert config.divergence == divergence
        assert config.complementary_weight == 2.0


def test_impossible_input_is_refused(maps: Tensor) -> None:
    weight = torch.zeros(5, 3, dtype=torch.float64)
    with pytest.raises(InputError, match=r"wanted maps \[B, C, H, W\] and weights \[K, C\]"):
        regional_logits(maps, weight[:, :2], None, scales=(1,))
    for scales in ((), (0,), (8,)):
        with pytest.raises(InputError, match="scales must be at least 1 and fit into maps of"):
            regional_logits(maps, weight, None, scales=scales)
    with pytest.raises(InputError, match=r"regions \[B, N, K\]"):
        complementary_regions(torch.zeros(2, 5), torch.zeros(2, 5), torch.zeros(2, dtype=torch.long))
