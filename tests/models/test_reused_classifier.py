"""A student that ends in a projector and its teacher's classifier is one network like any other."""

import json
from pathlib import Path

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor, nn

from soteacher.errors import InputError
from soteacher.models.classifier import Classifier, NetworkSpec, build_classifier, classifier_of
from soteacher.models.inspection import inspect_network
from soteacher.models.parts import Parts
from soteacher.models.reused_classifier import ReusedSpec, projected_end, reuse_classifier
from soteacher.models.takeover import take_over_classifier
from soteacher.models.taps import Tapped, classifier_module, find_taps
from soteacher.models.weights import load_classifier, read_facts, save_classifier
from soteacher.models.zoo import build_network

NAMES = ("student s", "teacher t")
PAIRS = {  # student, teacher: what is projected, from how many numbers to how many
    ("resnet8", "resnet8x4"): ("maps", 64, 256),
    ("wrn_10_1", "vgg8"): ("maps", 64, 512),
    ("mobilenet_v2", "wrn_10_2"): ("maps", 1280, 128),
    ("timm/test_resnet", "resnet8"): ("maps", 96, 64),
    ("resnet8", "timm/test_vit"): ("vectors", 64, 64),
    ("timm/test_vit", "resnet8x2"): ("vectors", 64, 128),
}


def spec_of(name: str) -> NetworkSpec:
    size = 160 if name == "timm/test_vit" else None
    return NetworkSpec(model=name, num_classes=5, mean=(0.5,) * 3, std=(0.25,) * 3, input_size=size)


def new(name: str, seed: int = 0) -> Classifier:
    torch.manual_seed(seed)
    return build_classifier(spec_of(name)).eval()


@pytest.fixture
def images() -> Tensor:
    return torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def outputs(classifier: Classifier, images: Tensor, *names: str) -> tuple[Tensor, dict[str, Tensor]]:
    taps = find_taps(classifier)
    tapped = Tapped(classifier, {name: taps[name] for name in names})
    with torch.no_grad():
        logits, features = tapped(images)
    tapped.close()
    return logits, features


@pytest.mark.parametrize("pair", PAIRS, ids="-".join)
def test_the_end_is_a_projector_and_the_teachers_classifier(pair: tuple[str, str], images: Tensor) -> None:
    student, teacher = new(pair[0]), new(pair[1], 1)
    what, in_features, features = PAIRS[pair]
    own = Parts(student).classifier
    before = outputs(student, images, "maps" if what == "maps" else "pooled")[1]
    spec = take_over_classifier(student, teacher, images, reduction=2, names=NAMES)
    assert (spec.in_features, spec.features, spec.pooling is not None) == (in_features, features, what == "maps")
    last, taken = Parts(student).classifier, Parts(teacher).classifier
    assert last is not taken
    assert own not in list(student.modules())
    assert torch.equal(last.weight, taken.weight)
    assert not last.weight.requires_grad
    logits, found = outputs(student, images, "pooled", "projected", *(["maps"] if what == "maps" else []))
    torch.testing.assert_close(torch.nn.functional.linear(found["pooled"], taken.weight, taken.bias), logits)
    if what == "maps":
        assert torch.equal(found["maps"], found["projected"])
        assert found["projected"].shape[1:] == (features, *before["maps"].shape[2:])
        torch.testing.assert_close(found["projected"].mean((2, 3)), found["pooled"])
        assert found["projected"].min() == 0  # a convolutional classifier has learned from rectified maps
    else:
        assert found["projected"].shape == (2, features)
        assert torch.equal(found["projected"], found["pooled"])
        assert found["projected"].min() < 0
    assert "projected" in inspect_network(student, images, name="s").taps


@pytest.mark.parametrize("pair", PAIRS, ids="-".join)
def test_it_is_built_again_from_its_spec(pair: tuple[str, str], images: Tensor, tmp_path: Path) -> None:
    student, teacher = new(pair[0]), new(pair[1], 1)
    reused = take_over_classifier(student, teacher, images, reduction=4, names=NAMES)
    spec = spec_of(pair[0]).model_copy(update={"reused": reused})
    assert NetworkSpec.model_validate_json(spec.model_dump_json()) == spec
    save_classifier(tmp_path, student, spec, {"role": "student"})
    random = torch.get_rng_state()
    loaded, read, _ = load_classifier(tmp_path)
    assert read == spec
    assert torch.equal(torch.get_rng_state(), random)
    with torch.no_grad():
        assert torch.equal(loaded(images), student(images))
    frozen = [name for name, parameter in loaded.named_parameters() if not parameter.requires_grad]
    assert frozen == [f"network.{classifier_module(student.network)}.{name}" for name in ("weight", "bias")]


def test_old_files_without_the_field_are_read(tmp_path: Path, images: Tensor) -> None:
    classifier = new("resnet8")
    save_classifier(tmp_path, classifier, spec_of("resnet8"), {})
    facts = json.loads((tmp_path / "model.json").read_text())
    del facts["network"]["reused"]
    (tmp_path / "model.json").write_text(json.dumps(facts))
    assert read_facts(tmp_path)[0] == spec_of("resnet8")
    with torch.no_grad():
        assert torch.equal(load_classifier(tmp_path)[0](images), classifier(images))


