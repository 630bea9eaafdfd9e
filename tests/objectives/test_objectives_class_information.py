import copy
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from scipy.special import rel_entr, softmax
from torch import Tensor, nn

from soteacher.errors import InputError
from soteacher.objectives.teacher.class_information import (
    ClassInformation,
    ClassInformationConfig,
    class_centroids,
    divergence_from_centroids,
    running_centroids,
)
from soteacher.objectives.teacher.class_information_frozen import ClassInformationFrozen, ClassInformationFrozenConfig
from soteacher.types import Outputs, Step, Task

CLASSES = 5
CONFIGS = (ClassInformationConfig, ClassInformationFrozenConfig)


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype) * 2


def classes(number: int, seed: int = 0) -> Tensor:
    return torch.randint(0, CLASSES, (number,), generator=torch.Generator().manual_seed(seed))


def step_of(logits: Tensor, labels: Tensor) -> Step:
    return Step(
        images=torch.zeros(len(labels), 3, 2, 2), labels=labels, indices=torch.arange(len(labels)),
        outputs=Outputs(logits=logits, features={}), model=nn.Identity(), epoch=0, num_epochs=4, progress=0.0,
    )  # fmt: skip


@pytest.fixture(params=CONFIGS, ids=lambda config: config.__name__)
def objective(request: pytest.FixtureRequest, task: Task) -> Any:
    return request.param().build(task)


def test_divergence_is_that_of_scipy() -> None:
    logits, labels = draw(9, CLASSES), classes(9)
    centroids = draw(CLASSES, CLASSES, seed=1).softmax(dim=-1)
    wanted = rel_entr(softmax(logits.numpy(), axis=1), centroids.numpy()[labels]).sum(axis=1)
    np.testing.assert_allclose(divergence_from_centroids(logits, labels, centroids), wanted, rtol=1e-12)


def test_divergence_gradient_is_right_and_centroids_are_constants() -> None:
    logits, centroids = draw(4, CLASSES).requires_grad_(), draw(CLASSES, CLASSES, seed=1).softmax(dim=-1)
    assert torch.autograd.gradcheck(lambda value: divergence_from_centroids(value, classes(4), centroids), (logits,))
    moving = centroids.clone().requires_grad_()
    assert not divergence_from_centroids(logits.detach(), classes(4), moving).requires_grad


def test_divergence_from_uniform_centroids_is_the_missing_entropy() -> None:
    logits = draw(9, CLASSES)
    uniform = torch.full((CLASSES, CLASSES), 1 / CLASSES, dtype=torch.float64)
    entropy = torch.distributions.Categorical(logits=logits).entropy()
    torch.testing.assert_close(divergence_from_centroids(logits, classes(9), uniform), math.log(CLASSES) - entropy)


def test_divergence_vanishes_at_the_centroid_and_no_shift_of_logits_matters() -> None:
    logits, labels = draw(CLASSES, CLASSES), torch.arange(CLASSES)
    centroids = logits.softmax(dim=-1)
    assert divergence_from_centroids(logits + 3, labels, centroids).abs().max() < 1e-12


def test_mean_divergence_from_the_own_centroids_is_the_mutual_information() -> None:
    """H(prediction | label) - H(prediction | image, label), for images that are equally likely."""
    logits, labels = draw(60, CLASSES), classes(60)
    centroids = class_centroids(logits, labels, num_classes=CLASSES)
    given_label = torch.distributions.Categorical(probs=centroids).entropy()[labels]
    given_image = torch.distributions.Categorical(logits=logits).entropy()
    divergence = divergence_from_centroids(logits, labels, centroids)
    torch.testing.assert_close(divergence.mean(), (given_label - given_image).mean())
    counts = torch.bincount(labels, minlength=CLASSES)
    assert (divergence <= counts[labels].log() + 1e-12).all()


