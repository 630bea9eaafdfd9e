import subprocess
import sys

import pytest
import torch

from soteacher.errors import InputError
from soteacher.models import zoo
from soteacher.models.zoo import build_network, check_network, network_names, timm_config


def test_network_names_all_build():
    names = network_names()
    assert {"resnet8x4", "resnet110", "wrn_40_2", "vgg8", "vgg19", "resnet50"} <= set(names)
    assert {"mobilenet_v2", "shufflenet_v1", "shufflenet_v2"} <= set(names)
    assert len(set(names)) == len(names)
    for name in names:
        assert build_network(name, num_classes=2) is not None


def test_importing_models_imports_no_timm():
    code = "import sys, soteacher.models.weights; sys.exit('timm' in sys.modules or 'torchvision' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_timm_network():
    network = build_network("timm/resnet18", num_classes=5, in_channels=1).eval()
    assert network(torch.rand(2, 1, 32, 32)).shape == (2, 5)


def test_timm_network_with_a_tag():
    network = build_network("timm/resnet18.a1_in1k", num_classes=5)
    assert network.get_submodule("fc").out_features == 5


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("resnet8x5x", "unknown network 'resnet8x5x'; did you mean .*resnet8x4"),
        ("wrn_40", "unknown network 'wrn_40'; did you mean wrn_40_[12]"),
        ("mobilenetv3_small_10", "did you mean .*timm/mobilenetv3_small_100"),
        ("timm/resnet_18", "unknown network 'timm/resnet_18'; did you mean .*timm/resnet18"),
        ("timm/resnet18.nothing", "unknown network.*timm/resnet18"),
        ("timm/", "unknown network 'timm/'"),
        ("", "unknown network ''; known: "),
        ("zzzzzzz", "unknown network 'zzzzzzz'; known: mobilenet_v2, patchwise_4_16"),
        ("resnet18", "depth must be 6n.*; timm has one of that name: timm/resnet18"),
        ("resnet9", "^resnet9: depth must be 6n.*got 9$"),
        ("resnet8x1", "^resnet8x1: width must be at least 2, got 1$"),
        ("wrn_41_2", "^wrn_41_2: depth must be 6n.*got 41$"),
        ("wrn_40_0", "^wrn_40_0: width must be at least 1, got 0$"),
    ],
)
def test_unknown_network_offers_the_nearest(name, message):
    with pytest.raises(InputError, match=message) as raised:
        build_network(name, num_classes=10)
    assert "\n" not in str(raised.value)
    with pytest.raises(InputError) as checked:
        check_network(name)
    assert str(checked.value) == str(raised.value)


def test_check_network_builds_and_downloads_nothing(monkeypatch):
    def fail(*arguments: object, **settings: object) -> None:
        raise AssertionError(f"a network was built: {arguments}, {settings}")

    monkeypatch.setattr(torch.nn.Module, "__init__", fail)
    monkeypatch.setattr(zoo._import_timm(), "create_model", fail)
    for name in (*network_names(), "resnet26x2", "wrn_10_3", "timm/resnet18", "timm/vit_tiny_patch16_224"):
        check_network(name)


def test_checking_our_names_imports_no_timm():
    code = (
        "import sys; from soteacher.models import zoo; zoo.check_network('wrn_40_2'); sys.exit('timm' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize("family", zoo.FAMILIES, ids=lambda family: family.names[0])
def test_a_family_refuses_the_names_of_others(family):
    with pytest.raises(InputError, match="'mlp' is no network of this family; wanted"):
        family.build("mlp", num_classes=10, in_channels=3)


@pytest.mark.parametrize("numbers", [{"num_classes": 0}, {"num_classes": 10, "in_channels": 0}])
def test_numbers_must_be_positive(numbers):
    with pytest.raises(InputError, match="must be at least 1, got 0"):
        build_network("resnet8", **numbers)


def test_own_network_has_no_published_weights():
    with pytest.raises(InputError, match="resnet8 has no published weights"):
        build_network("resnet8", num_classes=10, pretrained=True)


def test_failing_download_is_one_line(monkeypatch):
    def create_model(name: str, **settings: object) -> None:
        assert settings["pretrained"]
        raise OSError(f"no connection for {name}\nand much more")

    timm = zoo._import_timm()
    monkeypatch.setattr(timm, "create_model", create_model)
    with pytest.raises(
        InputError, match=r"^cannot get pretrained weights for timm/resnet18 .*: no connection for resnet18$"
    ):
        build_network("timm/resnet18", num_classes=10, pretrained=True)


def test_timm_config_is_timm_only():
    assert timm_config("resnet8") is None
    config = timm_config("timm/vit_tiny_patch16_224")
    assert config is not None
    assert config.fixed_input_size
    with pytest.raises(InputError, match="unknown network"):
        timm_config("timm/vit_tinny_patch16_224")