def test_the_projector_is_the_published_one(images: Tensor) -> None:
    student, teacher = new("resnet8"), new("resnet8x4", 1)
    before = {name: value.clone() for name, value in student.state_dict().items()}
    take_over_classifier(student, teacher, images, reduction=2, names=NAMES)
    end = projected_end(student.network)
    assert end is not None
    layers = list(end[1].projector)
    assert [type(layer) for layer in layers] == [nn.Conv2d, nn.BatchNorm2d, nn.ReLU] * 3
    shapes = [tuple(layer.weight.shape) for layer in layers if isinstance(layer, nn.Conv2d)]
    assert shapes == [(128, 64, 1, 1), (128, 128, 3, 3), (256, 128, 1, 1)]
    assert all(layer.bias is None for layer in layers if isinstance(layer, nn.Conv2d))
    # 64 * 128 + 9 * 128 ** 2 + 128 * 256 weights, 2 * (128 + 128 + 256) of the normalisations, 5 * 257 frozen ones
    added = sum(value.numel() for value in student.parameters()) - sum(
        value.numel() for name, value in before.items() if "running" not in name and "tracked" not in name
    )
    assert added == 64 * 128 + 9 * 128**2 + 128 * 256 + 2 * 512 + 5 * 257 - 5 * 65
    after = student.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items() if not name.startswith("network.fc."))


def test_the_backbone_trains_and_the_taken_classifier_does_not(images: Tensor) -> None:
    student, teacher = new("resnet8"), new("resnet8x2", 1)
    take_over_classifier(student, teacher, images, reduction=2, names=NAMES)
    student.train()(images).square().sum().backward()
    without = [name for name, parameter in student.named_parameters() if parameter.grad is None]
    assert without == ["network.fc.weight", "network.fc.bias"]


def test_a_classifier_without_bias_stays_without(images: Tensor) -> None:
    student, teacher = new("resnet8"), new("resnet8x2", 1)
    teacher.network.fc = nn.Linear(128, 5, bias=False)
    spec = take_over_classifier(student, teacher, images, reduction=2, names=NAMES)
    assert not spec.bias
    assert Parts(student).classifier.bias is None


def test_a_network_of_the_callers_own_projects_its_vectors(images: Tensor) -> None:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 5))
    student = Classifier(network, mean=[0.5] * 3, std=[0.25] * 3).eval()
    spec = take_over_classifier(student, new("resnet8", 1), images, reduction=2, names=NAMES)
    assert (spec.classifier, spec.pooling, spec.in_features) == ("3", None, 4)
    again = nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 5))
    built = classifier_of(again, spec_of("resnet8").model_copy(update={"reused": spec}))
    built.load_state_dict(student.state_dict())
    with torch.no_grad():
        assert torch.equal(built.eval()(images), student(images))


def test_a_students_student_projects_to_the_maps_that_its_teachers_classifier_sees(images: Tensor) -> None:
    teacher = new("resnet8", 1)
    take_over_classifier(teacher, new("resnet8x2", 2), images, reduction=2, names=NAMES)
    student = new("resnet8")
    spec = take_over_classifier(student, teacher, images, reduction=2, names=NAMES)
    assert (spec.pooling, spec.features) == ("avgpool", 128)


def test_a_network_that_projects_vectors_has_no_maps_any_more(images: Tensor) -> None:
    student = new("resnet8")
    take_over_classifier(student, new("timm/test_vit", 1), images, reduction=2, names=NAMES)
    assert "maps" not in inspect_network(student, images, name="s").taps


def test_a_teacher_whose_classifier_is_not_linear_is_named(images: Tensor) -> None:
    network = nn.Sequential(nn.Conv2d(3, 5, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    teacher = Classifier(network, mean=[0.5] * 3, std=[0.25] * 3)
    with pytest.raises(InputError, match=r"^teacher t has no classifier to exchange or reuse: wanted a linear layer"):
        take_over_classifier(new("resnet8"), teacher, images, reduction=2, names=NAMES)


class Scaled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.head = nn.Linear(4, 5)

    def forward(self, images: Tensor) -> Tensor:
        return 10 * self.head(self.body(images))


@pytest.mark.parametrize("role", ["student", "teacher"])
def test_logits_that_are_not_the_layers_own_are_refused(images: Tensor, role: str) -> None:
    torch.manual_seed(0)
    odd, other = Classifier(Scaled(), mean=[0.5] * 3, std=[0.25] * 3), new("resnet8")
    student, teacher = (odd, other) if role == "student" else (other, odd)
    before = {name: value.clone() for name, value in student.state_dict().items()}
    with pytest.raises(InputError, match=f"^{role} .* its logits are not those of one linear layer"):
        take_over_classifier(student, teacher, images, reduction=2, names=NAMES)
    assert student.state_dict().keys() == before.keys()
    assert odd.training  # the look has left it as it was


def test_a_reduction_beyond_the_features_is_refused(images: Tensor) -> None:
    with pytest.raises(InputError, match="reduction must be at most the 64 features to project to, got 65"):
        take_over_classifier(new("resnet8"), new("resnet8", 1), images, reduction=65, names=NAMES)


def test_a_network_without_the_modules_is_named() -> None:
    spec = ReusedSpec(classifier="head", pooling="pool", in_features=64, features=64)
    with pytest.raises(InputError, match="ResNet has no module 'head' to put another network's classifier at"):
        reuse_classifier(build_network("resnet8", num_classes=5), spec, num_classes=5)


@pytest.mark.parametrize(
    "wrong", [{"in_features": 0}, {"features": 0}, {"reduction": 0}, {"classifier": None}, {"x": 1}]
)
def test_an_impossible_spec_is_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        ReusedSpec.model_validate({"classifier": "fc", "in_features": 4, "features": 4} | wrong)
