import re
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from soteacher.errors import InputError
from soteacher.models.classifier import Classifier
from soteacher.models.composition import Composition
from soteacher.models.inspection import inspect_network
from soteacher.models.taps import Tapped, find_taps
from soteacher.models.zoo import build_network
from soteacher.types import NetworkFacts


def _inspected(name: str, *, size: int | None = None) -> tuple[NetworkFacts, Classifier]:
    torch.manual_seed(0)
    network = build_network(name, num_classes=5)
    classifier = Classifier(network, mean=[0.5] * 3, std=[0.25] * 3, input_size=size)
    return inspect_network(classifier, torch.rand(2, 3, 32, 32), name=f"student {name}"), classifier


def test_shapes_are_those_of_the_standard_networks() -> None:
    facts, _ = _inspected("resnet8")
    assert facts.name == "student resnet8"
    assert facts.num_logits == 5
    maps = {"stem": (16, 32, 32), "stage1": (16, 32, 32), "stage2": (32, 16, 16), "stage3": (64, 8, 8)}
    preactivations = {name.replace("stage", "preactivation"): maps[name] for name in ("stage1", "stage2", "stage3")}
    assert dict(facts.taps) == maps | preactivations | {"maps": (64, 8, 8), "pooled": (64,)}
    assert len(facts.taps) == 9
    assert list(facts.taps)[:4] == list(maps)


@pytest.mark.parametrize("name", ["wrn_10_1", "vgg8"])
def test_shapes_are_those_of_a_forward_pass(name: str) -> None:
    facts, classifier = _inspected(name)
    logits, features = Tapped(classifier.eval(), find_taps(classifier))(torch.rand(3, 3, 32, 32))
    assert {tap: (3, *shape) for tap, shape in facts.taps.items()} == {
        tap: tuple(feature.shape) for tap, feature in features.items()
    }
    assert logits.shape == (3, facts.num_logits)


def test_batch_norms_are_named_by_the_convolution_before_them_in_the_bare_network() -> None:
    facts, classifier = _inspected("wrn_10_1")
    assert facts.batch_norm_of["block1.layer.0.conv1"] == "block1.layer.0.bn2"
    assert dict(facts.batch_norm_of) == dict(Composition(classifier.network, torch.rand(2, 3, 32, 32)))
    assert len(facts.batch_norm_of) == 3
    assert all(module.training for module in classifier.modules())


def test_a_transformers_features_are_tokens() -> None:
    facts, _ = _inspected("timm/test_vit", size=160)
    stages = [tap for tap in facts.taps if tap.startswith("stage")]
    assert len(stages) == 4
    assert all(len(facts.taps[tap]) == 2 for tap in stages)
    assert len({facts.taps[tap] for tap in stages}) == 1
    assert len(facts.taps["pooled"]) == 1
    assert "maps" not in facts.taps
    assert facts.num_logits == 5


def test_any_module_can_be_looked_up_by_its_path() -> None:
    facts, _ = _inspected("resnet8")
    assert facts.taps["layer2.0.conv1"] == (32, 16, 16)
    assert facts.taps["avgpool"] == (64, 1, 1)
    assert "layer2.0.conv1" not in facts.taps
    assert "stage9" not in facts.taps
    assert "stage1" in facts.taps
    assert facts.taps["layer2.0.conv1"] == (32, 16, 16)


def test_an_unknown_tap_lists_those_that_there_are() -> None:
    facts, _ = _inspected("resnet8")
    with pytest.raises(InputError) as caught:
        facts.taps["stage9"]
    message = str(caught.value)
    assert "unknown tap 'stage9' of ResNet" in message
    for tap in facts.taps:
        assert re.search(rf"\b{tap}\b", message), tap
    assert "\n" not in message


class Changing(nn.Module):
    """A network in which a pass in training mode leaves traces, and whose parts are in different modes."""

    def __init__(self) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(3, 4, 3)
        self.normalization = nn.BatchNorm2d(4)
        self.dropout = nn.Dropout(0.5)
        self.frozen = nn.BatchNorm2d(4)
        self.unused = nn.Linear(4, 4)
        self.head = nn.Linear(4, 5)
        self.frozen.eval()

    def forward(self, images: Tensor) -> Tensor:
        maps = self.frozen(self.dropout(self.normalization(self.convolution(images))))
        return self.head(maps.mean((2, 3)))


def test_the_network_is_left_as_it_was() -> None:
    torch.manual_seed(0)
    network = Changing()
    state = {name: value.clone() for name, value in network.state_dict().items()}
    modes = [module.training for module in network.modules()]
    random = torch.get_rng_state()
    facts = inspect_network(network, torch.ones(2, 3, 8, 8), name="mine")
    assert facts.taps["normalization"] == (4, 6, 6)
    assert dict(facts.batch_norm_of) == {"convolution": "normalization"}
    assert [module.training for module in network.modules()] == modes
    assert modes[0]
    assert not all(modes)
    assert torch.equal(torch.get_rng_state(), random)
    for name, value in network.state_dict().items():
        assert torch.equal(value, state[name]), name
    hooks = [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in network.modules()]
    assert not any(hooks)
    assert all(parameter.grad is None for parameter in network.parameters())


def test_a_network_that_nobody_knows_has_what_its_classifier_takes_in() -> None:
    facts = inspect_network(Changing(), torch.ones(2, 3, 8, 8), name="mine")
    assert dict(facts.taps) == {"pooled": (4,)}


def test_a_module_that_takes_no_part_is_an_error_when_it_is_asked_for() -> None:
    facts = inspect_network(Changing(), torch.ones(2, 3, 8, 8), name="mine")
    with pytest.raises(InputError, match="tap 'unused': module 'unused' did not run"):
        facts.taps["unused"]


def test_what_is_named_and_does_not_run_is_left_out() -> None:
    class Late(nn.Module):
        """Its last linear layer, which stands for the classifier, is not called."""

        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Linear(3, 5)
            self.other = nn.Linear(5, 5)

        def forward(self, images: Tensor) -> Tensor:
            return self.head(images.mean((2, 3)))

    facts = inspect_network(Late(), torch.ones(2, 3, 8, 8), name="mine")
    assert dict(facts.taps) == {}
    assert facts.num_logits == 5
    assert facts.taps["head"] == (5,)


def test_modes_are_put_back_after_an_error() -> None:
    network = Changing()
    network.train()
    with pytest.raises(RuntimeError):
        inspect_network(network, torch.ones(2, 5, 8, 8), name="mine")
    assert all(module.training for module in network.modules())
    handles: Any = [module._forward_hooks for module in network.modules()]
    assert not any(handles)
