import math
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from soteacher.diagnostics.lipschitz import (
    LayerNorm,
    input_gradient_norms,
    largest_slope,
    layer_norms,
    log10_products,
)
from soteacher.errors import InputError
from soteacher.models.classifier import Classifier
from soteacher.models.zoo import build_network


def randomised(network: nn.Module) -> Any:
    """Draw weights and statistics that differ from the initial ones."""
    torch.manual_seed(1)
    for parameter in network.parameters():
        nn.init.normal_(parameter)
    for module in network.modules():
        if isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d)) and module.running_var is not None:
            module.running_var.uniform_(0.2, 3.0)
    return network


def singular_value(operator: nn.Module, shape: tuple[int, ...]) -> float:
    """The largest one of the operator's matrix, built by sending every unit vector through it."""
    units = torch.eye(math.prod(shape)).unflatten(1, shape)
    with torch.no_grad():
        columns = operator.eval()(units) - operator(torch.zeros(1, *shape))
    return float(np.linalg.svd(columns.flatten(1).double().numpy(), compute_uv=False)[0])


def column_sum(operator: nn.Module, shape: tuple[int, ...]) -> float:
    """The largest absolute one of the operator's matrix."""
    with torch.no_grad():
        columns = operator.eval()(torch.eye(math.prod(shape)).unflatten(1, shape)) - operator(torch.zeros(1, *shape))
    return float(columns.flatten(1).abs().sum(dim=1).max())


