from collections.abc import Callable

import numpy as np
import pytest
import torch
from scipy.linalg import sqrtm
from torch import nn

from soteacher.errors import InputError
from soteacher.objectives.connectors import MapConnector
from soteacher.objectives.student.wkd_feature import METHOD, WKDFeatureConfig, gaussian_wasserstein_distance
from soteacher.types import DistillStep, NetworkFacts, Task


def test_gaussian_wasserstein_distance_equals_the_general_formula() -> None:
    rng = np.random.default_rng(0)
    student, teacher = rng.standard_normal((3, 4, 5, 2)), 2 * rng.standard_normal((3, 4, 3, 3)) + 1
    expected = []
    for s, t in zip(student.reshape(3, 4, -1), teacher.reshape(3, 4, -1), strict=True):
        first, second = (np.diag(x.var(axis=1, ddof=1) + 1e-5) for x in (s, t))
        root = sqrtm(first)
        trace = np.trace(first + second - 2 * sqrtm(root @ second @ root)).real
        expected.append(3 * np.square(s.mean(axis=1) - t.mean(axis=1)).sum() + trace)
    found = gaussian_wasserstein_distance(torch.from_numpy(student), torch.from_numpy(teacher), mean_weight=3.0)
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64))


def test_gaussian_wasserstein_distance_is_zero_for_equal_moments() -> None:
    torch.manual_seed(0)
    maps = torch.randn(2, 3, 4, 4)
    turned = maps.flatten(2)[:, :, torch.randperm(16)].reshape(maps.shape)  # the places of pixels do not matter
    found = gaussian_wasserstein_distance(turned, maps, mean_weight=4.0)
    torch.testing.assert_close(found, torch.zeros(2), rtol=0, atol=1e-9)


def test_gaussian_wasserstein_distance_gradient_reaches_the_student_only() -> None:
    torch.manual_seed(0)
    student, teacher = (torch.randn(2, 2, 2, 2, dtype=torch.float64).requires_grad_() for _ in range(2))
    assert torch.autograd.gradcheck(
        lambda x: gaussian_wasserstein_distance(x, teacher.detach(), mean_weight=2.0), student
    )
    gaussian_wasserstein_distance(student, teacher, mean_weight=2.0).sum().backward()
    assert teacher.grad is None


@pytest.mark.parametrize("side", [1, 3])
def test_gradients_are_finite_without_variance(side: int) -> None:
    student = torch.full((2, 3, side, side), 0.5, requires_grad=True)
    value = gaussian_wasserstein_distance(student, torch.randn(2, 3, 4, 4), mean_weight=4.0).sum()
    value.backward()
    assert value.isfinite()
    assert student.grad is not None
    assert student.grad.isfinite().all()


def test_gaussian_wasserstein_distance_refuses_what_does_not_fit() -> None:
    with pytest.raises(InputError, match=r"got \[2, 3, 4, 4\] and \[2, 4, 4, 4\]"):
        gaussian_wasserstein_distance(torch.zeros(2, 3, 4, 4), torch.zeros(2, 4, 4, 4), mean_weight=1.0)
    with pytest.raises(InputError, match="mean_weight must be at least 0 and finite, got -1"):
        gaussian_wasserstein_distance(torch.zeros(2, 3, 4, 4), torch.zeros(2, 3, 4, 4), mean_weight=-1.0)


@pytest.mark.parametrize(("tap", "rectified"), [("stage2", True), ("stage1", False), ("maps", False)])
def test_connector_is_rectified_where_the_teacher_is(tap: str, rectified: bool) -> None:
    taps = {"stage1": (4, 3, 3), "stage2": (4, 3, 3), "preactivation2": (4, 3, 3), "maps": (4, 3, 3)}
    facts = NetworkFacts(name="network", taps=taps, num_logits=2)
    task = Task(num_examples=3, num_classes=2, network=facts, teacher=facts)
    objective = WKDFeatureConfig(student_taps=("stage2",), teacher_taps=(tap,)).build(task)
    (connector,) = objective.connectors
    assert isinstance(connector, MapConnector)
    assert connector.rectify is rectified


@pytest.mark.parametrize(
    ("epoch", "share"),
    [(0, 1.0), (150, 1.0), (195, (1 + np.cos(np.pi / 2)) / 2), (210, (1 + np.cos(np.pi * 2 / 3)) / 2)],
)
def test_weight_falls_from_epoch_150_of_240_on(make_step: Callable[..., DistillStep], epoch: int, share: float) -> None:
    torch.manual_seed(0)
    facts = NetworkFacts(name="network", taps={"stage1": (2, 3, 3)}, num_logits=2)
    task = Task(num_examples=3, num_classes=2, network=facts, teacher=facts)
    maps = {"stage1": torch.randn(4, 2, 3, 3)}
    values = {"logits": torch.randn(4, 2), "features": maps, "teacher_features": {"stage1": torch.randn(4, 2, 3, 3)}}
    step = make_step(nn.Identity(), epoch=epoch, num_epochs=240, **values)
    settled, fading = (WKDFeatureConfig(decay_start=start).build(task) for start in (1.0, 0.625))
    fading.load_state_dict(settled.state_dict())
    torch.testing.assert_close(fading(step), share * settled(step))


def test_wkd_feature_has_the_released_settings() -> None:
    assert WKDFeatureConfig().mean_weight == 4.0
    assert METHOD.terms == {"cross_entropy": {"weight": 1.0}, "wkd_feature": {"weight": 0.006}}
