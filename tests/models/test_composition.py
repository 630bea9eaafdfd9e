from collections.abc import Callable, Mapping

import pytest
import torch
from torch import Tensor, nn

from soteacher.models.classifier import Classifier
from soteacher.models.composition import Composition
from soteacher.models.zoo import build_network

RESNET8 = {
    "conv1": "bn1",
    "layer1.0.conv1": "layer1.0.bn1",
    "layer1.0.conv2": "layer1.0.bn2",
    "layer2.0.conv1": "layer2.0.bn1",
    "layer2.0.conv2": "layer2.0.bn2",
    "layer2.0.downsample.0": "layer2.0.downsample.1",
    "layer3.0.conv1": "layer3.0.bn1",
    "layer3.0.conv2": "layer3.0.bn2",
    "layer3.0.downsample.0": "layer3.0.downsample.1",
}
WRN_10_1 = {  # the stem's output is a shortcut too; what the second convolutions put out is added first
    "block1.layer.0.conv1": "block1.layer.0.bn2",
    "block2.layer.0.conv1": "block2.layer.0.bn2",
    "block3.layer.0.conv1": "block3.layer.0.bn2",
}
BY_HAND = {
    "resnet8": RESNET8,
    "wrn_10_1": WRN_10_1,
    # in the wider one the first shortcut is a convolution of the activated input, and so the stem has its batch norm
    "wrn_10_2": {"conv1": "block1.layer.0.bn1"} | WRN_10_1,
    "vgg8": {f"block{number}.0": f"block{number}.1" for number in range(5)},
    "timm/test_efficientnet": {  # batch norms that rectify; beside a squeeze of which the convolutions have none
        "conv_stem": "bn1",
        "blocks.0.0.conv": "blocks.0.0.bn1",
        "blocks.1.0.conv_exp": "blocks.1.0.bn1",
        "blocks.1.0.conv_pwl": "blocks.1.0.bn2",
        "blocks.2.0.conv_exp": "blocks.2.0.bn1",
        "blocks.2.0.conv_pwl": "blocks.2.0.bn2",
        "blocks.3.0.conv_pw": "blocks.3.0.bn1",
        "blocks.3.0.conv_dw": "blocks.3.0.bn2",
        "blocks.3.0.conv_pwl": "blocks.3.0.bn3",
        "blocks.4.0.conv_pw": "blocks.4.0.bn1",
        "blocks.4.0.conv_dw": "blocks.4.0.bn2",
        "blocks.4.0.conv_pwl": "blocks.4.0.bn3",
        "conv_head": "bn2",
    },
    "timm/test_vit": {},
}


@pytest.mark.parametrize("name", BY_HAND)
def test_pairs_of_known_networks(name: str) -> None:
    torch.manual_seed(0)
    size = 160 if name == "timm/test_vit" else 32
    network = build_network(name, num_classes=5)
    found = Composition(network, torch.rand(2, 3, size, size))
    assert dict(found) == BY_HAND[name]
    assert list(found) == [path for path, _ in network.named_modules() if path in found]
    assert len(found) == len(BY_HAND[name])


@pytest.mark.parametrize("name", ["mobilenet_v2", "shufflenet_v1", "shufflenet_v2", "ResNet50", "timm/resnet18"])
def test_where_every_convolution_has_a_batch_norm_all_are_found_in_order(name: str) -> None:
    network = build_network(name, num_classes=5)
    found = Composition(network, torch.rand(2, 3, 32, 32))
    convolutions = [path for path, module in network.named_modules() if isinstance(module, nn.Conv2d)]
    norms = [path for path, module in network.named_modules() if isinstance(module, nn.BatchNorm2d)]
    assert list(found) == convolutions
    assert sorted(found.values()) == sorted(norms)
    channels = [network.get_submodule(layer).weight.shape[0] for layer in found]
    assert channels == [network.get_submodule(norm).weight.shape[0] for norm in found.values()]


def test_paths_are_those_of_the_bare_network() -> None:
    network = build_network("resnet8", num_classes=5)
    classifier = Classifier(network, mean=[0.5] * 3, std=[0.25] * 3, input_size=16)
    assert dict(Composition(classifier, torch.rand(2, 3, 32, 32))) == RESNET8


class Net(nn.Module):
    """Parts to be put together in different ways."""

    def __init__(self, run: Callable[["Net", Tensor], Tensor]) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(3, 4, 3, padding=1)
        self.other = nn.Conv2d(4, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4)
        self.second = nn.BatchNorm2d(4)
        self.rows = nn.BatchNorm1d(4)
        self.linear = nn.Linear(4, 4)
        self.identity = nn.Identity()
        self.in_place = nn.ReLU(inplace=True)
        self.run = run

    def forward(self, images: Tensor) -> Tensor:
        maps = self.run(self, images)
        return maps.mean((2, 3)) if maps.ndim == 4 else maps