def test_the_floor_keeps_extreme_values_finite() -> None:
    logits = torch.tensor([[60.0, -60.0, 0.0], [-60.0, 60.0, 0.0]], requires_grad=True)
    centroids = torch.tensor([[0.0, 1.0, 0.0], [0.0, 1.0, 0.0], [0.3, 0.3, 0.4]])
    divergence = divergence_from_centroids(logits, torch.tensor([0, 1]), centroids)
    np.testing.assert_allclose(divergence.detach(), [-math.log(1e-12), 0], atol=1e-5)
    divergence.sum().backward()
    assert logits.grad is not None
    assert logits.grad.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_single(dtype: torch.dtype) -> None:
    logits, labels = draw(6, CLASSES, dtype=torch.float32).to(dtype), classes(6)
    centroids = class_centroids(logits, labels, num_classes=CLASSES)
    assert centroids.dtype == torch.float32
    assert torch.equal(centroids, class_centroids(logits.float(), labels, num_classes=CLASSES))
    found = divergence_from_centroids(logits, labels, centroids)
    assert found.dtype == torch.float32
    assert torch.equal(found, divergence_from_centroids(logits.float(), labels, centroids))


def test_centroids_are_means_of_each_class_by_hand() -> None:
    logits, labels = draw(30, CLASSES), classes(30).clamp(max=3)
    predictions = softmax(logits.numpy(), axis=1)
    wanted = [predictions[labels.numpy() == label].mean(axis=0) for label in range(4)]
    found = class_centroids(logits, labels, num_classes=CLASSES)
    np.testing.assert_allclose(found[:4], wanted, rtol=1e-12)
    np.testing.assert_allclose(found[4], 1 / CLASSES)  # no example of it


def test_centroids_do_not_depend_on_the_order_and_are_distributions() -> None:
    logits, labels = draw(30, CLASSES), classes(30)
    order = torch.randperm(30, generator=torch.Generator().manual_seed(1))
    found = class_centroids(logits, labels, num_classes=CLASSES)
    torch.testing.assert_close(class_centroids(logits[order], labels[order], num_classes=CLASSES), found)
    torch.testing.assert_close(found.sum(dim=1), torch.ones(CLASSES, dtype=torch.float64))
    assert torch.equal(class_centroids(logits[:0], labels[:0], num_classes=CLASSES), torch.full_like(found, 0.2))


def test_running_centroids_by_hand() -> None:
    """One example after another, each with its own share."""
    momentum, labels, logits = 0.8, classes(40), draw(40, CLASSES)
    predictions = softmax(logits.numpy(), axis=1)
    wanted, seen = np.full((CLASSES, CLASSES), 0.2), np.zeros(CLASSES)
    centroids, counts = (
        torch.full((CLASSES, CLASSES), 0.2, dtype=torch.float64),
        torch.zeros(CLASSES, dtype=torch.int64),
    )
    for row in range(40):
        label = int(labels[row])
        seen[label] += 1
        wanted[label] += max(1 - momentum, 1 / seen[label]) * (predictions[row] - wanted[label])
        one = slice(row, row + 1)
        centroids, counts = running_centroids(centroids, counts, logits[one], labels[one], momentum=momentum)
    np.testing.assert_allclose(centroids, wanted, rtol=1e-10)
    np.testing.assert_array_equal(counts, seen)


def test_running_centroids_of_a_batch_move_as_far_as_of_single_examples() -> None:
    """If a class's predictions are all the same, it does not matter how they fall into batches."""
    logits, labels = draw(1, CLASSES).expand(6, -1), torch.zeros(6, dtype=torch.int64)
    start = torch.full((CLASSES, CLASSES), 0.2, dtype=torch.float64)
    seen = torch.full((CLASSES,), 1000)
    whole, _ = running_centroids(start, seen, logits, labels, momentum=0.9)
    split, between = running_centroids(start, seen, logits[:2], labels[:2], momentum=0.9)
    split, after = running_centroids(split, between, logits[2:], labels[2:], momentum=0.9)
    torch.testing.assert_close(whole, split)
    assert after.tolist() == [1006, 1000, 1000, 1000, 1000]
    assert torch.equal(whole[1:], start[1:])