class Mixed(nn.Module):
    """Operators of every kind, in another order than they are defined in; one takes no part, one runs twice."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(6, 5)
        self.unused = nn.Linear(6, 6)
        self.first = nn.Conv2d(3, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4)
        self.twice = nn.Conv2d(4, 4, 3, padding=1, groups=2)
        self.strided = nn.Conv2d(4, 6, 3, stride=2, padding=1, bias=False)
        self.alone = nn.BatchNorm2d(4)
        self.rows = nn.Linear(6, 6)
        self.rows_norm = nn.BatchNorm1d(6, affine=False)
        self.up = nn.ConvTranspose2d(6, 6, 2, stride=2)

    def forward(self, images: Tensor) -> Tensor:
        maps = self.norm(self.first(images))
        maps = self.alone(maps + self.twice(self.twice(maps)))
        rows = self.up(self.strided(maps.relu())).mean((2, 3))
        return self.head(self.rows_norm(self.rows(rows)))


def test_layer_norms_are_those_of_dense_matrices() -> None:
    network = randomised(Mixed())
    found = layer_norms(network, torch.rand(4, 3, 8, 8))
    operators: dict[str, tuple[str | None, nn.Module, tuple[int, ...]]] = {
        "first": ("norm", nn.Sequential(network.first, network.norm), (3, 8, 8)),
        "twice": (None, network.twice, (4, 8, 8)),
        "alone": (None, network.alone, (4, 8, 8)),
        "strided": (None, network.strided, (4, 8, 8)),
        "up": (None, network.up, (6, 4, 4)),
        "rows": ("rows_norm", nn.Sequential(network.rows, network.rows_norm), (6,)),
        "head": (None, network.head, (6,)),
    }
    assert [layer.layer for layer in found] == list(operators)
    for layer in found:
        batch_norm, operator, shape = operators[layer.layer]
        exact = singular_value(operator, shape)
        assert layer.batch_norm == batch_norm
        assert 0.99 * exact <= layer.norm_2 <= exact * (1 + 1e-5), layer.layer
        if layer.layer in ("alone", "rows", "head"):
            assert layer.norm_2 == pytest.approx(exact, rel=1e-5)
        assert layer.norm_1 == pytest.approx(column_sum(operator, shape), rel=1e-5), layer.layer


def test_layer_norms_of_a_classifier_have_the_paths_of_its_network() -> None:
    torch.manual_seed(0)
    network = build_network("wrn_10_1", num_classes=5)
    classifier = Classifier(network, mean=[0.5] * 3, std=[0.25] * 3)
    found = layer_norms(classifier, torch.rand(2, 3, 16, 16))
    block = ["bn1", "conv1", "conv2"]
    with_shortcut = ["bn1", "convShortcut", "conv1", "conv2"]
    blocks = [
        f"block{n}.layer.0.{name}"
        for n, names in ((1, block), (2, with_shortcut), (3, with_shortcut))
        for name in names
    ]
    assert [layer.layer for layer in found] == ["conv1", *blocks, "bn1", "fc"]
    assert [layer.batch_norm for layer in found if layer.batch_norm] == [f"block{n}.layer.0.bn2" for n in (1, 2, 3)]
    assert found == layer_norms(classifier, torch.rand(2, 3, 16, 16))


def test_log10_products_by_hand() -> None:
    def layer(norm_1: float, norm_2: float) -> LayerNorm:
        return LayerNorm(layer="a", batch_norm=None, norm_1=norm_1, norm_2=norm_2)

    found = log10_products([layer(10, 2), layer(100, 0.5)])
    assert found == pytest.approx({"log10_product_1": 3.0, "log10_product_2": 0.0})
    assert log10_products([layer(10, 0), layer(1, 1)]) == {"log10_product_1": 1.0, "log10_product_2": None}
    assert log10_products([]) == {"log10_product_1": None, "log10_product_2": None}
    huge = log10_products([layer(1e200, 1e-200)] * 3)
    assert huge == pytest.approx({"log10_product_1": 600.0, "log10_product_2": -600.0})


class Linear(nn.Module):
    """Logits that are a matrix times the image."""

    def __init__(self, matrix: Tensor) -> None:
        super().__init__()
        self.matrix = nn.Parameter(matrix)

    def forward(self, images: Tensor) -> Tensor:
        return images.flatten(1) @ self.matrix.T


class Constant(nn.Module):
    """The same logits for all images: with a batch norm of no interest to them."""

    def __init__(self) -> None:
        super().__init__()
        self.logits = nn.Parameter(torch.tensor([1.0, 2.0]))

    def forward(self, images: Tensor) -> Tensor:
        return self.logits.expand(len(images), 2)


@pytest.fixture
def smooth() -> Classifier:
    torch.manual_seed(0)
    network = nn.Sequential(
        nn.Conv2d(1, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(), nn.Dropout(0.5), nn.Flatten(), nn.Linear(216, 4)
    )
    return Classifier(network, mean=[0.4], std=[0.3])


def middle(count: int = 6, channels: int = 1, side: int = 6) -> Tensor:
    """Images away from black and white."""
    return torch.rand(count, channels, side, side, generator=torch.Generator().manual_seed(5)) * 0.4 + 0.3


def test_input_gradient_norms_of_a_linear_softmax() -> None:
    torch.manual_seed(0)
    matrix, images, labels = torch.randn(5, 12), torch.rand(70, 3, 2, 2), torch.arange(70) % 5
    classifier = Classifier(Linear(matrix), mean=[0.1, 0.2, 0.3], std=[0.5, 0.25, 2.0])
    found = input_gradient_norms(classifier, images, labels)
    std = np.repeat([0.5, 0.25, 2.0], 4)
    normalised = (images.flatten(1).numpy() - np.repeat([0.1, 0.2, 0.3], 4)) / std
    logits = normalised @ matrix.numpy().T
    shares = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    expected = np.linalg.norm(((np.eye(5)[labels.numpy()] - shares) @ matrix.numpy()) / std, axis=1)
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-4)


def test_input_gradient_norms_by_finite_differences(smooth: Classifier) -> None:
    smooth.double()
    images, labels = middle(3).double(), torch.tensor([0, 1, 3])
    found = input_gradient_norms(smooth, images, labels)
    units = torch.eye(36, dtype=torch.float64).view(36, 1, 6, 6) * 1e-6
    smooth.eval()
    for image, label, norm in zip(images, labels, found, strict=True):
        ahead, behind = (smooth(image + sign * units).log_softmax(1)[:, label] for sign in (1, -1))
        torch.testing.assert_close(norm, ((ahead - behind) / 2e-6).norm(), rtol=1e-5, atol=0)


def test_largest_slope_of_a_linear_map_is_its_largest_singular_value() -> None:
    torch.manual_seed(0)
    matrix = torch.randn(5, 27)
    classifier = Classifier(Linear(matrix), mean=[0.5] * 3, std=[0.25] * 3)
    expected = np.linalg.svd(matrix.numpy(), compute_uv=False)[0] / 0.25
    found = largest_slope(classifier, middle(8, 3, 3), radius=0.1, steps=20, seed=0)
    assert found.max() <= expected * (1 + 1e-4)
    assert found.min() > 0.99 * expected


@pytest.mark.parametrize("radius", [1e-3, 2.5, 10.0])
def test_a_search_of_any_radius_goes_on_where_a_gradient_is_zero(radius: float) -> None:
    # Of the first half of the images the logits do not depend on the image at all: their gradient is 0 everywhere.
    class Half(Linear):
        def forward(self, images: Tensor) -> Tensor:
            return super().forward(images) * torch.tensor([0.0, 0, 0, 1, 1, 1])[: len(images), None]

    seen: list[Tensor] = []
    network = Half(torch.randn(5, 27, generator=torch.Generator().manual_seed(0)))
    network.register_forward_pre_hook(lambda _, arguments: seen.append(arguments[0].detach().clone()))
    found = largest_slope(network, middle(6, 3, 3), radius=radius, steps=8, seed=0)
    assert not found[:3].any()
    assert found[3:].min() > 0
    assert all(places.isfinite().all() for places in seen)


def test_largest_slope_of_a_map_that_keeps_lengths_is_1() -> None:
    rotation = torch.linalg.qr(torch.randn(12, 12, generator=torch.Generator().manual_seed(0)))[0]
    for steps in (1, 5):
        found = largest_slope(Linear(rotation), middle(4, 3, 2), radius=0.2, steps=steps, seed=steps)
        torch.testing.assert_close(found, torch.ones(4), rtol=1e-4, atol=0)


def test_a_constant_network_has_no_slope() -> None:
    images = middle()
    assert not largest_slope(Constant(), images, radius=0.5, steps=2, seed=0).any()
    assert not input_gradient_norms(Constant(), images, torch.zeros(6, dtype=torch.int64)).any()
    blind = Linear(torch.zeros(3, 36))
    assert not largest_slope(blind, images, radius=0.5, steps=2, seed=0).any()
    assert not input_gradient_norms(blind, images, torch.zeros(6, dtype=torch.int64)).any()


def test_largest_slope_only_grows_with_steps_and_beats_random_places(smooth: Classifier) -> None:
    images = middle()
    found = [largest_slope(smooth, images, radius=0.3, steps=steps, seed=3) for steps in (1, 2, 4, 8)]
    for fewer, more in pairwise(found):
        assert (more >= fewer).all()
    smooth.eval()
    torch.manual_seed(0)
    for image, slope in zip(images, found[-1], strict=True):
        offsets = torch.nn.functional.normalize(torch.randn(2000, 36)).view(-1, 1, 6, 6) * 0.3
        rises = (smooth(image + offsets) - smooth(image[None])).norm(dim=1)
        assert slope > rises.max() / 0.3
    bound = 10 ** (log10_products(layer_norms(smooth, images))["log10_product_2"] or 0) / 0.3
    assert found[-1].max() < bound * 1.01  # a chain of layers: the product of the norms and of the normalisation


def test_largest_slope_stays_in_the_ball_and_among_images(smooth: Classifier) -> None:
    seen: list[Tensor] = []
    smooth.register_forward_pre_hook(lambda _, arguments: seen.append(arguments[0].detach().clone()))
    images = torch.cat([torch.zeros(2, 1, 6, 6), torch.ones(2, 1, 6, 6), middle(2)])
    slopes = largest_slope(smooth, images, radius=1.5, steps=3, seed=0)
    assert slopes.isfinite().all()
    assert slopes.min() > 0
    assert len(seen) == 3 + 2
    assert torch.equal(seen[0], images)
    for places in seen:
        assert places.min() >= 0
        assert places.max() <= 1
        assert ((places - images).flatten(1).norm(dim=1) <= 1.5 * (1 + 1e-5)).all()


@pytest.mark.parametrize("name", ["slope", "gradient"])
def test_figures_are_seeded_and_do_not_depend_on_how_many_run_at_once(
    smooth: Classifier, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = middle(10)
    figures: dict[str, Callable[[], Tensor]] = {
        "slope": lambda: largest_slope(smooth, images, radius=0.2, steps=2, seed=1),
        "gradient": lambda: input_gradient_norms(smooth, images, torch.arange(10) % 4),
    }
    before = figures[name]()
    assert before.shape == (10,)
    assert torch.equal(figures[name](), before)
    monkeypatch.setattr("soteacher.diagnostics.lipschitz.CHUNK", 3)
    with torch.no_grad():
        torch.testing.assert_close(figures[name](), before, rtol=1e-4, atol=0)
    assert not torch.equal(largest_slope(smooth, images, radius=0.2, steps=2, seed=2), before)


def test_the_network_is_left_as_it_was(smooth: Classifier) -> None:
    smooth.network[1].eval()
    smooth.network[0].bias.requires_grad_(False)
    seen: list[bool] = []
    weight = smooth.network[0].weight
    handle = smooth.register_forward_hook(lambda *_: seen.append(weight.requires_grad or smooth.network[0].training))
    modes = [module.training for module in smooth.modules()]
    trainable = [parameter.requires_grad for parameter in smooth.parameters()]
    state = {key: value.clone() for key, value in smooth.state_dict().items()}
    images = middle()
    layer_norms(smooth, images)
    input_gradient_norms(smooth, images, torch.zeros(6, dtype=torch.int64))
    largest_slope(smooth, images, radius=0.1, steps=1, seed=0)
    with pytest.raises(InputError):
        largest_slope(smooth, torch.rand(2, 3, 6, 6), radius=0.1, steps=1, seed=0)
    handle.remove()
    assert len(seen) == 1 + 1 + 1 + 3
    assert not any(seen[1:])  # the first pass looks at what follows what, without any gradient
    assert [module.training for module in smooth.modules()] == modes
    assert [parameter.requires_grad for parameter in smooth.parameters()] == trainable
    assert all(torch.equal(value, state[key]) for key, value in smooth.state_dict().items())
    assert all(parameter.grad is None for parameter in smooth.parameters())
    assert not images.requires_grad
    assert not any(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in smooth.modules())


def test_what_does_not_fit_is_refused(smooth: Classifier) -> None:
    images = middle()
    with pytest.raises(
        InputError, match=r"wanted images \[N, C, H, W\] and labels \[N\], got \[6, 1, 6, 6\] and \[5\]"
    ):
        input_gradient_norms(smooth, images, torch.zeros(5, dtype=torch.int64))
    for radius in (0.0, -1.0, math.nan, math.inf):
        with pytest.raises(InputError, match=f"radius must be positive and finite, got {radius}"):
            largest_slope(smooth, images, radius=radius, steps=1, seed=0)
    with pytest.raises(InputError, match="steps must be at least 1, got 0"):
        largest_slope(smooth, images, radius=0.1, steps=0, seed=0)
    with pytest.raises(InputError, match="keeps no running variance"):
        layer_norms(nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2, track_running_stats=False)), images)
    with pytest.raises(InputError, match="Constant has no convolution"):
        layer_norms(Constant(), images)
