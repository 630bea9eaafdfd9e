import copy
import gc
import weakref

import pytest
import torch
from torch import Tensor, nn

from soteacher.errors import InputError
from soteacher.models import zoo
from soteacher.models.classifier import Classifier
from soteacher.models.taps import Tap, Tapped, classifier_module, find_taps, resolve_taps
from soteacher.models.zoo import build_network


class Small(nn.Module):
    """A network that nobody knows, with what hooks can stumble over."""

    def __init__(self) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(3, 4, 3)
        self.normalization = nn.BatchNorm2d(4)
        self.relu = nn.ReLU(inplace=True)
        self.pair = Pair()
        self.unused = nn.Linear(2, 2)
        self.head = nn.Linear(4, 5)

    def forward(self, images: Tensor) -> Tensor:
        first, second = self.pair(self.relu(self.normalization(self.convolution(images))))
        return self.head(self.relu(first + second).mean((2, 3)))


class Pair(nn.Module):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x + 1, x


@pytest.fixture
def images() -> Tensor:
    return torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def resnet() -> nn.Module:
    torch.manual_seed(0)
    return build_network("resnet8", num_classes=10)


@pytest.mark.parametrize("name", ["resnet8", "wrn_10_1"])
def test_features_equal_the_pass_by_hand(name, images):
    torch.manual_seed(0)
    network = build_network(name, num_classes=10).eval()
    logits, features = Tapped(network, find_taps(network))(images)
    preactivations = ["preactivation1", "preactivation2", "preactivation3"]
    assert list(features) == ["stem", "stage1", "stage2", "stage3", *preactivations, "maps", "pooled"]
    stages = [network.get_submodule(f"{'layer' if name == 'resnet8' else 'block'}{stage}") for stage in (1, 2, 3)]
    stem = network.get_submodule("conv1")(images)
    last = lambda maps: torch.relu(network.get_submodule("bn1")(maps))  # noqa: E731
    if name == "resnet8":
        stem, last = last(stem), nn.Identity()
    maps = [stem]
    for stage in stages:
        maps.append(stage(maps[-1]))
    for feature, expected in zip(features.values(), maps, strict=False):
        torch.testing.assert_close(feature, expected)
    pooled = last(maps[-1]).mean((2, 3))
    torch.testing.assert_close(features["maps"], last(maps[-1]))
    torch.testing.assert_close(features["pooled"], pooled)
    torch.testing.assert_close(logits, network.get_submodule("fc")(pooled))


def test_tapped_changes_nothing_in_the_network(resnet, images):
    names = list(resnet.state_dict())
    resnet.eval()
    before = resnet(images)
    tapped = Tapped(resnet, find_taps(resnet))
    assert list(resnet.state_dict()) == names
    assert list(tapped.state_dict()) == [f"network.{name}" for name in names]
    assert torch.equal(tapped(images)[0], before)


def test_gradients_flow_through_features_in_train_mode(resnet, images):
    tapped = Tapped(resnet.train(), find_taps(resnet))
    _, features = tapped(images)
    features["stage2"].square().mean().backward()
    assert resnet.get_parameter("layer2.0.conv1.weight").grad.abs().sum() > 0
    assert resnet.get_parameter("layer3.0.conv1.weight").grad is None


def test_inference_mode(resnet, images):
    with torch.inference_mode():
        _, features = Tapped(resnet.eval(), find_taps(resnet))(images)
    assert features["pooled"].is_inference()


def test_close_takes_the_hooks_off(resnet, images):
    tapped = Tapped(resnet, find_taps(resnet))
    assert any(module._forward_hooks for module in resnet.modules())
    tapped.close()
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in resnet.modules())
    with pytest.raises(InputError, match="did not run"):
        tapped(images)


def test_no_tensor_is_kept_between_calls(resnet, images):
    tapped = Tapped(resnet.eval(), find_taps(resnet))
    logits, features = tapped(images)
    kept = weakref.ref(features["stage1"])
    del logits, features
    gc.collect()
    assert kept() is None
    resnet(images)  # a caller that wants no features
    assert tapped._captured is None


def test_nothing_is_kept_after_an_error(resnet):
    tapped = Tapped(resnet, find_taps(resnet))
    with pytest.raises(RuntimeError):
        tapped(torch.rand(2, 5, 32, 32))
    assert tapped._captured is None


