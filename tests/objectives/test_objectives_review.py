from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from soteacher.errors import InputError
from soteacher.objective import ramp_factor
from soteacher.objectives.student.review import METHOD, AttentionFusion, ReviewConfig, hierarchical_context_distance


def maps(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_hierarchical_context_distance_by_hand() -> None:
    student, teacher = torch.tensor([[1.0, 3.0], [5.0, 7.0]]).reshape(1, 1, 2, 2), torch.zeros(1, 1, 2, 2)
    expected = ((1 + 9 + 25 + 49) / 4 + 0.5 * 4.0**2) / 1.5  # the maps and, at half the weight, their mean
    torch.testing.assert_close(hierarchical_context_distance(student, teacher), torch.tensor([expected]))


def test_hierarchical_context_distance_equals_released_code(golden: Callable[[str], dict[str, Tensor]]) -> None:
    given = golden("hierarchical_context")
    students = [given[f"student_stage{number}"].requires_grad_() for number in (1, 2, 3)]
    distances = [
        hierarchical_context_distance(student, given[f"teacher_stage{number}"]).mean()
        for number, student in enumerate(students, start=1)
    ]
    value = torch.stack(distances).sum()
    torch.testing.assert_close(value, given["value"], rtol=1e-5, atol=0)
    value.backward()
    for number, student in enumerate(students, start=1):
        wanted = given[f"grad_student_stage{number}"]
        assert student.grad is not None
        assert (student.grad - wanted).norm() / wanted.norm() < 1e-4


def test_hierarchical_context_distance_equals_numpy_pooling_each_side() -> None:
    student, teacher = maps(0, 3, 2, 8, 8), maps(1, 3, 2, 8, 8)
    expected, weights = np.zeros(3), 0.0
    for weight, side in ((1.0, 8), (0.5, 4), (0.25, 2), (0.125, 1)):
        first, second = (
            x.numpy().reshape(3, 2, side, 8 // side, side, 8 // side).mean(axis=(3, 5)) for x in (student, teacher)
        )
        expected += weight * np.square(first - second).mean(axis=(1, 2, 3))
        weights += weight
    np.testing.assert_allclose(hierarchical_context_distance(student, teacher).numpy(), expected / weights)


def test_hierarchical_context_distance_is_zero_at_agreement_and_one_for_a_shift_of_one() -> None:
    student = maps(0, 3, 2, 5, 5)
    assert hierarchical_context_distance(student, student).eq(0).all()
    torch.testing.assert_close(hierarchical_context_distance(student + 1, student), torch.ones(3, dtype=torch.float64))


def test_hierarchical_context_distance_gradient_reaches_the_student_only() -> None:
    student, teacher = maps(0, 2, 2, 3, 3).requires_grad_(), maps(1, 2, 2, 3, 3).requires_grad_()
    assert torch.autograd.gradcheck(lambda s: hierarchical_context_distance(s, teacher), student)
    hierarchical_context_distance(student, teacher).sum().backward()
    assert teacher.grad is None


def test_hierarchical_context_distance_refuses_other_shapes() -> None:
    with pytest.raises(InputError, match=r"one shape \[B, C, H, W\], got \[1, 2, 4, 4\] and \[1, 2, 8, 8\]"):
        hierarchical_context_distance(torch.zeros(1, 2, 4, 4), torch.zeros(1, 2, 8, 8))
    with pytest.raises(InputError, match="one shape"):
        hierarchical_context_distance(torch.zeros(2, 4), torch.zeros(2, 4))


def test_attention_fusion_weighs_its_own_maps_and_the_deeper_ones() -> None:
    fusion = AttentionFusion(3, 4, 5, (4, 4), fuses=True).double()
    alone = AttentionFusion(3, 4, 5, (4, 4), fuses=False).double()
    alone.load_state_dict({key: value for key, value in fusion.state_dict().items() if "attention" not in key})
    own, deeper = maps(0, 6, 3, 4, 4), maps(1, 6, 4, 2, 2)
    assert fusion.attention is not None
    with torch.no_grad():
        fusion.attention.weight.zero_()
        fusion.attention.bias.copy_(torch.tensor([0.0, np.log(3.0)]))  # shares of 1/2 and 3/4
    _, entered = alone(own, None)
    compared, fused = fusion(own, deeper)
    above = torch.from_numpy(deeper.numpy().repeat(2, axis=2).repeat(2, axis=3))
    torch.testing.assert_close(fused, 0.5 * entered + 0.75 * above)
    assert compared.shape == (6, 5, 4, 4)
    moments = compared.transpose(0, 1).flatten(1)
    torch.testing.assert_close(moments.mean(dim=1), torch.zeros(5, dtype=torch.float64), atol=1e-6, rtol=0)


def test_attention_fusion_reads_both_maps_to_weigh_them() -> None:
    fusion = AttentionFusion(3, 4, 5, (4, 4), fuses=True).double()
    own, deeper = maps(0, 6, 3, 4, 4), maps(1, 6, 4, 4, 4)
    alone = AttentionFusion(3, 4, 5, (4, 4), fuses=False).double()
    alone.load_state_dict({key: value for key, value in fusion.state_dict().items() if "attention" not in key})
    _, entered = alone(own, None)
    assert fusion.attention is not None
    weight, bias = fusion.attention.weight[:, :, 0, 0], fusion.attention.bias
    both = np.concatenate([entered.detach().numpy(), deeper.numpy()], axis=1)
    scores = np.einsum("kc,bchw->bkhw", weight.detach().numpy(), both) + bias.detach().numpy()[:, None, None]
    shares = 1 / (1 + np.exp(-scores))
    expected = entered.detach().numpy() * shares[:, :1] + deeper.numpy() * shares[:, 1:]
    np.testing.assert_allclose(fusion(own, deeper)[1].detach().numpy(), expected)


def test_attention_fusion_brings_maps_to_the_teachers_size() -> None:
    compared, fused = AttentionFusion(3, 4, 5, (7, 7), fuses=False)(torch.randn(2, 3, 4, 4), None)
    assert compared.shape == (2, 5, 7, 7)
    assert fused.shape == (2, 4, 7, 7)


@pytest.mark.parametrize("name", ["same family", "other family", "transformer teacher", "transformer student"])
@pytest.mark.parametrize("batch", [8, 1])
def test_objective_works_with_real_networks(name: str, batch: int, make_pair: Callable[[str], Any]) -> None:
    pair = make_pair(name)
    torch.manual_seed(0)
    objective = ReviewConfig().build(pair.task)
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


def test_objective_compares_stages_with_pre_activations_and_the_pooled(make_pair: Callable[[str], Any]) -> None:
    task = make_pair("same family").task
    objective = ReviewConfig().build(task)
    assert objective.features == ("stage1", "stage2", "stage3", "pooled")
    assert objective.teacher_features == ("preactivation1", "preactivation2", "preactivation3", "pooled")
    chosen = ReviewConfig(student_taps=("preactivation3",), teacher_taps=("stage2",)).build(task)
    assert chosen.features == ("preactivation3", "pooled")
    assert chosen.teacher_features == ("stage2", "pooled")


def test_objective_has_the_channels_of_the_pooled_feature_up_to_a_limit(make_pair: Callable[[str], Any]) -> None:
    task = make_pair("same family").task
    for config, channels in ((ReviewConfig(), 64), (ReviewConfig(most_channels=10), 10)):
        fusion = config.build(task).fusions[0]
        assert isinstance(fusion, AttentionFusion)
        assert fusion.entry.weight.shape == (channels, 16, 1, 1)


def test_shallow_levels_of_the_teacher_are_learned_by_deep_levels_of_the_student(
    make_pair: Callable[[str], Any],
) -> None:
    pair = make_pair("wider teacher")
    torch.manual_seed(0)
    objective = ReviewConfig().build(pair.task)
    step = pair.step(objective)
    deepest = step.outputs.features["pooled"]
    compared, above = None, None
    for index, tap in ((3, "pooled"), (2, "stage3"), (1, "stage2"), (0, "stage1")):
        feature = step.outputs.features[tap]
        compared, above = objective.fusions[index](feature if feature.ndim == 4 else feature[:, :, None, None], above)
    assert compared is not None
    assert compared.shape[1:] == (32, 32, 32)
    (found,) = torch.autograd.grad(compared.square().sum(), deepest)
    assert found.abs().sum() > 0


def test_method_warms_up_as_published() -> None:
    assert METHOD.terms == {"cross_entropy": {}, "review": {"weight": 5.0, "ramp": "warmup"}}
    assert ramp_factor("warmup", epoch=19, num_epochs=240) == 1.0
