import pytest
import torch
from torch import nn

from soteacher.diagnostics.weights import weight_figures
from soteacher.errors import InputError


def test_near_zero_weights_by_construction() -> None:
    network = nn.Sequential(nn.Conv2d(1, 5, 2, bias=False), nn.Flatten(), nn.Linear(5, 4))
    network.get_parameter("0.weight").data = torch.tensor(
        [3.0] * 10 + [1e-9, -1e-9, 0.0, 0.001, -0.002] + [0.1] * 5
    ).view(5, 1, 2, 2)
    network.get_parameter("2.weight").data = torch.ones(4, 5)
    network.get_parameter("2.weight").data[0, :2] = 0
    # root mean squares 2.12 and 0.95: near zero are up to 0.0021 and 0.00095
    assert weight_figures(network, {})["near_zero"] == pytest.approx((5 + 2) / 40)


@pytest.mark.parametrize("factor", [1e-6, 1.0, 1e6])
def test_near_zero_is_a_matter_of_scale_within_a_layer(factor: float) -> None:
    torch.manual_seed(0)
    network = nn.Linear(100, 100)
    nn.init.normal_(network.weight, std=factor)
    assert weight_figures(network, {})["near_zero"] == pytest.approx(0.0008, abs=0.0006)  # of a normal distribution
    assert weight_figures(network, {})["dead_channels"] == 0


def test_layers_of_zeros_are_wholly_near_zero() -> None:
    network = nn.Linear(3, 3)
    nn.init.zeros_(network.weight)
    assert weight_figures(network, {}) == {"near_zero": 1.0, "dead_channels": 1.0}


@pytest.fixture
def network() -> nn.Sequential:
    """A convolution with its batch norm (8 channels), a batch norm alone (8) and a linear layer (4)."""
    torch.manual_seed(0)
    network = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.BatchNorm2d(8), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Linear(8, 4),
    )  # fmt: skip
    for module in network:
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 2.0)
            assert module.running_var is not None
            module.running_var.uniform_(0.5, 2.0)
    return network


PAIRS = {"0": "1"}


def test_a_network_in_use_has_no_dead_channels(network: nn.Sequential) -> None:
    assert weight_figures(network, PAIRS)["dead_channels"] == 0
    assert weight_figures(network, {})["dead_channels"] == 0


@pytest.mark.parametrize(
    ("parameter", "row", "value", "dead"),
    [
        ("1.weight", 2, 0.0, 1),  # its factor
        ("1.weight", 2, -1e-5, 1),
        ("1.weight", 2, 0.01, 0),
        ("0.weight", 5, 0.0, 1),  # its filter
        ("0.weight", 5, 1e-7, 0),  # which batch norm makes long again
        ("1.running_var", 3, 1e-13, 1),  # what reaches it does not vary
        ("3.weight", 0, 0.0, 1),
        ("6.weight", 1, 0.0, 1),
        ("6.weight", 1, 1e-6, 1),  # no batch norm: near zero beside the others
        ("0.bias", 1, 0.0, 0),
        ("1.bias", 1, 0.0, 0),
    ],
)
def test_dead_channels_by_construction(
    network: nn.Sequential, parameter: str, row: int, value: float, dead: int
) -> None:
    tensors = dict(network.named_parameters()) | dict(network.named_buffers())
    tensors[parameter].data[row] = value
    assert weight_figures(network, PAIRS)["dead_channels"] == pytest.approx(dead / 20)


def test_a_pair_counts_once(network: nn.Sequential) -> None:
    network.get_parameter("1.weight").data[2] = 0
    network.get_parameter("0.weight").data[2] = 0
    assert weight_figures(network, PAIRS)["dead_channels"] == pytest.approx(1 / 20)
    assert weight_figures(network, {})["dead_channels"] == pytest.approx(2 / 28)
    nn.init.zeros_(network.get_parameter("1.weight"))
    assert weight_figures(network, PAIRS)["dead_channels"] == pytest.approx(8 / 20)


def test_dead_channels_do_not_change_with_the_lengths_of_filters(network: nn.Sequential) -> None:
    network.get_parameter("1.weight").data[2] = 0
    network.get_parameter("0.weight").data[4:] *= 1e-6
    assert weight_figures(network, PAIRS)["dead_channels"] == pytest.approx(1 / 20)


def test_other_kinds_of_layers() -> None:
    transposed = nn.ConvTranspose2d(2, 4, 3, groups=2)
    transposed.weight.data[1] = 0  # the second group has no weights: two output channels
    transposed.weight.data[0, 0] = 1
    transposed.weight.data[0, 1] = 2
    assert weight_figures(transposed, {}) == {"near_zero": 0.5, "dead_channels": 0.5}
    norm = nn.BatchNorm2d(4, affine=False)
    assert weight_figures(norm, {}) == {"near_zero": None, "dead_channels": 0}
    assert weight_figures(nn.BatchNorm2d(4, track_running_stats=False), {})["dead_channels"] == 0
    assert weight_figures(nn.Linear(3, 4).bfloat16(), {})["dead_channels"] == 0


def test_only_layers_that_run_count(network: nn.Sequential) -> None:
    nn.init.zeros_(network.get_parameter("6.weight"))
    modules = set(network.modules())
    assert weight_figures(network, PAIRS, running=modules) == weight_figures(network, PAIRS)
    assert weight_figures(network, PAIRS, running=modules - {network[6]}) == {"near_zero": 0, "dead_channels": 0}
    assert weight_figures(network, PAIRS, running=set()) == {"near_zero": None, "dead_channels": None}


def test_a_network_without_layers_is_refused() -> None:
    with pytest.raises(InputError, match="ReLU has no convolution"):
        weight_figures(nn.ReLU(), {})