def test_two_tapped_share_a_network(resnet, images):
    resnet.eval()
    first, second = Tapped(resnet, {"a": Tap("layer1")}), Tapped(resnet, {"a": Tap("layer2")})
    assert first(images)[1]["a"].shape[1] == 16
    assert second(images)[1]["a"].shape[1] == 32


def test_a_copy_taps_its_own_network(resnet, images):
    original = Tapped(resnet.eval(), find_taps(resnet))
    clone = copy.deepcopy(original)
    original.close()
    nn.init.zeros_(clone.network.get_parameter("fc.weight"))
    _, features = clone(images)
    assert list(features) == list(find_taps(resnet))


def test_resolve_taps_takes_names_and_paths(resnet, images):
    taps = resolve_taps(resnet, ["stage1", "layer2.0.conv1", "pooled"])
    assert taps == {
        "stage1": Tap("layer1"), "layer2.0.conv1": Tap("layer2.0.conv1"), "pooled": Tap("fc", "input"),
    }  # fmt: skip
    assert Tapped(resnet.eval(), taps)(images)[1]["layer2.0.conv1"].shape == (2, 32, 16, 16)


def test_unknown_taps_name_those_that_exist(resnet):
    with pytest.raises(InputError, match=r"unknown tap 'layer9' of ResNet; named taps: stem, .*pooled; .*layer"):
        resolve_taps(resnet, ["layer9"])
    with pytest.raises(InputError, match=r"unknown tap 'layer1.7' of ResNet; .* such as .*layer1\.0"):
        Tapped(resnet, {"mine": Tap("layer1.7")})
    with pytest.raises(InputError, match=r"unknown tap '' of ResNet"):
        resolve_taps(resnet, [""])


def test_classifier_is_tapped_inside(resnet, images):
    classifier = Classifier(resnet.eval(), mean=(0.5,) * 3, std=(0.25,) * 3)
    assert find_taps(classifier)["stage1"] == Tap("network.layer1")
    assert find_taps(classifier)["preactivation2"] == Tap("network.layer2.0.relu", "input")
    assert find_taps(classifier)["maps"] == Tap("network.avgpool", "input")
    taps = resolve_taps(classifier, ["layer1.0", "pooled"])
    assert taps == {"layer1.0": Tap("network.layer1.0"), "pooled": Tap("network.fc", "input")}
    logits, features = Tapped(classifier, taps)(images)
    torch.testing.assert_close(resnet.get_submodule("fc")(features["pooled"]), logits)


def test_unknown_network_has_its_last_linear_layer(images):
    network = Small()
    assert find_taps(network) == {"pooled": Tap("head", "input")}
    assert Tapped(network, find_taps(network))(images)[1]["pooled"].shape == (2, 4)
    assert find_taps(nn.Conv2d(3, 4, 3)) == {}
    assert classifier_module(nn.Conv2d(3, 4, 3)) is None


@pytest.mark.parametrize(
    ("module", "message"),
    [
        ("pair", "wanted one tensor as output of 'pair', got tuple"),
        ("unused", "module 'unused' did not run"),
        ("normalization", "output of 'normalization' was overwritten"),
    ],
)
def test_features_that_cannot_be_had(images, module, message):
    with pytest.raises(InputError, match=message):
        Tapped(Small(), {"mine": Tap(module)})(images)


def test_module_that_runs_twice_is_tapped_at_its_last_run(images):
    network = Small().eval()
    _, features = Tapped(network, {"relu": Tap("relu"), "pooled": Tap("head", "input")})(images)
    torch.testing.assert_close(features["relu"].mean((2, 3)), features["pooled"])


def test_maps_with_channels_last_come_with_channels_first():
    network = nn.Sequential(nn.Identity(), nn.Flatten(), nn.Linear(24, 2))
    maps = torch.arange(24.0).reshape(1, 2, 3, 4)
    _, features = Tapped(network, {"last": Tap("0", channels=4), "first": Tap("0", channels=2), "any": Tap("0")})(maps)
    assert torch.equal(features["last"], maps.permute(0, 3, 1, 2))
    assert torch.equal(features["first"], maps)
    assert torch.equal(features["any"], maps)


