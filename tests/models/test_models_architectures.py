"""The networks against the reference implementations' values: tests/data, and all of them where the golden file is."""

import hashlib
import json
import os
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from soteacher.errors import InputError
from soteacher.models.resnet import build_resnet
from soteacher.models.taps import Tap, Tapped, find_taps, resolve_taps
from soteacher.models.zoo import build_network, network_names

EXTRACT = json.loads((Path(__file__).parents[1] / "data" / "architectures.json").read_text())
GOLDEN = Path(
    os.environ.get("SOTEACHER_GOLDEN", Path(__file__).parents[2].joinpath("..", "shared", "golden"))
).joinpath("architectures.json")
FIELD_NAMES = {
    "resnet50": ("ResNet50",),
    "mobilenet_v2": ("MobileNetV2",),
    "shufflenet_v1": ("ShuffleV1", "ShuffleNetV1"),
    "shufflenet_v2": ("ShuffleV2", "ShuffleNetV2"),
}
SMALL = ("resnet8", "wrn_10_1", "vgg8", "resnet50", "mobilenet_v2", "shufflenet_v1", "shufflenet_v2")
"""One network of each family."""


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


def reference_taps(network: nn.Module) -> dict[str, Tap]:
    """Return the taps of which there are reference values."""
    return {
        name: tap for name, tap in find_taps(network).items() if name != "maps" and not name.startswith("preactivation")
    }


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
        logits, features = Tapped(network.eval(), reference_taps(network))(fixed_images())
    torch.testing.assert_close(logits[:, :5], torch.tensor(expected["logits_first_5"]), rtol=0, atol=2e-6)
    assert logits.sum().item() == pytest.approx(expected["logits_sum"], abs=2e-5)
    assert logits.abs().max().item() == pytest.approx(expected["logits_abs_max"], rel=1e-5)
    assert [list(feature.shape[1:]) for feature in features.values()] == expected["feature_shapes"]
    means = [feature.mean().item() for feature in features.values()]
    assert means == pytest.approx(expected["feature_means"], rel=1e-5, abs=1e-6)


@pytest.mark.skipif(not GOLDEN.is_file(), reason=f"no reference values at {GOLDEN}")
@pytest.mark.parametrize("name", [name for name in network_names() if not name.startswith("patchwise")])  # our own
def test_state_dict_equals_golden_file(name):
    network = build_network(name, num_classes=100)
    shapes = {key: list(value.shape) for key, value in network.state_dict().items()}
    field_name, *_ = FIELD_NAMES.get(name, (name,))
    golden = json.loads(GOLDEN.read_text())[field_name]
    assert shapes == golden["state_dict"]
    assert {key: golden[key] for key in golden if key != "state_dict"}.items() <= EXTRACT[field_name].items()


@pytest.mark.parametrize("name", FIELD_NAMES)
def test_field_names_build_the_same_network(name):
    listed = network_names()
    ours = build_network(name, num_classes=3)
    for field_name in FIELD_NAMES[name]:
        assert field_name not in listed
        theirs = build_network(field_name, num_classes=3)
        assert type(theirs) is type(ours)
        assert shapes_text(theirs) == shapes_text(ours)


def test_resnet50_is_the_network_of_bottleneck_blocks():
    assert type(build_network("resnet50", num_classes=2)).__name__ == "BottleneckResNet"
    with pytest.raises(InputError, match="'resnet50' is no network of this family; wanted resnetD or resnetDxW, not"):
        build_resnet("resnet50", num_classes=2, in_channels=3)


@pytest.mark.parametrize("name", SMALL)
def test_network_takes_other_sizes_and_channels(name):
    network = build_network(name, num_classes=7, in_channels=1).eval()
    assert network(torch.rand(2, 1, 28, 28)).shape == (2, 7)
    assert network(torch.rand(1, 1, 45, 33)).shape == (1, 7)


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("resnet8", (64, 16, 16)), ("wrn_10_1", (64, 16, 16)), ("resnet50", (2048, 8, 8)), ("vgg8", (512, 4, 4)),
        ("mobilenet_v2", (1280, 4, 4)), ("shufflenet_v1", (960, 8, 8)), ("shufflenet_v2", (1024, 8, 8)),
    ],
)  # fmt: skip
def test_network_takes_larger_images(name, shape):
    network = build_network(name, num_classes=7).eval()
    logits, features = Tapped(network, resolve_taps(network, ["maps"]))(torch.rand(1, 3, 64, 64))
    assert logits.shape == (1, 7)
    assert features["maps"].shape[1:] == shape


@pytest.mark.parametrize(("height", "width", "side"), [(8, 8, 1), (28, 28, 3), (56, 56, 7), (63, 80, 7), (64, 64, 4)])
def test_vgg_pools_its_fourth_block_in_large_images(height, width, side):
    network = build_network("vgg8", num_classes=2, in_channels=1).eval()
    _, features = Tapped(network, resolve_taps(network, ["stage3", "stage4"]))(torch.rand(1, 1, height, width))
    assert features["stage4"].shape[2] == side
    assert features["stage3"].shape[2] == height // 8


@pytest.mark.parametrize("shape", [(7, 32), (32, 4)])
def test_vgg_refuses_tiny_images(shape):
    network = build_network("vgg8", num_classes=2)
    with pytest.raises(InputError, match=f"8 pixels a side or more, got {shape[0]}x{shape[1]}$"):
        network(torch.rand(2, 3, *shape))


