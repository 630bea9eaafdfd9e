"""Pieces of a network give what the whole network gives, and leave no trace."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from soteacher.errors import InputError
from soteacher.models.classifier import Classifier
from soteacher.models.parts import Parts
from soteacher.models.taps import Tapped, find_taps
from soteacher.models.zoo import build_network

NETWORKS = (
    "resnet8", "wrn_10_1", "vgg8", "mobilenet_v2", "shufflenet_v1", "shufflenet_v2",
    "timm/test_resnet", "timm/test_efficientnet", "timm/test_nfnet", "timm/test_vit", "timm/test_convnext",
)  # fmt: skip
CLASSES = 5


def classifier_of(name: str) -> Classifier:
    torch.manual_seed(0)
    size = 160 if name == "timm/test_vit" else None
    network = build_network(name, num_classes=CLASSES)
    return Classifier(network, mean=[0.5] * 3, std=[0.25] * 3, input_size=size).eval()


def stages_of(classifier: Classifier) -> list[str]:
    return [tap for tap in find_taps(classifier) if tap == "stem" or tap.startswith("stage")]


def run(classifier: Classifier, images: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    taps = find_taps(classifier)
    tapped = Tapped(classifier, {name: taps[name] for name in stages_of(classifier)})
    try:
        return tapped(images)
    finally:
        tapped.close()


def everything(classifier: Classifier) -> dict[str, Any]:
    """Return what a look or a part could leave behind."""
    modules = dict(classifier.named_modules())
    return {
        "attributes": {name: sorted(vars(module)) for name, module in modules.items()},
        "modes": [module.training for module in modules.values()],
        "hooks": [
            len(vars(module)["_forward_hooks"]) + len(vars(module)["_forward_pre_hooks"]) for module in modules.values()
        ],
        "tracking": [getattr(module, "track_running_stats", None) for module in modules.values()],
        "state": {name: value.tolist() for name, value in classifier.state_dict().items() if "running" in name},
        "batches": {name: int(value) for name, value in classifier.state_dict().items() if "tracked" in name},
        "random": torch.get_rng_state().tolist(),
    }


@pytest.fixture
def images() -> Tensor:
    return torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


class Dropping(nn.Module):
    """A network that nobody knows but by its feature paths: one module runs on both sides, dropout behind."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 4, 3, padding=1)
        self.bn1 = nn.BatchNorm2d(4)
        self.pool = nn.MaxPool2d(2)
        self.relu = nn.ReLU()
        self.conv2 = nn.Conv2d(4, 6, 3, padding=1)
        self.bn2 = nn.BatchNorm2d(6)
        self.drop = nn.Dropout(0.5)
        self.head = nn.Linear(6, CLASSES)
        self.feature_info = [
            {"module": "bn1", "num_chs": 4, "reduction": 1},
            {"module": "bn2", "num_chs": 6, "reduction": 2},
        ]

    def get_classifier(self) -> nn.Module:
        return self.head

    def forward(self, images: Tensor) -> Tensor:
        maps = self.pool(self.relu(self.bn1(self.conv1(self.pool(self.relu(images))))))
        maps = self.pool(self.relu(self.bn2(self.conv2(maps))))
        return self.head(self.drop(maps).mean((2, 3)))


@pytest.fixture
def dropping() -> Classifier:
    torch.manual_seed(0)
    return Classifier(Dropping(), mean=[0.5] * 3, std=[0.25] * 3)


@pytest.mark.parametrize("name", NETWORKS)
@torch.no_grad()
def test_going_on_from_the_own_feature_gives_the_logits(name: str, images: Tensor) -> None:
    classifier = classifier_of(name)
    if name.startswith("timm/") and name != "timm/test_vit":
        images = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    logits, features = run(classifier, images)
    parts = Parts(classifier)
    assert stages_of(classifier)
    for tap, feature in features.items():
        assert torch.equal(parts.run_from(tap, feature, images), logits), tap
        assert torch.equal(parts.run_from(tap, feature[:1], images[:1]).argmax(1), logits[:1].argmax(1)), tap


