import copy

import pytest
import torch
from torch import Tensor, nn

from soteacher.errors import InputError
from soteacher.functional import induced_norm, lipschitz_bound_sum, normed_layers

CONVOLUTIONS = {
    "1d": (nn.Conv1d(3, 4, 3), (3, 8)),
    "2d": (nn.Conv2d(3, 4, 3), (3, 7, 7)),
    "3d": (nn.Conv3d(2, 3, 2), (2, 4, 4, 4)),
    "padding": (nn.Conv2d(3, 4, 3, padding=1), (3, 5, 5)),
    "circular": (nn.Conv2d(3, 4, 3, padding=1, padding_mode="circular"), (3, 5, 5)),
    "dilation": (nn.Conv2d(2, 4, 3, padding=2, dilation=2), (2, 9, 9)),
    "groups": (nn.Conv2d(4, 6, 3, padding=1, groups=2), (4, 5, 5)),
    "depthwise": (nn.Conv2d(4, 4, 3, padding=1, groups=4), (4, 5, 5)),
    "pointwise": (nn.Conv2d(4, 6, 1), (4, 3, 3)),
    "transposed": (nn.ConvTranspose2d(3, 4, 3), (3, 4, 4)),
    "transposed, stride and groups": (nn.ConvTranspose2d(4, 6, 3, stride=2, groups=2), (4, 4, 4)),
    "linear": (nn.Linear(5, 7), (5,)),
    "batch norm": (nn.BatchNorm1d(6, eps=0.5).eval(), (6,)),
    "batch norm 2d": (nn.BatchNorm2d(3).eval(), (3, 2, 2)),
    "batch norm without affine": (nn.BatchNorm1d(6, affine=False).eval(), (6,)),
}  # fmt: skip


def dense_norm(layer: nn.Module, shape: tuple[int, ...]) -> Tensor:
    """The largest absolute column sum of the layer's matrix, built by sending every unit vector through it."""
    units = torch.eye(int(torch.tensor(shape).prod())).unflatten(1, shape)
    columns = layer(units) - layer(torch.zeros(1, *shape))
    return columns.abs().flatten(1).sum(dim=1).max()


def randomise(layer: nn.Module) -> None:
    torch.manual_seed(1)
    for tensor in layer.parameters():
        nn.init.normal_(tensor)
    if isinstance(variance := getattr(layer, "running_var", None), Tensor):
        variance.uniform_(0.5, 2.0)


@pytest.mark.parametrize(("layer", "shape"), CONVOLUTIONS.values(), ids=CONVOLUTIONS)
def test_induced_norm_is_that_of_the_dense_matrix(layer: nn.Module, shape: tuple[int, ...]) -> None:
    randomise(layer)
    torch.testing.assert_close(induced_norm(layer), dense_norm(layer, shape), rtol=1e-5, atol=0)


def test_induced_norm_bounds_a_strided_convolution() -> None:
    layer = nn.Conv2d(3, 4, 3, padding=1, stride=2)
    randomise(layer)
    assert induced_norm(layer) > dense_norm(layer, (3, 8, 8))


def test_induced_norm_by_hand() -> None:
    linear = nn.Linear(2, 2)
    linear.weight.data = torch.tensor([[1.0, -4.0], [-2.0, 0.5]])
    assert induced_norm(linear) == 4.5
    norm = nn.BatchNorm2d(2, eps=0.0)
    norm.weight.data = torch.tensor([-3.0, 4.0])
    norm.running_var = torch.tensor([0.25, 4.0])
    assert induced_norm(norm) == 6.0
    network = nn.Sequential(linear, nn.ReLU(), nn.ModuleDict({"norm": norm, "again": linear}))
    assert lipschitz_bound_sum(network) == 10.5  # a layer used twice counts once
    assert normed_layers(network) == [linear, norm]


def test_induced_norm_scales_with_the_weight_and_ignores_the_bias() -> None:
    layer = nn.Conv2d(3, 4, 3)
    before = induced_norm(layer).detach()
    layer.weight.data *= -2
    assert layer.bias is not None
    layer.bias.data += 100
    torch.testing.assert_close(induced_norm(layer).detach(), 2 * before)


def test_induced_norm_gradient_is_the_sign_of_the_largest_column() -> None:
    layer = nn.Conv2d(2, 3, 2, bias=False)
    randomise(layer)
    layer.weight.data[:, 1] *= 10
    induced_norm(layer).backward()
    assert layer.weight.grad is not None
    assert torch.equal(layer.weight.grad[:, 1], layer.weight[:, 1].sign())
    assert not layer.weight.grad[:, 0].any()