@pytest.mark.parametrize("sizes", [(30,), (7, 23), (1,) * 30], ids=str)
def test_without_forgetting_they_are_exact_means(sizes: tuple[int, ...]) -> None:
    logits, labels = draw(30, CLASSES), classes(30)
    centroids, counts = (
        torch.full((CLASSES, CLASSES), 0.2, dtype=torch.float64),
        torch.zeros(CLASSES, dtype=torch.int64),
    )
    for rows in torch.arange(30).split(sizes):
        centroids, counts = running_centroids(centroids, counts, logits[rows], labels[rows], momentum=1.0)
    torch.testing.assert_close(centroids, class_centroids(logits, labels, num_classes=CLASSES))
    assert torch.equal(counts, torch.bincount(labels, minlength=CLASSES))


@pytest.mark.parametrize(
    ("logits", "labels", "centroids", "message"),
    [
        ((4,), torch.zeros(4, dtype=torch.int64), (5, 5), r"needs logits \[B, K\] and labels \[B\], got \[4\]"),
        ((4, 5), torch.zeros(3, dtype=torch.int64), (5, 5), r"got \[4, 5\] and \[3\]"),
        ((4, 5), torch.zeros(4), (5, 5), r"labels must be integer class ids, got torch\.float32"),
        ((4, 5), torch.zeros(4, dtype=torch.int64), (4, 5), r"centroids must be \[K, K\] .* got \[4, 5\]"),
    ],
)  # fmt: skip
def test_wrong_input_is_refused(logits: Any, labels: Tensor, centroids: Any, message: str) -> None:
    values, means, counts = torch.zeros(logits), torch.zeros(centroids), torch.zeros(5)
    with pytest.raises(InputError, match=message):
        divergence_from_centroids(values, labels, means)
    with pytest.raises(InputError, match=message):
        running_centroids(means, counts, values, labels, momentum=0.5)
    if centroids == (5, 5):
        with pytest.raises(InputError, match=message):
            class_centroids(values, labels, num_classes=5)


@pytest.mark.parametrize("momentum", [-0.1, 1.1, float("nan")])
def test_impossible_momentum_is_refused(momentum: float) -> None:
    logits, labels = draw(4, CLASSES), classes(4)
    with pytest.raises(InputError, match=r"momentum must be in \[0, 1\], got"):
        running_centroids(torch.zeros(5, 5), torch.zeros(5), logits, labels, momentum=momentum)
    with pytest.raises(ValidationError):
        ClassInformationConfig(momentum=momentum)


def test_impossible_labels_and_numbers_of_classes_are_refused() -> None:
    with pytest.raises(InputError, match="labels must be class ids from 0 to 4, got 0 to 5"):
        class_centroids(torch.zeros(2, 5), torch.tensor([0, 5]), num_classes=5)
    with pytest.raises(InputError, match="labels must be class ids from 0 to 4, got -1 to 0"):
        class_centroids(torch.zeros(2, 5), torch.tensor([0, -1]), num_classes=5)
    with pytest.raises(InputError, match=r"4 classes need logits \[B, 4\], got \[2, 5\]"):
        class_centroids(torch.zeros(2, 5), torch.tensor([0, 1]), num_classes=4)


def test_without_a_survey_it_rewards_sureness(objective: Any) -> None:
    logits = draw(6, CLASSES, dtype=torch.float32)
    entropy = torch.distributions.Categorical(logits=logits).entropy().mean()
    torch.testing.assert_close(objective(step_of(logits, classes(6))), entropy - math.log(CLASSES))


