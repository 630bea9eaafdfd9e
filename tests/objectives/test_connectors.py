import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from soteacher.objectives.connectors import BatchNormalization, MapConnector


def _randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def _normalized(feature: np.ndarray, weight: np.ndarray, bias: np.ndarray) -> np.ndarray:
    """Normalise by the batch's own mean and (biased) variance in each channel."""
    axes = tuple(axis for axis in range(feature.ndim) if axis != 1)
    shape = (1, -1, *(1,) * (feature.ndim - 2))
    mean, variance = feature.mean(axes, keepdims=True), feature.var(axes, keepdims=True)
    return (feature - mean) / np.sqrt(variance + 1e-5) * weight.reshape(shape) + bias.reshape(shape)


@pytest.mark.parametrize("shape", [(4, 3, 5, 5), (6, 3), (1, 3, 5, 5)])
def test_batch_normalization_equals_numpy(shape: tuple[int, ...]) -> None:
    layer = BatchNormalization(3)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([1.0, 2.0, -0.5]))
        layer.bias.copy_(torch.tensor([0.0, 1.0, 3.0]))
    feature = _randn(*shape)
    wanted = _normalized(feature.numpy().astype(float), layer.weight.detach().numpy(), layer.bias.detach().numpy())
    torch.testing.assert_close(layer(feature), torch.from_numpy(wanted).float(), rtol=1e-4, atol=1e-5)


def test_batch_normalization_keeps_nothing() -> None:
    layer = BatchNormalization(3)
    before = {name: value.clone() for name, value in layer.state_dict().items()}
    first, second = (layer(_randn(4, 3, 5, 5)) for _ in range(2))
    assert torch.equal(first, second)
    assert set(before) == {"weight", "bias"}
    assert all(torch.equal(value, before[name]) for name, value in layer.state_dict().items())
    layer.eval()
    assert torch.equal(layer(_randn(4, 3, 5, 5)), first)  # a bridge is always in training


@pytest.mark.parametrize("shape", [(1, 3), (1, 3, 1, 1)])
def test_batch_normalization_of_a_single_value_is_the_shift(shape: tuple[int, ...]) -> None:
    layer = BatchNormalization(3)
    with torch.no_grad():
        layer.bias.copy_(torch.tensor([1.0, 2.0, 3.0]))
    feature = _randn(*shape).requires_grad_()
    result = layer(feature)
    assert result.shape == shape
    assert result.flatten().tolist() == [1, 2, 3]
    result.sum().backward()
    assert feature.grad is not None
    assert feature.grad.abs().max() == 0
    assert layer.bias.grad is not None
    assert layer.bias.grad.tolist() == [1, 1, 1]


def test_batch_normalization_of_equal_values_has_finite_gradients() -> None:
    layer, feature = BatchNormalization(3), torch.ones(4, 3, 2, 2, requires_grad=True)
    result = layer(feature)
    result.square().sum().backward()
    assert feature.grad is not None
    assert feature.grad.isfinite().all()
    assert result.abs().max() < 1e-3


SIZES = [((8, 8), (8, 8)), ((8, 8), (4, 4)), ((4, 4), (8, 8)), ((8, 4), (4, 8)), ((6, 6), (1, 1)), ((1, 1), (5, 5))]


@pytest.mark.parametrize("rectify", [False, True])
@pytest.mark.parametrize(("size", "wanted"), SIZES)
def test_map_connector_is_what_it_says_by_hand(
    size: tuple[int, int], wanted: tuple[int, int], *, rectify: bool
) -> None:
    torch.manual_seed(0)
    connector, maps = MapConnector(3, 5, wanted, rectify=rectify), _randn(4, 3, *size)
    result = connector(maps)
    assert result.shape == (4, 5, *wanted)
    # First the size, in the other order than the connector where maps grow: the two can be exchanged.
    down = size[0] >= wanted[0] and size[1] >= wanted[1]
    if size != wanted:
        maps = F.adaptive_avg_pool2d(maps, wanted) if down else F.interpolate(maps, wanted, mode="bilinear")
    weight = connector.convolution.weight.detach().numpy()[:, :, 0, 0]
    bridged = _normalized(np.einsum("oc,bchw->bohw", weight, maps.numpy()).astype(float), np.ones(5), np.zeros(5))
    if rectify:
        bridged = np.maximum(bridged, 0)
    torch.testing.assert_close(result, torch.from_numpy(bridged).float(), rtol=1e-3, atol=1e-4)


def test_map_connector_takes_a_single_value() -> None:
    connector = MapConnector(3, 5, (1, 1))
    result = connector(_randn(1, 3, 4, 4))
    assert result.shape == (1, 5, 1, 1)
    assert result.isfinite().all()


def test_map_connector_is_trained_and_changes_nothing_by_running() -> None:
    torch.manual_seed(0)
    connector = MapConnector(3, 5, (4, 4), rectify=True)
    assert {name for name, _ in connector.named_parameters()} == {
        "convolution.weight", "normalization.weight", "normalization.bias",
    }  # fmt: skip
    assert not list(connector.buffers())
    maps, target = _randn(4, 3, 8, 8).requires_grad_(), _randn(4, 5, 4, 4, seed=1).relu()
    optimizer = torch.optim.SGD(connector.parameters(), lr=0.1)
    losses = []
    for _ in range(4):
        loss = (connector(maps) - target).square().mean()
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses == sorted(losses, reverse=True)
    assert maps.grad is not None
    assert maps.grad.abs().sum() > 0
    assert torch.equal(connector(maps), connector(maps))


def test_map_connector_starts_by_he() -> None:
    torch.manual_seed(0)
    weight = MapConnector(200, 100, (4, 4)).convolution.weight
    assert weight.std().item() == pytest.approx((2 / 100) ** 0.5, rel=0.03)
    assert isinstance(MapConnector(3, 5, (4, 4)).convolution, nn.Conv2d)