@pytest.mark.parametrize(
    "layer", [nn.Conv2d(4, 4, 2, groups=2), nn.ConvTranspose2d(3, 2, 2), nn.Linear(3, 4), nn.BatchNorm1d(3)], ids=str
)
def test_induced_norm_gradient(layer: nn.Module) -> None:
    layer.double()
    randomise(layer)
    assert torch.autograd.gradcheck(lambda _: induced_norm(layer), layer.get_parameter("weight"))


def mixed_network(dtype: torch.dtype = torch.float64) -> nn.Module:
    """Layers of every kind, some of one length of columns, with weights whose columns differ."""
    torch.manual_seed(2)
    network = nn.ModuleList(copy.deepcopy(layer) for layer, _ in CONVOLUTIONS.values()).to(dtype)
    network.append(nn.BatchNorm2d(3, eps=1e-3).to(dtype))
    for module in network:
        for tensor in module.parameters():
            nn.init.normal_(tensor)
        if isinstance(variance := getattr(module, "running_var", None), Tensor):
            variance.uniform_(0.5, 2.0)
    return network


def weights_of(network: nn.Module) -> list[nn.Parameter]:
    return [parameter for name, parameter in network.named_parameters() if name.endswith("weight")]


def assert_equals_sum_of_norms(network: nn.Module) -> None:
    """Value and gradients are those of the plain sum, whose gradient autograd finds."""
    weights = [weight for weight in weights_of(network) if weight.requires_grad]
    value = lipschitz_bound_sum(network)
    plain = torch.stack([induced_norm(layer) for layer in normed_layers(network)]).sum()
    torch.testing.assert_close(value, plain, rtol=1e-6, atol=0)
    found, expected = torch.autograd.grad(3 * value, weights), torch.autograd.grad(3 * plain, weights)
    for weight, one, other in zip(weights, found, expected, strict=True):
        assert one.dtype == weight.dtype
        torch.testing.assert_close(one, other, rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_lipschitz_bound_sum_is_the_sum_of_the_norms(dtype: torch.dtype) -> None:
    assert_equals_sum_of_norms(mixed_network(dtype))


def test_lipschitz_bound_sum_takes_layers_of_several_types() -> None:
    network = mixed_network(torch.float32)
    for layer in list(network.children())[::2]:
        layer.double()
    assert lipschitz_bound_sum(network).dtype == torch.float64
    assert_equals_sum_of_norms(network)


def test_lipschitz_bound_sum_takes_channels_last_weights() -> None:
    network = nn.Sequential(nn.Conv2d(6, 8, 3), nn.Conv2d(8, 6, 3, groups=2), nn.ConvTranspose2d(6, 4, 3))
    expected = lipschitz_bound_sum(network).detach()
    network = network.to(memory_format=torch.channels_last)
    torch.testing.assert_close(lipschitz_bound_sum(network).detach(), expected, rtol=1e-6, atol=0)
    assert_equals_sum_of_norms(network)
    lipschitz_bound_sum(network).backward()
    for weight in weights_of(network):
        assert weight.grad is not None
        assert weight.grad.stride() == weight.stride()


def test_lipschitz_bound_sum_shares_the_gradient_of_a_tie() -> None:
    network = nn.Sequential(nn.BatchNorm2d(4), nn.Linear(3, 2), nn.Conv2d(2, 2, 3, bias=False), nn.BatchNorm2d(6))
    constants = [1.0, -2.0, 0.5, 1.0]
    for weight, value in zip(weights_of(network), constants, strict=True):
        weight.data.fill_(value)
    network[1].weight.data[:, 0] = torch.tensor([0.0, 4.0])  # ties with the other columns, and has no sign at 0
    assert_equals_sum_of_norms(network)
    lipschitz_bound_sum(network).backward()
    found = [weight.grad for weight in weights_of(network)]
    scale = (1 + 1e-5) ** -0.5
    torch.testing.assert_close(found[0], torch.full((4,), scale / 4))
    torch.testing.assert_close(found[1], torch.tensor([[0.0, -1.0, -1.0], [1.0, -1.0, -1.0]]) / 3)
    torch.testing.assert_close(found[2], torch.full((2, 2, 3, 3), 0.5))
    torch.testing.assert_close(found[3], torch.full((6,), scale / 6))


def test_lipschitz_bound_sum_gradient() -> None:
    network = nn.Sequential(nn.Conv1d(4, 2, 2, groups=2), nn.ConvTranspose1d(2, 2, 2), nn.BatchNorm1d(3)).double()
    randomise(network)
    assert torch.autograd.gradcheck(lambda *_: lipschitz_bound_sum(network), weights_of(network))


def test_lipschitz_bound_sum_refuses_a_second_derivative() -> None:
    layer = nn.Linear(2, 2)
    (gradient,) = torch.autograd.grad(lipschitz_bound_sum(layer).square(), layer.weight, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


def test_lipschitz_bound_sum_gives_gradients_to_trained_weights_only() -> None:
    network = mixed_network()
    expected = lipschitz_bound_sum(network).detach()
    for place, layer in enumerate(network.children()):
        layer.requires_grad_(place % 2 == 0)
    torch.testing.assert_close(lipschitz_bound_sum(network).detach(), expected, rtol=0, atol=0)
    assert_equals_sum_of_norms(network)
    for layer in network.children():  # batch norms frozen, as in fine-tuning
        layer.requires_grad_(not isinstance(layer, nn.BatchNorm1d | nn.BatchNorm2d))
    assert_equals_sum_of_norms(network)
    lipschitz_bound_sum(network).backward()
    for weight in weights_of(network):
        assert (weight.grad is not None) == weight.requires_grad


def test_lipschitz_bound_sum_of_one_kind_of_layer() -> None:
    for layer in mixed_network().children():
        if list(layer.parameters()):
            assert_equals_sum_of_norms(layer)
    assert lipschitz_bound_sum(nn.BatchNorm1d(3, affine=False, eps=0.25).eval()) == 1.25**-0.5


def test_lipschitz_bound_sum_adds_up_the_gradients_of_a_shared_weight() -> None:
    first, second = nn.Linear(3, 3).double(), nn.Linear(3, 3).double()
    second.weight = first.weight
    lipschitz_bound_sum(nn.Sequential(first, second)).backward()
    alone = torch.autograd.grad(induced_norm(first), first.weight)[0]
    torch.testing.assert_close(first.weight.grad, 2 * alone)


def test_lipschitz_bound_sum_leaves_gradients_that_can_be_changed() -> None:
    network = mixed_network()
    for _ in range(2):
        lipschitz_bound_sum(network).backward()
    found = [weight.grad for weight in weights_of(network)]
    before = [gradient.clone() for gradient in found if gradient is not None]
    found[0].mul_(0)
    found[-1].add_(1)
    assert all(torch.equal(one, other) for one, other in zip(found[1:-1], before[1:-1], strict=True))


def test_lipschitz_bound_sum_sees_what_has_changed_since_the_last_look(network: nn.Sequential) -> None:
    lipschitz_bound_sum(network)
    network[5] = nn.Linear(4, 7)
    assert_equals_sum_of_norms(network)
    network.double()
    network[1].running_var.mul_(4)
    assert_equals_sum_of_norms(network)


def test_lipschitz_bound_sum_counts_frozen_layers_without_a_gradient(network: nn.Module) -> None:
    expected = lipschitz_bound_sum(network).detach()
    network.requires_grad_(False)
    assert torch.equal(lipschitz_bound_sum(network), expected)
    assert not lipschitz_bound_sum(network).requires_grad


def test_lipschitz_bound_sum_of_half_precision_weights_is_float32(network: nn.Module) -> None:
    half = lipschitz_bound_sum(network.bfloat16())
    torch.testing.assert_close(half, lipschitz_bound_sum(network.float()), rtol=1e-6, atol=0)


@pytest.mark.parametrize("layer", [nn.ReLU(), nn.LayerNorm(3), nn.Sequential(nn.Linear(2, 2))], ids=str)
def test_induced_norm_refuses_other_layers(layer: nn.Module) -> None:
    with pytest.raises(InputError, match=f"layer of type {type(layer).__name__}"):
        induced_norm(layer)


def test_induced_norm_refuses_batch_norm_without_statistics() -> None:
    with pytest.raises(InputError, match="BatchNorm2d keeps no running variance"):
        induced_norm(nn.BatchNorm2d(3, track_running_stats=False))
    for affine in (True, False):
        with pytest.raises(InputError, match="BatchNorm1d keeps no running variance"):
            lipschitz_bound_sum(nn.BatchNorm1d(3, affine=affine, track_running_stats=False))


def test_lipschitz_bound_sum_refuses_a_network_without_layers() -> None:
    with pytest.raises(InputError, match="Sequential has no convolution"):
        lipschitz_bound_sum(nn.Sequential(nn.ReLU()))
