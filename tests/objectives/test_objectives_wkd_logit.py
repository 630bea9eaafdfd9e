import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from scipy.optimize import linprog
from scipy.special import log_softmax, softmax
from torch import Tensor, nn

from soteacher.errors import InputError
from soteacher.objectives.student.wkd_logit import (
    WKDLogitConfig,
    class_cost,
    sinkhorn_distance,
    wkd_logit_distance,
)
from soteacher.types import DistillStep

SETTINGS: dict[str, Any] = {"temperature": 2.0, "transport_weight": 50.0, "regularization": 0.05, "num_iterations": 10}


@pytest.fixture
def given() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Student, teacher, labels and costs of five classes."""
    torch.manual_seed(0)
    student, teacher = torch.randn(3, 5, dtype=torch.float64), torch.randn(3, 5, dtype=torch.float64)
    cost = class_cost(torch.randn(5, 7, dtype=torch.float64), sharpness=1.0)
    return student, teacher, torch.tensor([4, 0, 2]), cost


def exact_distance(first: Any, second: Any, cost: Any) -> float:
    """Solve the transport as a linear programme."""
    size = len(first)
    rows = np.kron(np.eye(size), np.ones((1, size)))
    columns = np.kron(np.ones((1, size)), np.eye(size))
    found = linprog(cost.ravel(), A_eq=np.vstack([rows, columns]), b_eq=np.concatenate([first, second]))
    assert found.success
    return float(found.fun)


def sinkhorn(first: Any, second: Any, cost: Any, regularization: float, num_iterations: int) -> float:
    """Sinkhorn's iterations as in the books, on the vectors themselves."""
    kernel = np.exp(-cost / regularization)
    u = np.ones_like(first)
    for _ in range(num_iterations):
        v = second / (kernel.T @ u)
        u = first / (kernel @ v)
    return float((u[:, None] * kernel * v * cost).sum())


def test_class_cost_by_hand() -> None:
    weights = torch.tensor([[1.0, 0.0], [0.0, 2.0], [-3.0, 0.0]])
    one, two = 1 - math.exp(-1.5), 1 - math.exp(-3.0)
    expected = torch.tensor([[0, one, two], [one, 0, one], [two, one, 0]])
    torch.testing.assert_close(class_cost(weights, sharpness=1.5), expected)


def test_sinkhorn_distance_nears_the_exact_transport(given: tuple[Tensor, ...]) -> None:
    student, teacher, _, cost = given
    first, second = softmax(student.numpy(), axis=1), softmax(teacher.numpy(), axis=1)
    expected = [exact_distance(a, b, cost.numpy()) for a, b in zip(first, second, strict=True)]
    found = sinkhorn_distance(
        torch.from_numpy(first).log(), torch.from_numpy(second).log(), cost, regularization=0.003, num_iterations=3000
    )
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64), rtol=1e-3, atol=0)


def test_sinkhorn_distance_equals_the_textbook(given: tuple[Tensor, ...]) -> None:
    student, teacher, _, cost = given
    expected = [
        sinkhorn(softmax(s), softmax(t), cost.numpy(), 0.05, 10)
        for s, t in zip(student.numpy(), teacher.numpy(), strict=True)
    ]
    found = sinkhorn_distance(
        student.log_softmax(1), teacher.log_softmax(1), cost, regularization=0.05, num_iterations=10
    )
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64))


def test_sinkhorn_distance_of_single_classes_is_their_cost(given: tuple[Tensor, ...]) -> None:
    cost = given[3].float()
    sure = (200 * torch.eye(5) - 100).log_softmax(1)
    found = sinkhorn_distance(sure, sure.roll(1, dims=0), cost, regularization=0.05, num_iterations=10)
    torch.testing.assert_close(found, cost.roll(1, dims=0).diagonal())


def test_wkd_logit_distance_leaves_the_label_out_of_the_transport(given: tuple[Tensor, ...]) -> None:
    student, teacher, labels, cost = (value.numpy() for value in given)
    expected = []
    for s, t, label in zip(student, teacher, labels, strict=True):
        kept = np.arange(5) != label
        transport = sinkhorn(softmax(s[kept] / 2), softmax(t[kept] / 2), cost[np.ix_(kept, kept)], 0.05, 10)
        expected.append(50 * transport - softmax(t)[label] * log_softmax(s)[label])
    found = wkd_logit_distance(*given, **SETTINGS)
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64), rtol=1e-6, atol=0)


