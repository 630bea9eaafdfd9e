from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from soteacher.errors import InputError
from soteacher.functional import induced_norm, weight_l1_norm, weight_l1_sum


def test_weight_l1_sum_equals_released_code(golden: Callable[[str], dict[str, Tensor]]) -> None:
    given = golden("lipschitz_released")
    network = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU(),
        nn.Conv2d(8, 12, 3, padding=1, bias=False), nn.BatchNorm2d(12), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(12, 100),
    )  # fmt: skip
    network.load_state_dict(
        {key.split("_", 1)[1]: value for key, value in given.items() if key.startswith(("param_", "buffer_"))}
    )
    value = weight_l1_sum(network)
    torch.testing.assert_close(value, given["value"], rtol=1e-5, atol=0)
    value.backward()
    for name, parameter in network.named_parameters():
        expected = given[f"grad_{name}"]
        found = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        assert (found - expected).norm() <= 1e-4 * expected.norm(), name


@pytest.mark.parametrize("layer", [nn.Conv2d(4, 6, 3, groups=2), nn.ConvTranspose1d(2, 3, 2)], ids=str)
def test_weight_l1_norm_of_a_convolution_is_the_sum_of_all_entries(layer: nn.Module) -> None:
    weight = layer.get_parameter("weight")
    weight.data = torch.arange(weight.numel()).reshape(weight.shape).float() - 1
    assert weight_l1_norm(layer) == weight.numel() * (weight.numel() - 1) / 2 - weight.numel() + 2
    assert weight_l1_norm(layer) > induced_norm(layer)


@pytest.mark.parametrize("layer", [nn.Linear(3, 4), nn.BatchNorm2d(3)], ids=str)
def test_weight_l1_norm_of_other_layers_is_the_induced_norm(layer: nn.Module) -> None:
    assert torch.equal(weight_l1_norm(layer), induced_norm(layer))


def test_weight_l1_norm_does_not_depend_on_the_order_of_the_weights() -> None:
    layer = nn.Conv2d(3, 4, 3).double()
    before = weight_l1_norm(layer).detach()
    layer.weight.data = layer.weight.data.flatten()[torch.randperm(layer.weight.numel())].view_as(layer.weight)
    torch.testing.assert_close(weight_l1_norm(layer).detach(), before)


def test_weight_l1_sum_gradient(network: nn.Module) -> None:
    network.double()
    weights = [parameter for name, parameter in network.named_parameters() if name.endswith("weight")]
    assert torch.autograd.gradcheck(lambda *_: weight_l1_sum(network), weights)


def test_weight_l1_sum_is_the_sum_of_the_norms() -> None:
    torch.manual_seed(1)
    network = nn.Sequential(
        nn.Conv2d(4, 6, 3, groups=2), nn.ConvTranspose1d(2, 3, 2), nn.Conv3d(2, 2, 2),
        nn.BatchNorm2d(6), nn.Linear(3, 4),
    )  # fmt: skip
    weights = [layer.get_parameter("weight") for layer in network]
    value, plain = weight_l1_sum(network), torch.stack([weight_l1_norm(layer) for layer in network]).sum()
    torch.testing.assert_close(value, plain, rtol=1e-6, atol=0)
    for one, other in zip(torch.autograd.grad(value, weights), torch.autograd.grad(plain, weights), strict=True):
        assert torch.equal(one, other)


def test_weight_l1_sum_of_half_precision_weights_is_float32(network: nn.Module) -> None:
    half = weight_l1_sum(network.bfloat16())
    torch.testing.assert_close(half, weight_l1_sum(network.float()), rtol=1e-6, atol=0)


def test_weight_l1_refuses() -> None:
    with pytest.raises(InputError, match="layer of type ReLU"):
        weight_l1_norm(nn.ReLU())
    with pytest.raises(InputError, match="ReLU has no convolution"):
        weight_l1_sum(nn.ReLU())
