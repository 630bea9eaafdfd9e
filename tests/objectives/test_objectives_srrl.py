from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from soteacher.errors import InputError
from soteacher.models.parts import Parts
from soteacher.objectives.student.srrl import (
    SRRL,
    SRRLConfig,
    pooled_feature_distance,
    softmax_regression_distance,
)
from soteacher.types import DistillStep, Outputs

PAIRS = {"same family": "maps", "other family": "maps", "transformer teacher": "maps", "transformer student": "pooled"}


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def test_matching_by_hand() -> None:
    ours, theirs = draw(3, 7), draw(3, 7, seed=1)
    wanted = ((ours.numpy() - theirs.numpy()) ** 2).mean(1)
    np.testing.assert_allclose(pooled_feature_distance(ours, theirs), wanted, rtol=1e-5)


@pytest.mark.parametrize("with_bias", [True, False])
def test_regression_by_hand(with_bias: bool) -> None:
    vectors, logits, weight, bias = draw(3, 7), draw(3, 5, seed=1), draw(5, 7, seed=2), draw(5, seed=3)
    read = vectors.numpy() @ weight.numpy().T + (bias.numpy() if with_bias else 0)
    value = softmax_regression_distance(vectors, logits, weight, bias if with_bias else None)
    np.testing.assert_allclose(value, ((read - logits.numpy()) ** 2).mean(1), rtol=1e-5)


def test_zero_at_agreement() -> None:
    vectors, weight = draw(3, 7), draw(5, 7, seed=2)
    assert pooled_feature_distance(vectors, vectors).abs().max() == 0
    assert softmax_regression_distance(vectors, vectors @ weight.T, weight).abs().max() < 1e-10


def test_gradients_are_right_and_the_teacher_is_a_constant() -> None:
    vectors = draw(3, 4, dtype=torch.float64).requires_grad_()
    logits, weight = draw(3, 5, seed=1, dtype=torch.float64), draw(5, 4, seed=2, dtype=torch.float64)
    theirs = draw(3, 4, seed=3, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda value: softmax_regression_distance(value, logits, weight), (vectors,))
    assert torch.autograd.gradcheck(lambda value: pooled_feature_distance(value, theirs), (vectors,))
    fixed = vectors.detach()
    for constant in (logits, weight, theirs):
        constant.requires_grad_()
    assert not softmax_regression_distance(fixed, logits, weight).requires_grad
    assert not pooled_feature_distance(fixed, theirs).requires_grad


def test_shapes_that_do_not_fit_are_refused() -> None:
    with pytest.raises(InputError, match=r"one shape \[B, D\], got \[3, 7\] \(student\) and \[3, 6\] \(teacher\)"):
        pooled_feature_distance(draw(3, 7), draw(3, 6))
    for shapes in (
        ((3, 7), (3, 5), (5, 6)),
        ((2, 7), (3, 5), (5, 7)),
        ((3, 7), (3, 4), (5, 7)),
        ((3, 7), (3,), (5, 7)),
    ):
        with pytest.raises(InputError, match=r"wanted vectors \[B, D\], logits \[B, K\] and a classifier \[K, D\]"):
            softmax_regression_distance(*(draw(*shape) for shape in shapes))


def by_hand(objective: SRRL, step: DistillStep, classifier: nn.Linear, *, rectified: bool) -> float:
    """Return the loss in NumPy, from the connector's weights."""
    maps = step.outputs.features[objective.features[0]].detach().double().numpy()
    maps = maps if maps.ndim == 4 else maps[:, :, None, None]
    weight = objective.connector.convolution.weight.detach().double().numpy()[:, :, 0, 0]
    connected = np.einsum("oc,bchw->bohw", weight, maps)
    mean, variance = connected.mean((0, 2, 3), keepdims=True), connected.var((0, 2, 3), keepdims=True)
    connected = (connected - mean) / np.sqrt(variance + 1e-5)
    vectors = (np.maximum(connected, 0) if rectified else connected).mean((2, 3))
    logits = vectors @ classifier.weight.detach().numpy().T + classifier.bias.detach().numpy()
    matching = ((vectors - step.teacher.features["pooled"].numpy()) ** 2).mean()
    return (
        objective.config.matching_weight * matching
        + objective.config.regression_weight * ((logits - step.teacher.logits.numpy()) ** 2).mean()
    )