@torch.no_grad()
def test_channels_last_stages_are_given_channels_first() -> None:
    torch.manual_seed(0)
    network = build_network("timm/test_mambaout", num_classes=CLASSES)
    classifier = Classifier(network, mean=[0.5] * 3, std=[0.25] * 3).eval()
    images = torch.rand(2, 3, 64, 64)
    logits, features = run(classifier, images)
    raw: list[Tensor] = []
    handle = classifier.get_submodule(find_taps(classifier)["stage2"].module).register_forward_hook(
        lambda *given: raw.append(given[2])
    )
    classifier(images)
    handle.remove()
    assert features["stage2"].shape == raw[0].permute(0, 3, 1, 2).shape != raw[0].shape
    assert torch.equal(Parts(classifier).run_from("stage2", features["stage2"], images), logits)


@pytest.mark.parametrize("name", ["resnet8", "wrn_10_1", "vgg8", "timm/test_vit"])
def test_gradients_in_training_are_those_of_the_whole_network(name: str, images: Tensor) -> None:
    classifier = classifier_of(name).train()
    logits, features = run(classifier, images)
    weights = torch.randn(logits.shape, generator=torch.Generator().manual_seed(1))
    tap = stages_of(classifier)[1]
    (wanted,) = torch.autograd.grad((logits * weights).sum(), features[tap], retain_graph=True)
    feature = features[tap].detach().requires_grad_()
    again = Parts(classifier).run_from(tap, feature, images)
    torch.testing.assert_close(again, logits, rtol=1e-4, atol=1e-5)
    again.backward(weights)
    assert feature.grad is not None
    torch.testing.assert_close(feature.grad, wanted, rtol=1e-4, atol=1e-5 * wanted.abs().max().item())
    last = Parts(classifier).classifier.weight
    (of_whole,) = torch.autograd.grad((logits * weights).sum(), last)
    assert last.grad is not None
    torch.testing.assert_close(last.grad, of_whole, rtol=1e-4, atol=1e-4)


def test_a_module_that_runs_on_both_sides_runs_behind_the_tap(dropping: Classifier, images: Tensor) -> None:
    dropping.eval()
    logits, features = run(dropping, images)
    for tap, feature in features.items():
        torch.testing.assert_close(Parts(dropping).run_from(tap, feature, images), logits)


@pytest.mark.parametrize("training", [True, False])
def test_nothing_is_left_behind(dropping: Classifier, images: Tensor, training: bool) -> None:
    dropping.train(training)
    feature = run(dropping, images)[1]["stage1"].detach()
    before, parts = everything(dropping), Parts(dropping)
    first = parts.run_from("stage1", feature, images)
    assert everything(dropping) == before
    assert torch.equal(parts.run_from("stage1", feature, images), first)  # dropout too draws the same
    torch.rand(1)
    assert torch.equal(parts.run_from("stage1", feature, images), first) != training


def test_training_drops_and_normalises_by_the_batch(dropping: Classifier, images: Tensor) -> None:
    feature = run(dropping.train(), images)[1]["stage1"].detach()
    state = torch.get_rng_state()
    logits = Parts(dropping).run_from("stage1", feature, images)
    network, torch_state = dropping.network, torch.set_rng_state(state)
    assert isinstance(network, Dropping)
    assert torch_state is None
    maps = network.pool(torch.relu(network.bn2(network.conv2(network.pool(torch.relu(feature))))))
    torch.testing.assert_close(logits, network.head(network.drop(maps).mean((2, 3))))