@pytest.mark.parametrize("name", SMALL)
def test_two_examples_train(name):
    torch.manual_seed(0)
    network = build_network(name, num_classes=3).train()
    tapped = Tapped(network, find_taps(network))
    logits, features = tapped(torch.rand(2, 3, 32, 32))  # also: nothing that is tapped is overwritten
    (logits.square().mean() + sum(feature.square().mean() for feature in features.values())).backward()
    assert all(parameter.grad.isfinite().all() for parameter in network.parameters())


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("name", SMALL)
def test_pooled_features_are_the_averages_of_maps(name, training):
    network = build_network(name, num_classes=100)
    network.load_state_dict(fixed_weights(network))
    tapped = Tapped(network.train(training), find_taps(network))
    with torch.no_grad():
        _, features = tapped(fixed_images())
    assert list(features)[-2:] == ["maps", "pooled"]
    assert features["maps"].ndim == 4
    assert torch.equal(features["maps"].mean((2, 3)), features["pooled"])


@pytest.mark.parametrize(
    ("name", "count"),
    [("resnet8", 3), ("resnet20", 3), ("vgg8", 4), ("vgg13", 4), ("resnet50", 4), ("shufflenet_v1", 3),
     ("shufflenet_v2", 3)],
)  # fmt: skip
def test_rectified_preactivations_are_the_stages(name, count):
    network = build_network(name, num_classes=100)
    network.load_state_dict(fixed_weights(network))
    taps = find_taps(network)
    names = [f"preactivation{number}" for number in range(1, count + 1)]
    assert list(taps) == ["stem", *(f"stage{number}" for number in range(1, count + 1)), *names, "maps", "pooled"]
    with torch.no_grad():
        _, features = Tapped(network.eval(), taps)(fixed_images())
    for number, tap in enumerate(names, start=1):
        assert features[tap].min() < 0
        assert torch.equal(features[tap].relu(), features[f"stage{number}"])


@pytest.mark.parametrize("name", ["wrn_16_1", "wrn_10_2"])
def test_preactivations_of_wide_networks_are_the_next_normalisation(name):
    network = build_network(name, num_classes=100)
    network.load_state_dict(fixed_weights(network))
    with torch.no_grad():
        _, features = Tapped(network.eval(), find_taps(network))(fixed_images())
        for number, path in enumerate(("block2.layer.0.bn1", "block3.layer.0.bn1", "bn1"), start=1):
            normalised = network.get_submodule(path)(features[f"stage{number}"])
            assert torch.equal(features[f"preactivation{number}"], normalised)
    assert torch.equal(features["preactivation3"].relu(), features["maps"])


def test_linear_stages_have_no_preactivations():
    network = build_network("mobilenet_v2", num_classes=100)
    network.load_state_dict(fixed_weights(network))
    assert list(find_taps(network)) == ["stem", "stage1", "stage2", "stage3", "stage4", "maps", "pooled"]
    with torch.no_grad():
        _, features = Tapped(network.eval(), find_taps(network))(fixed_images())
    assert all(features[f"stage{number}"].min() < 0 for number in range(1, 5))


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


@pytest.mark.parametrize("name", ["resnet32x4", "wrn_40_2", "resnet50", "vgg11", "mobilenet_v2"])
def test_initial_convolutions_have_variance_two_over_fan_out(name):
    torch.manual_seed(0)
    network = build_network(name, num_classes=10)
    for module in network.modules():
        if isinstance(module, nn.Conv2d) and module.weight.numel() > 10_000:
            fan_out = module.out_channels * module.kernel_size[0] * module.kernel_size[1]
            assert module.weight.std().item() == pytest.approx((2 / fan_out) ** 0.5, rel=0.03)


@pytest.mark.parametrize("name", ["vgg8", "mobilenet_v2"])
def test_initial_classifier_is_small_and_biases_are_zero(name):
    torch.manual_seed(0)
    network = build_network(name, num_classes=100)
    for module in network.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)) and module.bias is not None:
            assert not module.bias.any()
        if isinstance(module, nn.Linear):
            assert module.weight.std().item() == pytest.approx(0.01, rel=0.03)


@pytest.mark.parametrize("name", ["shufflenet_v1", "shufflenet_v2"])
def test_shuffled_networks_start_as_pytorch_starts_layers(name):
    torch.manual_seed(0)
    for module in build_network(name, num_classes=100).modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)) and module.weight.numel() > 10_000:
            # Uniform within 1 / sqrt(fan-in): PyTorch's own start.
            bound = (module.weight.shape[0] / module.weight.numel()) ** 0.5
            assert module.weight.abs().max().item() <= bound
            assert module.weight.std().item() == pytest.approx(bound / 3**0.5, rel=0.03)


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
        ("resnet51", r"resnet51: depth must be 6n \+ 2 \(8, 14, .*got 51$"),
        ("vgg12", r"unknown network 'vgg12'; did you mean .*vgg13"),
        ("mobilenet_v1", r"unknown network 'mobilenet_v1'; did you mean .*mobilenet_v2"),
        ("Shufflenetv2", r"unknown network 'Shufflenetv2'; did you mean .*shufflenet_v2"),
    ],
)
def test_impossible_network_is_refused(name, message):
    with pytest.raises(InputError, match=message):
        build_network(name, num_classes=10)
