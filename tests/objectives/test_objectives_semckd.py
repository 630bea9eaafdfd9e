from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from scipy.special import softmax
from torch import Tensor

from soteacher.errors import InputError
from soteacher.objectives.student.semckd import (
    METHOD,
    LayerEmbedding,
    SemCKDConfig,
    attended_distance,
    batch_similarities,
    layer_attention,
)


def draw(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("compared", [2, 5, 8])
def test_batch_similarities_equal_numpy(compared: int) -> None:
    maps = draw(0, 5, 3, 2, 2)
    flat = maps.numpy().reshape(5, -1)
    expected = np.zeros((5, compared))
    expected[:, : min(5, compared)] = (flat @ flat.T)[:, :compared]
    np.testing.assert_allclose(batch_similarities(maps, num_compared=compared).numpy(), expected)


def test_layer_attention_equals_scipy() -> None:
    queries, keys = draw(0, 4, 3, 6), draw(1, 4, 2, 6)
    expected = softmax(np.einsum("bsd,btd->bst", queries.numpy(), keys.numpy()), axis=2)
    np.testing.assert_allclose(layer_attention(queries, keys).numpy(), expected)


def test_layer_attention_of_equal_keys_is_even() -> None:
    queries, keys = draw(0, 4, 3, 6), draw(1, 4, 1, 6).expand(4, 5, 6)
    torch.testing.assert_close(layer_attention(queries, keys), torch.full((4, 3, 5), 0.2, dtype=torch.float64))


def test_attended_distance_by_hand() -> None:
    distances = torch.tensor([[[1.0, 2.0], [3.0, 4.0]]])
    attention = torch.tensor([[[0.25, 0.75], [1.0, 0.0]]])
    torch.testing.assert_close(attended_distance(distances, attention), torch.tensor([(1.75 + 3.0) / 2]))


def test_attended_distance_ignores_layers_without_attention() -> None:
    distances, attention = draw(0, 4, 3, 2).abs(), torch.zeros(4, 3, 2, dtype=torch.float64)
    attention[:, :, 1] = 1
    torch.testing.assert_close(attended_distance(distances, attention), distances[:, :, 1].mean(dim=1))


def test_functions_have_right_gradients() -> None:
    queries, keys = draw(0, 2, 2, 3).requires_grad_(), draw(1, 2, 3, 3).requires_grad_()
    assert torch.autograd.gradcheck(layer_attention, (queries, keys))
    distances, attention = draw(2, 2, 2, 3).requires_grad_(), draw(3, 2, 2, 3).requires_grad_()
    assert torch.autograd.gradcheck(attended_distance, (distances, attention))
    maps = draw(4, 3, 2, 2, 2).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: batch_similarities(x, num_compared=4), maps)


def test_functions_refuse_what_does_not_fit() -> None:
    with pytest.raises(InputError, match=r"got \[2, 3, 4\] and \[2, 3, 5\]"):
        layer_attention(torch.zeros(2, 3, 4), torch.zeros(2, 3, 5))
    with pytest.raises(InputError, match=r"one shape \[B, S, T\], got \[2, 3, 4\] and \[2, 4, 3\]"):
        attended_distance(torch.zeros(2, 3, 4), torch.zeros(2, 4, 3))
    with pytest.raises(InputError, match="num_compared of 1 or more"):
        batch_similarities(torch.zeros(2, 3), num_compared=0)


def test_layer_embedding_has_unit_length_and_a_finite_gradient_at_zero() -> None:
    embedding = LayerEmbedding(8)
    torch.testing.assert_close(embedding(torch.randn(5, 8)).norm(dim=1), torch.ones(5))
    for parameter in embedding.parameters():
        torch.nn.init.zeros_(parameter)
    nothing = torch.zeros(5, 8, requires_grad=True)
    embedding(nothing).sum().backward()
    assert nothing.grad is not None
    assert nothing.grad.isfinite().all()


@pytest.mark.parametrize("name", ["same family", "other family", "transformer teacher", "transformer student"])
@pytest.mark.parametrize("batch", [8, 1])
def test_objective_works_with_real_networks(name: str, batch: int, make_pair: Callable[[str], Any]) -> None:
    pair = make_pair(name)
    torch.manual_seed(0)
    taps = ("stage1", "stage2") if name == "other family" else None  # the deeper ones have 512 channels: slow
    objective = SemCKDConfig(teacher_taps=taps).build(pair.task)
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


def test_objective_equals_its_definition(make_pair: Callable[[str], Any]) -> None:
    pair = make_pair("same family")
    torch.manual_seed(0)
    objective = SemCKDConfig(num_compared=4).build(pair.task)
    step = pair.step(objective, batch=6)
    own = [step.outputs.features[tap] for tap in objective.features]
    wanted = [step.teacher.features[tap] for tap in objective.teacher_features]

    def embedded(embeddings: Any, layers: list[Tensor]) -> list[np.ndarray]:
        flat = [layer.flatten(1) for layer in layers]
        return [
            embedding(x @ x[:4].T).detach().numpy().astype(float) for embedding, x in zip(embeddings, flat, strict=True)
        ]

    queries, keys = embedded(objective.queries, own), embedded(objective.keys, wanted)
    expected = 0.0
    for example in range(6):
        for s in range(3):
            scores = np.exp([queries[s][example] @ keys[t][example] for t in range(3)])
            for t in range(3):
                side = min(own[s].shape[-1], wanted[t].shape[-1])
                pool = torch.nn.AdaptiveAvgPool2d(side)
                projected = objective.projections[3 * s + t](pool(own[s]))[example]
                distance = (projected - pool(wanted[t])[example]).square().mean().item()
                expected += scores[t] / scores.sum() * distance / 3 / 6
    np.testing.assert_allclose(objective(step).item(), expected, rtol=1e-5)


def test_networks_may_have_other_numbers_of_stages(make_pair: Callable[[str], Any]) -> None:
    objective = SemCKDConfig().build(make_pair("transformer teacher").task)
    assert objective.features == ("stage1", "stage2", "stage3")
    assert objective.teacher_features == ("stage1", "stage2", "stage3", "stage4")
    assert len(objective.projections) == 12


def test_config_refuses_networks_without_stages(make_pair: Callable[[str], Any]) -> None:
    task = make_pair("same family").task
    bare = replace(task.network, taps={"pooled": (4,)})
    with pytest.raises(InputError, match="no stages are known or named; set student_taps to at least one tap"):
        SemCKDConfig().build(replace(task, network=bare))
    with pytest.raises(InputError, match="set teacher_taps"):
        SemCKDConfig(teacher_taps=()).build(task)


def test_method_has_the_authors_weights() -> None:
    assert METHOD.terms["kd"] == {"weight": 1.0, "temperature": 4.0}
    assert METHOD.terms["semckd"] == {"weight": 400.0}