def test_wkd_logit_distance_ignores_the_names_of_the_classes(given: tuple[Tensor, ...]) -> None:
    student, teacher, labels, cost = given
    order = torch.tensor([3, 0, 4, 1, 2])
    place = order.argsort()
    found = wkd_logit_distance(student[:, order], teacher[:, order], place[labels], cost[order][:, order], **SETTINGS)
    torch.testing.assert_close(found, wkd_logit_distance(*given, **SETTINGS))


def test_wkd_logit_distance_has_the_right_gradient(given: tuple[Tensor, ...]) -> None:
    student, teacher, labels, cost = given
    teacher.requires_grad_()
    assert torch.autograd.gradcheck(
        lambda z: wkd_logit_distance(z, teacher.detach(), labels, cost, **SETTINGS), student.requires_grad_()
    )
    wkd_logit_distance(student, teacher, labels, cost, **SETTINGS).sum().backward()
    assert teacher.grad is None


@pytest.mark.parametrize("temperature", [0.5, 8.0])
def test_wkd_logit_distance_is_finite_for_extreme_logits(given: tuple[Tensor, ...], temperature: float) -> None:
    extreme = (120 * torch.eye(5) - 60).requires_grad_()
    teacher, labels = extreme.detach().roll(1, dims=0), torch.arange(5)
    value = wkd_logit_distance(
        extreme, teacher, labels, given[3].float(), **(SETTINGS | {"temperature": temperature})
    ).sum()
    value.backward()
    assert value.isfinite()
    assert extreme.grad is not None
    assert extreme.grad.isfinite().all()


@pytest.mark.parametrize("pair_name", ["same family", "other family", "transformer teacher", "transformer student"])
def test_wkd_logit_trains_every_pair(make_pair: Callable[[str], Any], pair_name: str) -> None:
    pair = make_pair(pair_name)
    objective = WKDLogitConfig().build(pair.task)
    step = pair.step(objective)
    loss = objective(step)
    assert loss.isfinite()
    assert loss > 0
    assert torch.autograd.grad(loss, step.outputs.logits)[0].abs().sum() > 0
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(objective(step), loss, rtol=1e-6, atol=0)


def test_wkd_logit_lets_the_transport_fade(make_pair: Callable[[str], Any]) -> None:
    pair = make_pair("same family")
    objective = WKDLogitConfig(decay_start=0.5).build(pair.task)
    step = pair.step(objective)

    def loss(epoch: int) -> float:
        object.__setattr__(step, "epoch", epoch)
        return objective(step).item()

    label_only = WKDLogitConfig(transport_weight=0.0).build(pair.task)(step).item()
    early, last = loss(2), loss(3)  # of four epochs; in the last one half of the cosine is gone
    assert early == loss(1) == loss(0) > last > label_only
    assert last - label_only == pytest.approx((early - label_only) / 2, rel=1e-4)


def test_wkd_logit_needs_a_live_teacher(
    network: nn.Module, make_step: Callable[..., DistillStep], make_pair: Callable[[str], Any]
) -> None:
    objective = WKDLogitConfig().build(make_pair("same family").task)
    with pytest.raises(InputError, match="needs a live one"):
        objective(make_step(network))


def test_impossible_input_is_refused(given: tuple[Tensor, ...]) -> None:
    student, teacher, labels, cost = given
    for wrong, message in (
        ({"temperature": 0.0}, "temperature must be positive"),
        ({"regularization": 0.0}, "regularization must be positive"),
        ({"num_iterations": 0}, "num_iterations must be at least 1, got 0"),
    ):
        with pytest.raises(InputError, match=message):
            wkd_logit_distance(*given, **(SETTINGS | wrong))
    with pytest.raises(InputError, match=r"costs \[K, K\], got \[3, 5\], \[3, 5\] and \[4, 4\]"):
        wkd_logit_distance(student, teacher, labels, cost[:4, :4], **SETTINGS)
    with pytest.raises(InputError, match=r"prototypes must be \[K, D\], got \[5\]"):
        class_cost(torch.zeros(5), sharpness=1.0)
    with pytest.raises(InputError, match="sharpness must be positive"):
        class_cost(torch.zeros(5, 2), sharpness=0.0)
