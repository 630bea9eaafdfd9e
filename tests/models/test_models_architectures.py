"""The networks against the reference implementations' values: tests/data, and all of them where the golden file is."""

import hashlib
import json
import os
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from soteacher.errors import InputError
from soteacher.models.taps import Tapped, find_taps
from soteacher.models.zoo import build_network, network_names

EXTRACT = json.loads((Path(__file__).parents[1] / "data" / "architectures.json").read_text())
GOLDEN = Path(
    os.environ.get("SOTEACHER_GOLDEN", Path(__file__).parents[2].joinpath("..", "shared", "golden"))
).joinpath("architectures.json")


def fixed_weights(network: nn.Module) -> dict[str, Tensor]:
    """Return weights drawn as for the reference values: by sorted name, from one generator."""
    generator = torch.Generator().manual_seed(0)
    weights: dict[str, Tensor] = {}
    for name, value in sorted(network.state_dict().items()):
        if name.endswith("num_batches_tracked"):
            weights[name] = torch.zeros_like(value)
            continue
        r = torch.randn(value.shape, generator=generator)
        if name.endswith("running_var"):
            weights[name] = 0.5 + r.abs()
        elif name.endswith("running_mean"):
            weights[name] = 0.1 * r
        elif value.ndim == 1:
            weights[name] = 1 + 0.1 * r if name.endswith("weight") else 0.1 * r
        else:
            weights[name] = r * (0.5 / (value.numel() / value.shape[0])) ** 0.5
    return weights


def fixed_images() -> Tensor:
    return torch.linspace(-1, 1, 2 * 3 * 32 * 32).reshape(2, 3, 32, 32).sin() * 2


def shapes_text(network: nn.Module) -> str:
    shapes = {name: list(value.shape) for name, value in network.state_dict().items()}
    return "\n".join(f"{name}:{shape}" for name, shape in sorted(shapes.items()))


@pytest.mark.parametrize("name", sorted(EXTRACT))
def test_network_equals_reference(name):
    expected = EXTRACT[name]
    network = build_network(name, num_classes=100)
    assert sum(parameter.numel() for parameter in network.parameters()) == expected["num_parameters"]
    assert len(network.state_dict()) == expected["num_tensors"]
    assert hashlib.sha256(shapes_text(network).encode()).hexdigest() == expected["state_dict_sha256"]

    network.load_state_dict(fixed_weights(network))
    with torch.no_grad():
        logits, features = Tapped(network.eval(), find_taps(network))(fixed_images())
    torch.testing.assert_close(logits[:, :5], torch.tensor(expected["logits_first_5"]), rtol=0, atol=2e-6)
    assert logits.sum().item() == pytest.approx(expected["logits_sum"], abs=2e-5)
    assert logits.abs().max().item() == pytest.approx(expected["logits_abs_max"], rel=1e-5)
    assert [list(feature.shape[1:]) for feature in features.values()] == expected["feature_shapes"]
    means = [feature.mean().item() for feature in features.values()]
    assert means == pytest.approx(expected["feature_means"], rel=1e-5, abs=1e-6)


@pytest.mark.skipif(not GOLDEN.is_file(), reason=f"no reference values at {GOLDEN}")
@pytest.mark.parametrize("name", network_names())
def test_state_dict_equals_golden_file(name):
    network = build_network(name, num_classes=100)
    shapes = {key: list(value.shape) for key, value in network.state_dict().items()}
    golden = json.loads(GOLDEN.read_text())[name]
    assert shapes == golden["state_dict"]
    if name in EXTRACT:
        assert {key: golden[key] for key in golden if key != "state_dict"}.items() <= EXTRACT[name].items()


@pytest.mark.parametrize("name", ["resnet8", "wrn_10_1"])
def test_network_takes_other_sizes_and_channels(name):
    network = build_network(name, num_classes=7, in_channels=1).eval()
    assert network(torch.rand(2, 1, 28, 28)).shape == (2, 7)
    assert network(torch.rand(1, 1, 45, 33)).shape == (1, 7)


@pytest.mark.parametrize(
    ("name", "depth", "channels"),
    [("resnet26", 26, [16, 16, 32, 64]), ("resnet14x2", 14, [32, 32, 64, 128]), ("wrn_22_3", 22, [16, 48, 96, 192])],
)
def test_depth_counts_layers_and_width_channels(name, depth, channels):
    network = build_network(name, num_classes=10).eval()
    _, features = Tapped(network, find_taps(network))(torch.rand(1, 3, 32, 32))
    assert [features[tap].shape[1] for tap in ("stem", "stage1", "stage2", "stage3")] == channels
    # Depth counts the 3x3 convolutions and the classifier, and in wide networks (6n + 4) the shortcuts' convolutions.
    kernels = [module.kernel_size for module in network.modules() if isinstance(module, nn.Conv2d)]
    shortcuts = kernels.count((1, 1)) if name.startswith("wrn") else 0
    assert kernels.count((3, 3)) + shortcuts + (0 if shortcuts else 1) == depth


@pytest.mark.parametrize("name", ["resnet32x4", "wrn_40_2"])
def test_initial_convolutions_have_variance_two_over_fan_out(name):
    torch.manual_seed(0)
    network = build_network(name, num_classes=10)
    for module in network.modules():
        if isinstance(module, nn.Conv2d) and module.weight.numel() > 10_000:
            fan_out = module.out_channels * module.kernel_size[0] * module.kernel_size[1]
            assert module.weight.std().item() == pytest.approx((2 / fan_out) ** 0.5, rel=0.03)


def test_weights_come_from_the_global_generator():
    networks = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        networks.append(build_network("resnet8", num_classes=10).get_parameter("conv1.weight"))
    assert torch.equal(networks[0], networks[1])
    assert not torch.equal(networks[0], networks[2])


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("resnet9", r"resnet9: depth must be 6n \+ 2 \(8, 14, .*got 9$"),
        ("resnet2", r"depth must be 6n \+ 2"),
        ("resnet8x1", r"resnet8x1: width must be at least 2, got 1"),
        ("wrn_17_2", r"wrn_17_2: depth must be 6n \+ 4 \(10, 16, .*got 17$"),
        ("wrn_4_2", r"depth must be 6n \+ 4"),
        ("wrn_16_0", r"width must be at least 1, got 0"),
    ],
)
def test_impossible_network_is_refused(name, message):
    with pytest.raises(InputError, match=message):
        build_network(name, num_classes=10)
