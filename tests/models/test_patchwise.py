import pytest
import torch
from torch.nn import functional as F

from soteacher.errors import InputError
from soteacher.models.patchwise import Patchwise, build_patchwise
from soteacher.models.taps import Tapped, find_taps
from soteacher.models.zoo import build_network, check_network, network_names


@pytest.fixture
def network() -> Patchwise:
    torch.manual_seed(0)
    return build_patchwise("patchwise_4_32", num_classes=7, in_channels=3)


@pytest.fixture
def images() -> torch.Tensor:
    return torch.rand(5, 3, 8, 12, generator=torch.Generator().manual_seed(0))


def _patches(images: torch.Tensor, side: int) -> torch.Tensor:
    """Cut images into patches, ``[B, M, C, P, P]``."""
    rows = [images[:, :, down : down + side] for down in range(0, images.shape[2], side)]
    cut = [row[..., right : right + side] for row in rows for right in range(0, images.shape[3], side)]
    return torch.stack(cut, 1)


def test_prediction_is_the_normalized_geometric_mean_of_the_patches(network, images):
    by_patch = torch.stack([network(patch) for patch in _patches(images, 4).unbind(1)], 1)
    torch.testing.assert_close(network(images), by_patch.mean(1))
    products = by_patch.double().softmax(-1).prod(1) ** (1 / 6)
    expected = products / products.sum(-1, keepdim=True)
    torch.testing.assert_close(network(images).double().softmax(-1), expected, rtol=1e-5, atol=1e-6)


def test_prediction_does_not_depend_on_the_order_of_patches(network, images):
    shuffled = torch.cat((images[..., 8:], images[..., :8]), -1)
    torch.testing.assert_close(network(shuffled), network(images))


def test_network_is_two_linear_layers_on_each_patch(network, images):
    patches = _patches(images, 4).flatten(2)
    hidden = F.relu(patches @ network.conv1.weight.flatten(1).T + network.conv1.bias)
    features = F.relu(hidden @ network.conv2.weight.flatten(1).T + network.conv2.bias).mean(1)
    torch.testing.assert_close(network(images), features @ network.fc.weight.T + network.fc.bias)


def test_taps(network, images):
    with torch.no_grad():
        _, features = Tapped(network, find_taps(network))(images)
    assert {name: tuple(feature.shape[1:]) for name, feature in features.items()} == {
        "stem": (32, 2, 3), "stage1": (32, 2, 3), "preactivation1": (32, 2, 3), "maps": (32, 2, 3), "pooled": (32,),
    }  # fmt: skip
    assert features["preactivation1"].min() < 0
    assert torch.equal(features["preactivation1"].relu(), features["stage1"])
    assert torch.equal(features["maps"].mean((2, 3)), features["pooled"])


def test_start_keeps_the_scale_of_what_goes_in():
    torch.manual_seed(0)
    network = build_patchwise("patchwise_4_512", num_classes=10, in_channels=1)
    with torch.no_grad():
        _, features = Tapped(network, find_taps(network))(torch.randn(200, 1, 8, 8))
    # He's start keeps the mean square through each rectified layer.
    assert features["stem"].square().mean().item() == pytest.approx(1, rel=0.1)
    assert features["stage1"].square().mean().item() == pytest.approx(1, rel=0.1)
    assert not network.conv1.bias.any()
    assert not network.conv2.bias.any()


@pytest.mark.parametrize(("name", "patch_size", "width"), [("patchwise_4_16", 4, 16), ("patchwise_8_5", 8, 5)])
def test_name_gives_patch_size_and_width(name, patch_size, width):
    check_network(name)
    network = build_network(name, num_classes=3, in_channels=1)
    assert network.conv1.weight.shape == (width, 1, patch_size, patch_size)
    assert network.conv2.weight.shape == (width, width, 1, 1)
    assert network(torch.rand(2, 1, 16, 16)).shape == (2, 3)


def test_listed_names_build():
    listed = [name for name in network_names() if name.startswith("patchwise")]
    assert {"patchwise_4_16", "patchwise_4_64", "patchwise_4_256"} <= set(listed)
    for name in listed:
        assert build_network(name, num_classes=2)(torch.rand(1, 3, 16, 16)).shape == (1, 2)


@pytest.mark.parametrize("shape", [(8, 10), (6, 8), (3, 3)])
def test_images_that_are_no_whole_patches_are_refused(network, shape):
    with pytest.raises(InputError, match=f"multiples of 4, got {shape[0]}x{shape[1]}$") as caught:
        network(torch.rand(1, 3, *shape))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("patchwise_0_16", "^patchwise_0_16: patch size must be at least 1, got 0$"),
        ("patchwise_4_0", "^patchwise_4_0: width must be at least 1, got 0$"),
        ("patchwise_4", "unknown network 'patchwise_4'; did you mean .*patchwise_4_16"),
    ],
)
def test_impossible_names_are_refused(name, message):
    with pytest.raises(InputError, match=message):
        check_network(name)