@pytest.mark.parametrize("where", ["look", "run"])
def test_an_exception_leaves_nothing_behind(
    dropping: Classifier, images: Tensor, where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    dropping.train()
    feature, parts = run(dropping, images)[1]["stage1"].detach(), Parts(dropping)
    if where == "run":
        parts.run_from("stage1", feature, images)
    network = dropping.network
    assert isinstance(network, Dropping)
    before = everything(dropping)

    def broken(*_: Any) -> Tensor:
        raise RuntimeError("no memory")

    with monkeypatch.context() as patch:
        patch.setattr(type(network.head), "forward", broken)
        with pytest.raises(RuntimeError, match="no memory"):
            parts.run_from("stage1", feature, images)
    assert everything(dropping) == before


def test_a_forward_of_the_modules_own_comes_back(dropping: Classifier, images: Tensor) -> None:
    dropping.eval()
    logits, features = run(dropping, images)
    conv: Any = dropping.get_submodule("network.conv1")
    original: Callable[..., Tensor] = conv.forward
    conv.forward = own = lambda maps: original(maps)
    assert torch.equal(Parts(dropping).run_from("stage1", features["stage1"], images), logits)
    assert vars(conv)["forward"] is own


@pytest.mark.parametrize("name", ["resnet8", "vgg8", "timm/test_vit"])
@torch.no_grad()
def test_what_lies_before_the_tap_does_not_run(name: str, images: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    classifier = classifier_of(name)
    feature, parts = run(classifier, images)[1]["stage2"], Parts(classifier)
    parts.run_from("stage2", feature, images)  # after the one look
    ran: list[str] = []
    layers = (nn.Conv2d, nn.BatchNorm2d, nn.Linear, nn.LayerNorm)
    for path, module in classifier.named_modules():
        if isinstance(module, layers):
            original = module.forward
            monkeypatch.setattr(
                module, "forward", lambda *given, path=path, original=original: (ran.append(path), original(*given))[1]
            )
    classifier(images)
    every = list(ran)
    ran.clear()
    parts.run_from("stage2", feature, images)
    assert ran
    assert len(ran) < len(every)
    assert every[-len(ran) :] == ran


def test_an_image_size_has_a_look_of_its_own() -> None:
    classifier = classifier_of("vgg8")
    parts = Parts(classifier)
    for size in (32, 64):
        images = torch.rand(2, 3, size, size)
        logits, features = run(classifier, images)
        assert torch.equal(parts.run_from("stage2", features["stage2"], images), logits)


def test_the_classifier_makes_logits_of_pooled(images: Tensor) -> None:
    classifier = classifier_of("wrn_10_1")
    tapped = Tapped(classifier, {"pooled": find_taps(classifier)["pooled"]})
    logits, features = tapped(images)
    assert torch.equal(Parts(classifier).classifier(features["pooled"]), logits)


def test_a_classifier_that_is_not_linear_is_named() -> None:
    network = nn.Sequential(nn.Conv2d(3, 5, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    parts = Parts(Classifier(network, mean=[0.5] * 3, std=[0.25] * 3))
    with pytest.raises(InputError, match="wanted a linear layer as the classifier of Sequential, got none"):
        _ = parts.classifier


def test_an_unknown_part_is_named(images: Tensor) -> None:
    parts = Parts(classifier_of("resnet8"))
    with pytest.raises(
        InputError, match="no part of the network begins at 'maps'; known: stem, stage1, stage2, stage3"
    ):
        parts.run_from("maps", torch.rand(2, 64, 8, 8), images)


@pytest.mark.parametrize("shape", [(2, 32, 8, 8), (2, 31, 16, 16), (3, 32, 16, 16), (2, 32)])
def test_a_feature_of_another_shape_is_refused(images: Tensor, shape: tuple[int, ...]) -> None:
    parts = Parts(classifier_of("resnet8"))
    with pytest.raises(InputError, match=r"goes on from 'stage2' with a feature \[2, 32, 16, 16\], got"):
        parts.run_from("stage2", torch.rand(shape), images)


class Bypassing(Dropping):
    """The stem's maps reach the head beside the second stage."""

    def forward(self, images: Tensor) -> Tensor:
        first = self.bn1(self.conv1(images))
        return self.head(self.bn2(self.conv2(first)).mean((2, 3)) + first.mean((1, 2, 3))[:, None])


def test_a_feature_that_is_not_all_that_goes_on_is_refused(images: Tensor) -> None:
    torch.manual_seed(0)
    classifier = Classifier(Bypassing(), mean=[0.5] * 3, std=[0.25] * 3).eval()
    features = run(classifier, images)[1]
    before, parts = everything(classifier), Parts(classifier)
    parts.run_from("stage1", features["stage1"], images)
    with pytest.raises(InputError, match="cannot go on from 'stage2': what lies before it reaches the logits"):
        parts.run_from("stage2", features["stage2"], images)
    assert everything(classifier) == before
