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


def test_lipschitz_bound_sum_refuses_a_network_without_layers() -> None:
    with pytest.raises(InputError, match="Sequential has no convolution"):
        lipschitz_bound_sum(nn.Sequential(nn.ReLU()))