def test_the_survey_gives_the_exact_means_and_the_loss_minus_the_information(objective: Any) -> None:
    assert objective.surveys
    logits, labels = draw(30, CLASSES, dtype=torch.float32), classes(30)
    for rows in torch.arange(30).split((8, 8, 8, 6)):
        objective.survey(step_of(logits[rows].requires_grad_(), labels[rows]))
    centroids = class_centroids(logits, labels, num_classes=CLASSES)
    torch.testing.assert_close(objective.centroids, centroids)
    assert not objective.centroids.requires_grad
    information = divergence_from_centroids(logits, labels, centroids).mean()
    torch.testing.assert_close(objective(step_of(logits, labels)), -information)
    assert information > 0


def test_training_moves_running_centroids_and_leaves_frozen_ones(task: Task) -> None:
    first, second = (draw(30, CLASSES, seed=seed, dtype=torch.float32) for seed in (0, 1))
    labels = classes(30)
    for config in (ClassInformationConfig(momentum=0.5), ClassInformationFrozenConfig()):
        objective = config.build(task)
        objective.survey(step_of(first, labels))
        before = objective.centroids.clone()
        objective.update(step_of(second, labels))
        if isinstance(objective, ClassInformationFrozen):
            assert torch.equal(objective.centroids, before)
        else:
            counts = torch.bincount(labels, minlength=CLASSES)
            rate = torch.maximum(1 - 0.5**counts, torch.tensor(0.5)).unsqueeze(-1)
            wanted = before + rate * (class_centroids(second, labels, num_classes=CLASSES) - before)
            torch.testing.assert_close(objective.centroids, wanted)


def test_a_step_along_the_gradient_adds_information() -> None:
    logits, labels = draw(30, CLASSES).requires_grad_(), classes(30)
    objective = ClassInformation(ClassInformationConfig(), Task(num_examples=30, num_classes=CLASSES)).double()
    objective.survey(step_of(logits.detach(), labels))
    objective(step_of(logits, labels)).backward()
    assert logits.grad is not None
    moved = logits.detach() - logits.grad
    before, after = (
        divergence_from_centroids(value, labels, class_centroids(value, labels, num_classes=CLASSES)).mean()
        for value in (logits.detach(), moved)
    )
    assert after > before


def test_autocast_rounds_nothing(objective: Any) -> None:
    other, step = copy.deepcopy(objective), step_of(draw(12, CLASSES, dtype=torch.float32), classes(12))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        objective.survey(step)
        objective.update(step)
        mixed = objective(step)
    other.survey(step)
    other.update(step)
    assert torch.equal(objective.centroids, other.centroids)
    assert torch.equal(mixed, other(step))


def test_extreme_logits_and_a_batch_of_one_stay_finite(objective: Any) -> None:
    logits = torch.tensor([[60.0, -60.0, 60.0, 0.0, -60.0]], requires_grad=True)
    objective.survey(step_of(logits.detach().flip(1), torch.tensor([2])))
    for _ in range(3):
        loss = objective(step_of(logits, torch.tensor([2])))
        (gradient,) = torch.autograd.grad(loss, logits)
        objective.update(step_of(logits, torch.tensor([2])))
        assert loss.shape == ()
        assert loss.dtype == torch.float32
        assert loss.isfinite()
        assert gradient.isfinite().all()
        assert objective.centroids.isfinite().all()


def test_forward_reads_and_a_resumed_objective_goes_on(
    objective: Any, network: Any, make_step: Callable[..., Any]
) -> None:
    objective.survey(make_step(network))
    objective.update(make_step(network, seed=1))
    state, step = copy.deepcopy(objective.state_dict()), make_step(network, seed=2)
    loss = objective(step)
    assert torch.equal(loss, objective(step))
    assert all(torch.equal(value, state[name]) for name, value in objective.state_dict().items())
    resumed = type(objective)(objective.config, Task(num_examples=12, num_classes=CLASSES))
    resumed.load_state_dict(state)
    for other in (objective, resumed):
        other.update(step)
    later = make_step(network, seed=3)
    assert torch.equal(objective(later), resumed(later))
    loss.backward()
    assert sum(parameter.grad.norm() for parameter in network.parameters() if parameter.grad is not None) > 0