@pytest.mark.parametrize("name", PAIRS)
def test_loss_of_every_pair_by_hand(name: str, make_pair: Callable[..., Any]) -> None:
    pair = make_pair(name)
    torch.manual_seed(0)
    objective = SRRLConfig(matching_weight=2.0, regression_weight=0.5).build(pair.task)
    assert (objective.features, objective.teacher_features) == ((PAIRS[name],), ("pooled",))
    step = pair.step(objective)
    loss = objective(step)
    wanted = by_hand(objective, step, Parts(pair.teacher).classifier, rectified=name != "transformer teacher")
    assert loss.item() == pytest.approx(wanted, rel=1e-4)
    loss.backward()
    gradients = [value.grad for value in (*pair.student.parameters(), *objective.parameters())]
    assert all(gradient is None or gradient.isfinite().all() for gradient in gradients)
    weight = objective.connector.convolution.weight.grad
    assert weight is not None
    assert weight.norm() > 0
    assert all(value.grad is None for value in pair.teacher.parameters())


def test_agreement_in_every_feature_leaves_the_connector_only(make_pair: Callable[..., Any]) -> None:
    """The distance of the logits follows that of the vectors: it is 0 wherever theirs is."""
    pair = make_pair("same family")
    step = pair.step(SRRLConfig().build(pair.task))
    vectors, classifier = step.teacher.features["pooled"], Parts(pair.teacher).classifier
    distance = softmax_regression_distance(vectors, step.teacher.logits, classifier.weight, classifier.bias)
    assert distance.max() < 1e-8


def test_two_steps_lower_the_loss(make_pair: Callable[..., Any]) -> None:
    pair = make_pair("same family")
    torch.manual_seed(0)
    objective = SRRLConfig().build(pair.task)
    optimizer = torch.optim.SGD([*pair.student.parameters(), *objective.parameters()], lr=0.002)
    losses: list[float] = []
    for _ in range(3):
        loss = objective(pair.step(objective))
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[2] < losses[1] < losses[0]


def test_autocast_rounds_nothing(make_pair: Callable[..., Any]) -> None:
    pair = make_pair("other family")
    objective = SRRLConfig().build(pair.task)
    step = pair.step(objective, dtype=torch.bfloat16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = objective(step)
    assert mixed.dtype == torch.float32
    torch.testing.assert_close(mixed, objective(step), rtol=1e-6, atol=0)


def test_a_batch_of_one_and_constant_features_are_finite(make_pair: Callable[..., Any]) -> None:
    pair = make_pair("same family")
    objective = SRRLConfig().build(pair.task)
    step = pair.step(objective, batch=1)
    for value in (0.0, 1.0):
        maps = torch.full_like(step.outputs.features["maps"], value).requires_grad_()
        outputs = Outputs(logits=step.outputs.logits, features={"maps": maps})
        one = DistillStep(
            images=step.images, labels=step.labels, indices=step.indices, outputs=outputs, model=step.model, epoch=0,
            num_epochs=1, progress=0, teacher=step.teacher, teacher_parts=step.teacher_parts,
        )  # fmt: skip
        loss = objective(one)
        loss.backward()
        assert loss.isfinite()
        assert maps.grad is not None
        assert maps.grad.isfinite().all()


def test_a_teacher_without_a_network_behind_it_is_refused(make_pair: Callable[..., Any], make_step: Any) -> None:
    pair = make_pair("same family")
    objective = SRRLConfig().build(pair.task)
    features = {"maps": torch.rand(4, 64, 8, 8)}
    step = make_step(nn.Identity(), logits=draw(4, 5), features=features, teacher_features={"pooled": draw(4, 128)})
    with pytest.raises(InputError, match="needs a live one"):
        objective(step)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # the compiler's own look
def test_compiled_it_gives_the_same(make_pair: Callable[..., Any]) -> None:
    pair = make_pair("same family")
    objective = SRRLConfig().build(pair.task)
    step = pair.step(objective)
    torch.compiler.reset()
    compiled: Any = torch.compile(objective, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(step), objective(step), rtol=1e-6, atol=0)