def added(net: Net, images: Tensor) -> Tensor:
    maps = net.convolution(images)
    return net.norm(maps) + maps


def later(net: Net, images: Tensor) -> Tensor:
    maps = net.convolution(images)
    return net.other(net.norm(maps)) + maps.flatten(2).view_as(maps)


def twice(net: Net, images: Tensor) -> Tensor:
    maps = net.norm(net.convolution(images))
    return net.norm(net.convolution(maps[:, :3]))


def tokens(net: Net, images: Tensor) -> Tensor:
    rows = net.linear(net.convolution(images).mean((2, 3)).unsqueeze(1).expand(-1, 4, -1))  # [B, 4 tokens, 4]
    return net.rows(rows).mean(1)


def forked(net: Net, images: Tensor) -> Tensor:
    maps = net.convolution(images)
    return net.norm(maps) + net.second(maps)


RUNS: Mapping[str, tuple[Callable[[Net, Tensor], Tensor], dict[str, str]]] = {
    "alone": (lambda net, x: net.norm(net.convolution(x)), {"convolution": "norm"}),
    "by keyword": (lambda net, x: net.norm(input=net.convolution(x)), {"convolution": "norm"}),
    "through an identity": (lambda net, x: net.norm(net.identity(net.convolution(x))), {"convolution": "norm"}),
    "added to what was normalised": (added, {}),
    "read as a view after the batch norm": (later, {}),
    "rectified in place": (lambda net, x: net.norm(net.in_place(net.convolution(x))), {}),
    "rectified afterwards": (lambda net, x: net.in_place(net.norm(net.convolution(x))), {"convolution": "norm"}),
    "multiplied": (lambda net, x: net.norm(2 * net.convolution(x)), {}),
    "two batch norms": (forked, {}),
    "one after the other": (lambda net, x: net.second(net.norm(net.convolution(x))), {"convolution": "norm"}),
    "two convolutions, one batch norm": (lambda net, x: net.norm(net.other(net.norm(net.convolution(x)))), {}),
    "shared": (twice, {}),
    "shared, normalised once": (lambda net, x: net.norm(net.convolution(x)) + net.convolution(x), {}),
    "linear": (lambda net, x: net.rows(net.linear(net.convolution(x).mean((2, 3)))), {"linear": "rows"}),
    "linear on tokens": (tokens, {}),
    "neither": (lambda net, x: net.other(net.convolution(x)), {}),
}


@pytest.mark.parametrize(("run", "expected"), RUNS.values(), ids=RUNS)
def test_only_what_nothing_else_reads_is_joined(run: Callable[[Net, Tensor], Tensor], expected: dict[str, str]) -> None:
    assert dict(Composition(Net(run), torch.rand(2, 3, 8, 8))) == expected


def test_transposed_convolutions_and_other_dimensions() -> None:
    network = nn.Sequential(
        nn.ConvTranspose2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(2), nn.Conv1d(4, 5, 3), nn.BatchNorm1d(5),
        nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.Linear(5, 6), nn.SyncBatchNorm(6),
    )  # fmt: skip
    assert dict(Composition(network, torch.rand(2, 3, 6, 6))) == {"0": "1", "3": "4", "7": "8"}


def test_it_is_found_out_once_and_leaves_the_network_as_it_was() -> None:
    network = Net(lambda net, x: net.norm(net.convolution(x)))
    network.norm.eval()
    state = {name: value.clone() for name, value in network.state_dict().items()}
    runs: list[int] = []
    network.register_forward_hook(lambda *_: runs.append(1))
    found = Composition(network, torch.rand(2, 3, 8, 8))
    assert runs == []
    assert found["convolution"] == "norm"
    assert found.get("other") is None
    assert len(found) == 1
    assert runs == [1]
    assert network.training
    assert not network.norm.training
    assert all(torch.equal(value, state[name]) for name, value in network.state_dict().items())
    hooks = [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in network.modules()]
    assert sum(hooks) == 1


def test_hooks_are_taken_off_after_an_error() -> None:
    network = Net(lambda net, x: net.norm(net.convolution(x)))
    with pytest.raises(RuntimeError):
        dict(Composition(network, torch.rand(2, 5, 8, 8)))
    assert not any(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in network.modules())
    assert network.training
