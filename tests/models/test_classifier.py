import pytest
import torch
from pydantic import ValidationError
from torch import Tensor, nn

from soteacher.errors import InputError
from soteacher.models.classifier import Classifier, NetworkSpec, build_classifier, network_spec
from soteacher.torchvision_operators import define_missing_operators

MEAN, STD = (0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761)
DATA = {"num_classes": 10, "in_channels": 3, "mean": MEAN, "std": STD, "image_size": 32}


class Recorder(nn.Module):
    """Keeps what it was given."""

    def forward(self, images: Tensor) -> Tensor:
        self.images = images
        return images.mean((2, 3))


def test_normalization_equals_torchvision():
    define_missing_operators()
    from torchvision.transforms import Normalize

    images = torch.rand(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    recorder = Recorder()
    Classifier(recorder, mean=MEAN, std=STD)(images)
    assert torch.equal(recorder.images, Normalize(MEAN, STD)(images))


def test_resizing_equals_torchvision():
    define_missing_operators()
    from torchvision.transforms import functional

    recorder = Recorder()
    classifier = Classifier(recorder, mean=(0.0,) * 3, std=(1.0,) * 3, input_size=20)
    for size in (32, 16):
        images = torch.rand(2, 3, size, size, generator=torch.Generator().manual_seed(size))
        classifier(images)
        torch.testing.assert_close(recorder.images, functional.resize(images, [20, 20], antialias=True))
    images = torch.rand(2, 3, 20, 20)
    classifier(images)
    assert torch.equal(recorder.images, images)


def test_normalization_is_not_in_the_state_dict_but_moves():
    classifier = Classifier(nn.Linear(2, 2), mean=MEAN, std=STD)
    assert list(classifier.state_dict()) == ["network.weight", "network.bias"]
    assert classifier.double().mean.dtype == torch.float64


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (torch.rand(2, 1, 8, 8), r"wanted images \[B, 3, H, W\], got shape \[2, 1, 8, 8\]"),
        (torch.rand(3, 8, 8), r"wanted images \[B, 3, H, W\], got shape \[3, 8, 8\]"),
        (torch.zeros(2, 3, 8, 8, dtype=torch.uint8), "wanted floating point images in .* got torch.uint8"),
    ],
)
def test_bad_images_are_refused(images, message):
    with pytest.raises(InputError, match=message):
        Classifier(Recorder(), mean=MEAN, std=STD)(images)


def test_network_must_return_logits():
    classifier = Classifier(nn.Identity(), mean=MEAN, std=STD)
    with pytest.raises(InputError, match=r"wanted logits \[B, K\] from Identity, got \[2, 3, 8, 8\]"):
        classifier(torch.rand(2, 3, 8, 8))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"mean": MEAN, "std": (1.0,)}, "got 3 and 1"),
        ({"mean": (), "std": ()}, "got 0 and 0"),
        ({"mean": MEAN, "std": (1.0, 0.0, 1.0)}, "std must be positive"),
        ({"mean": MEAN, "std": STD, "input_size": 0}, "input_size must be at least 1"),
    ],
)
def test_bad_classifier_is_refused(settings, message):
    with pytest.raises(InputError, match=message):
        Classifier(Recorder(), **settings)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mean": (0.5,), "std": (0.5,)}, "each of 3 channels, got 1"),
        ({"std": (0.5, 0.5, -1.0)}, "std must be positive"),
        ({"class_names": ("cat", "dog")}, "class_names must be 10, or none, got 2"),
        ({"num_classes": 0}, "greater than or equal to 1"),
        ({"mean": (float("nan"),) * 3}, "finite"),
        ({"colour": 1}, "unknown key"),
    ],
)
def test_bad_spec_is_refused(change, message):
    good = {"model": "resnet8", "num_classes": 10, "mean": MEAN, "std": STD}
    NetworkSpec(**good)
    with pytest.raises(ValidationError, match=message):
        NetworkSpec(**good | change)


def test_spec_survives_json():
    spec = network_spec("resnet8", **DATA, class_names=[str(k) for k in range(10)])
    assert NetworkSpec.model_validate_json(spec.model_dump_json()) == spec


def test_network_spec_of_own_network_is_the_data_s():
    spec = network_spec("resnet8", **DATA)
    assert (spec.mean, spec.std, spec.input_size, spec.class_names) == (MEAN, STD, None, ())
    logits = build_classifier(spec).eval()(torch.rand(2, 3, 32, 32))
    assert logits.shape == (2, 10)


def test_network_spec_of_pretrained_network_has_its_normalization():
    imagenet_mean = (0.485, 0.456, 0.406)
    assert network_spec("timm/resnet18", **DATA).mean == MEAN
    spec = network_spec("timm/resnet18", **DATA, pretrained=True)
    assert spec.mean == imagenet_mean
    assert spec.input_size is None
    gray = DATA | {"in_channels": 1, "mean": (0.1,), "std": (0.3,)}
    assert network_spec("timm/resnet18", **gray, pretrained=True).mean == (0.1,)


def test_fixed_size_network_gets_resized_images():
    spec = network_spec("timm/vit_tiny_patch16_224", **DATA)
    assert spec.input_size == 224
    assert network_spec("timm/vit_tiny_patch16_224", **DATA | {"image_size": 224}).input_size is None
    with torch.inference_mode():
        assert build_classifier(spec).eval()(torch.rand(1, 3, 32, 32)).shape == (1, 10)