@pytest.mark.parametrize(
    ("name", "stages", "shapes"),
    [
        ("resnet18", ["act1", "layer1", "layer2", "layer3", "layer4"], [64, 64, 128, 256, 512]),
        ("mobilenetv3_small_050", ["bn1", "blocks.0", "blocks.1", "blocks.3", "blocks.5"], [16, 8, 16, 24, 288]),
    ],
)
def test_timm_convolutional_taps(name, stages, shapes):
    network = build_network(f"timm/{name}", num_classes=10).eval()
    taps = find_taps(network)
    maps = ["maps"] if name == "resnet18" else []
    assert list(taps) == ["stem", "stage1", "stage2", "stage3", "stage4", *maps, "pooled"]
    assert [tap.module for tap in taps.values()][:5] == stages
    logits, features = Tapped(network, taps)(torch.rand(1, 3, 64, 64))
    sides = [32, 16, 8, 4, 2]
    assert [tuple(feature.shape) for feature in list(features.values())[:5]] == [
        (1, channels, side, side) for channels, side in zip(shapes, sides, strict=True)
    ]
    torch.testing.assert_close(network.get_submodule(taps["pooled"].module)(features["pooled"]), logits)


@pytest.mark.parametrize(("name", "tokens"), [("vit_tiny_patch16_224", 197), ("deit_tiny_distilled_patch16_224", 198)])
def test_timm_transformer_taps_are_four_blocks(name, tokens):
    network = build_network(f"timm/{name}", num_classes=10).eval()
    taps = find_taps(network)
    assert [(name, tap.module) for name, tap in taps.items()] == [
        ("stage1", "blocks.2"), ("stage2", "blocks.5"), ("stage3", "blocks.8"), ("stage4", "blocks.11"),
        ("pooled", "head"),
    ]  # fmt: skip
    _, features = Tapped(network, taps)(torch.rand(1, 3, 224, 224))
    assert features["stage4"].shape == (1, tokens, 192)
    assert features["pooled"].shape == (1, 192)


def test_timm_maps_with_channels_last_are_turned():
    network = build_network("timm/swin_tiny_patch4_window7_224", num_classes=10)
    taps = find_taps(network)
    assert [tap.channels for tap in taps.values()] == [96, 192, 384, 768, None]
    assert list(taps) == ["stage1", "stage2", "stage3", "stage4", "pooled"]


def test_timm_stage_without_a_module_is_left_out():
    network = build_network("timm/resnet18", num_classes=10)
    network.feature_info[2] = {**network.feature_info[2], "module": "not_there"}
    assert list(find_taps(network)) == ["stem", "stage1", "stage3", "stage4", "maps", "pooled"]


@pytest.mark.parametrize(
    ("name", "module"),
    [
        ("resnet18", "global_pool"),
        ("mobilenetv2_050", "global_pool"),
        ("regnetx_002", "head.global_pool"),
    ],
)
def test_timm_maps_average_to_the_pooled_features(name, module):
    network = build_network(f"timm/{name}", num_classes=10).train()
    taps = resolve_taps(network, ["maps", "pooled"])
    assert taps["maps"] == Tap(module, "input")
    with torch.no_grad():
        _, features = Tapped(network, taps)(torch.rand(2, 3, 64, 64))
    assert features["maps"].shape == (2, features["pooled"].shape[1], 2, 2)
    torch.testing.assert_close(features["maps"].mean((2, 3)), features["pooled"])


@pytest.mark.parametrize(
    "name",
    [
        "vit_tiny_patch16_224",  # no maps
        "mobilenetv3_small_050",  # a convolution after the pooling
        "convnext_atto",  # a normalisation after the pooling
        "swin_tiny_patch4_window7_224",  # channels last
    ],
)
def test_timm_networks_without_averaged_maps(name):
    assert "maps" not in find_taps(build_network(f"timm/{name}", num_classes=10))


@pytest.mark.parametrize("pool_type", ["max", "avgmax", ""])
def test_timm_poolings_that_do_not_average_give_no_maps(pool_type):
    num_classes = 10 if pool_type else 0  # without a pooling timm wants no classifier
    network = zoo._import_timm().create_model("resnet18", num_classes=num_classes, global_pool=pool_type)
    assert "maps" not in find_taps(network)


@pytest.mark.parametrize(
    ("between", "expected"),
    [(nn.Identity(), True), (nn.Dropout(0.0), True), (nn.Dropout(0.1), False), (nn.ReLU(), False)],
)
def test_timm_maps_want_nothing_before_the_classifier(between, expected):
    network = build_network("timm/regnetx_002", num_classes=10)
    network.get_submodule("head").drop = between
    assert ("maps" in find_taps(network)) is expected
