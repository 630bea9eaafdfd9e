import argparse
import json
import os
import pickle
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import nn

from soteacher.errors import InputError
from soteacher.models.classifier import Classifier, NetworkSpec, build_classifier
from soteacher.models.weights import load_classifier, load_weights, read_facts, read_weights, save_classifier
from soteacher.models.zoo import build_network

SPEC = NetworkSpec(model="resnet8", num_classes=10, mean=(0.5,) * 3, std=(0.25,) * 3)


class Touch:
    """Makes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.fixture
def network() -> nn.Module:
    torch.manual_seed(0)
    return build_network("resnet8", num_classes=10)


@pytest.fixture
def classifier() -> Classifier:
    torch.manual_seed(0)
    return build_classifier(SPEC)


def refusal(call, *arguments, **settings) -> str:
    """Return the one-line message with which a call is refused."""
    with pytest.raises(InputError) as raised:
        call(*arguments, **settings)
    message = str(raised.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize(
    "wrap",
    [
        lambda state: state,
        lambda state: {"model": state, "epoch": 3, "accuracy": torch.tensor(0.5)},
        lambda state: {"state_dict": {"model": state}},
        lambda state: {"net": state, "acc": 71.2, "epoch": 3},
        lambda state: {"model_state_dict": state, "optimizer_state_dict": {"state": {}}},
        lambda state: {f"module._orig_mod.{name}": value for name, value in state.items()},
        lambda state: {"model": state, "opt": argparse.Namespace(learning_rate=0.05)},
    ],
)
def test_read_weights_of_pytorch(tmp_path, network, wrap, legacy):
    path = tmp_path / "weights.pth"
    torch.save(wrap(network.state_dict()), path, _use_new_zipfile_serialization=not legacy)
    weights = read_weights(path)
    assert list(weights) == list(network.state_dict())
    assert all(torch.equal(weights[name], value) for name, value in network.state_dict().items())


def test_read_weights_of_safetensors(tmp_path, network):
    safetensors.torch.save_file(network.state_dict(), tmp_path / "weights.safetensors")
    weights = read_weights(tmp_path / "weights.safetensors")
    assert torch.equal(weights["fc.bias"], network.get_parameter("fc.bias"))


@pytest.mark.parametrize("protocol", [0, 2, 4, None])
def test_read_weights_never_runs_code(tmp_path, network, protocol):
    path, trace = tmp_path / "weights.pth", tmp_path / "code_ran"
    stored = {"model": network.state_dict(), "more": Touch(trace)}
    if protocol is None:
        torch.save(stored, path)
    else:
        path.write_bytes(pickle.dumps(Touch(trace), protocol=protocol))
    message = refusal(read_weights, path)
    assert str(path) in message
    if protocol != 4:  # which the restricted unpickler does not read at all
        assert "refused: reading it would run code" in message
        assert "mkdir" in message
    assert not trace.exists()
    pickle.loads(pickle.dumps(Touch(trace)))  # the same bytes, read carelessly, do run
    assert trace.exists()


def test_read_weights_refuses_a_whole_pickled_network(tmp_path, network):
    torch.save(network, tmp_path / "network.pt")
    assert "run code (soteacher.models.resnet.ResNet)" in refusal(read_weights, tmp_path / "network.pt")


@pytest.mark.parametrize("name", ["weights.pth", "weights.safetensors"])
@pytest.mark.parametrize("share", [0.0, 0.001, 0.5, 0.99])
def test_read_weights_refuses_a_truncated_file(tmp_path, network, name, share):
    path = tmp_path / name
    if path.suffix == ".pth":
        torch.save(network.state_dict(), path)
    else:
        safetensors.torch.save_file(network.state_dict(), path)
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])
    message = refusal(read_weights, path)
    assert str(path) in message
    assert "may be damaged" in message


@pytest.mark.parametrize("content", [b"<html>not found</html>", b"version https://git-lfs.github.com/spec/v1\n"])
def test_read_weights_refuses_text(tmp_path, content):
    path = tmp_path / "weights.bin"
    path.write_bytes(content)
    message = refusal(read_weights, path)
    assert "may be damaged" in message
    assert "weights_only" not in message


@pytest.mark.parametrize(
    ("stored", "came"),
    [
        ([1, 2], "got list"),
        ({}, "got an empty dictionary"),
        ({"model": {}}, "got an empty dictionary"),
        ({"weight": torch.ones(2), "optimizer": {"lr": 0.1}}, "'optimizer': a dictionary"),
        ({"weight": torch.ones(2), "optimizer": {}}, "'optimizer': an empty dictionary"),
        ({"weight": torch.ones(2).to_sparse()}, "'weight': a sparse Tensor"),
        (torch.ones(2), "got Tensor"),
        ({"weight": torch.ones(2), "epoch": 3}, "'epoch': int"),
        ({3: torch.ones(2)}, "3: Tensor"),
    ],
)
def test_read_weights_wants_tensors_by_name(tmp_path, stored, came):
    path = tmp_path / "weights.pth"
    torch.save(stored, path)
    message = refusal(read_weights, path)
    assert str(path) in message
    assert came in message


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_read_weights_refuses_values_that_are_not_finite(tmp_path, network, suffix, value):
    path = tmp_path / f"weights{suffix}"
    state = network.state_dict() | {"fc.bias": torch.tensor([0.0] * 9 + [value])}
    torch.save(state, path) if suffix == ".pth" else safetensors.torch.save_file(state, path)
    message = refusal(read_weights, path)
    assert message == f"{path} holds no usable weights: fc.bias has values that are NaN or infinite"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.complex64, torch.int64])
def test_read_weights_takes_every_kind_of_number(tmp_path, dtype):
    torch.save({"weight": torch.ones(3).to(dtype)}, tmp_path / "weights.pth")
    assert read_weights(tmp_path / "weights.pth")["weight"].dtype == dtype


def test_read_weights_of_no_file(tmp_path):
    assert "no such file" in refusal(read_weights, tmp_path / "none.pth")
    assert "no such file" in refusal(read_weights, tmp_path)


def test_load_weights_copies_them(network):
    torch.manual_seed(1)
    other = build_network("resnet8", num_classes=10)
    load_weights(other, network.state_dict(), source="file")
    assert all(torch.equal(value, network.state_dict()[name]) for name, value in other.state_dict().items())


@pytest.mark.parametrize(
    "wrap",
    [
        lambda state: {"epoch": 240, "model": state, "accuracy": 0.7},
        lambda state: {"state_dict": {f"module.{name}": value for name, value in state.items()}, "best_acc": 0.7},
    ],
)
@pytest.mark.parametrize(
    ("name", "classifier"), [("vgg13", "classifier"), ("ResNet50", "linear"), ("ShuffleV1", "linear")]
)
def test_released_teachers_load(tmp_path, name, classifier, wrap):
    state = build_network(name, num_classes=100).state_dict()
    torch.save(wrap(state), tmp_path / "ckpt_epoch_240.pth")
    network = build_network(name, num_classes=100)
    assert not torch.equal(network.get_parameter(f"{classifier}.weight"), state[f"{classifier}.weight"])
    load_weights(network, read_weights(tmp_path / "ckpt_epoch_240.pth"), source="file")
    assert all(torch.equal(value, state[key]) for key, value in network.state_dict().items())
    del state[f"{classifier}.bias"]
    assert f"1 missing ({classifier}.bias)" in refusal(load_weights, network, state, source="file")


def test_load_weights_does_without_batch_counters(network):
    old = {name: value for name, value in network.state_dict().items() if not name.endswith("num_batches_tracked")}
    load_weights(build_network("resnet8", num_classes=10), old, source="file")


def test_load_weights_says_what_differs(network):
    before = {name: value.clone() for name, value in network.state_dict().items()}
    weights = dict(network.state_dict())
    del weights["conv1.weight"]
    weights |= {"extra": torch.ones(1), "layer1.0.conv1.weight": torch.ones(2, 2)}
    assert refusal(load_weights, network, weights, source="file.pth") == (
        "file.pth does not fit ResNet: 1 missing (conv1.weight); 1 not known to it (extra); "
        "1 of another shape (layer1.0.conv1.weight is [2, 2], wanted [16, 16, 3, 3])"
    )
    deeper = build_network("resnet14", num_classes=10).state_dict()
    # Three more blocks of two convolutions and two batch norms: 3 * (2 * 1 + 2 * 5) more tensors.
    assert "36 not known to it (layer1.1.conv1.weight, layer1.1.bn1.weight, layer1.1.bn1.bias, ...)" in (
        refusal(load_weights, network, deeper, source="file.pth")
    )
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())


@pytest.mark.parametrize("name", ["resnet8", "timm/resnet18"])
def test_load_weights_names_the_numbers_of_classes(name):
    weights = build_network(name, num_classes=10).state_dict()
    network = build_network(name, num_classes=100)
    assert refusal(load_weights, network, weights, source="file.pth") == "file.pth has 10 classes, wanted 100"


def test_saved_classifier_loads_equal(tmp_path, classifier):
    spec = SPEC.model_copy(update={"class_names": tuple("abcdefghij")})
    save_classifier(tmp_path / "new" / "model", classifier, spec, {"seed": 3, "method": "standard"})
    folder = tmp_path / "new" / "model"
    assert sorted(path.name for path in folder.iterdir()) == ["model.json", "model.safetensors"]
    assert list(safetensors.torch.load_file(folder / "model.safetensors")).count("conv1.weight") == 1
    assert json.loads((folder / "model.json").read_text())["schema"] == 1
    images = torch.rand(2, 3, 32, 32)
    for path in (folder, folder / "model.safetensors"):
        random_state = torch.get_rng_state()
        loaded, loaded_spec, facts = load_classifier(path)
        assert torch.equal(torch.get_rng_state(), random_state)
        assert (loaded_spec, facts) == (spec, {"seed": 3, "method": "standard"})
        assert not loaded.training
        assert torch.equal(loaded(images), classifier.eval()(images))


def test_save_classifier_takes_unusual_memory(tmp_path):
    network = build_network("resnet8", num_classes=10).to(memory_format=torch.channels_last)
    network.get_submodule("layer1.0").bn2 = network.get_submodule("layer1.0").bn1  # tied
    classifier = Classifier(network, mean=SPEC.mean, std=SPEC.std)
    save_classifier(tmp_path, classifier, SPEC, {})
    stored = safetensors.torch.load_file(tmp_path / "model.safetensors")
    assert torch.equal(stored["conv1.weight"], network.get_parameter("conv1.weight"))
    assert stored.keys() == network.state_dict().keys()


def test_unfinished_model_is_none(tmp_path, classifier):
    save_classifier(tmp_path, classifier, SPEC, {})
    with pytest.raises(ValueError, match="JSON compliant"):
        save_classifier(tmp_path, classifier, SPEC, {"nll": float("nan")})
    assert refusal(load_classifier, tmp_path) == f"no finished model in {tmp_path}: model.json is missing"


def test_load_classifier_of_nothing(tmp_path, classifier):
    assert "no such file or folder" in refusal(load_classifier, tmp_path / "none")
    assert "model.json is missing" in refusal(load_classifier, tmp_path)
    save_classifier(tmp_path, classifier, SPEC, {})
    assert "wanted a folder with" in refusal(load_classifier, tmp_path / "model.json")
    (tmp_path / "model.safetensors").unlink()
    assert "model.safetensors: there is no such file" in refusal(load_classifier, tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "cannot be read as JSON"),
        ("\xff", "cannot be read as JSON"),
        ("[]", "does not describe a model"),
        ('{"schema": 2, "network": {}}', "wanted schema 1 and network, got schema 2"),
        ('{"schema": 1}', "wanted schema 1 and network"),
        ('{"schema": 1, "network": {"model": 3}}', "network.model: should be a valid string, got 3"),
        ('{"schema": 1, "network": 3}', "network: "),
        ('{"architectures": ["ResNetForImageClassification"]}', "does not describe a model: wanted schema 1"),
        ('{"schema": 1, "network": {"layers": [1, 2]}}', "network: unknown key 'layers'; known: class_names"),
    ],
)
def test_load_classifier_refuses_a_damaged_description(tmp_path, classifier, content, message):
    save_classifier(tmp_path, classifier, SPEC, {})
    (tmp_path / "model.json").write_text(content, encoding="latin-1")
    for path in (tmp_path, tmp_path / "model.safetensors"):
        for read in (load_classifier, read_facts):
            refused = refusal(read, path)
            assert message in refused
            assert refused.startswith(str(tmp_path / "model.json"))


def test_read_facts_of_a_folder_or_a_file_in_it(tmp_path, classifier):
    save_classifier(tmp_path, classifier, SPEC, {"seed": 3})
    for path in (tmp_path, tmp_path / "model.safetensors", tmp_path / "model.json"):
        assert read_facts(path) == (SPEC, {"seed": 3})
    assert "no such file or folder" in refusal(read_facts, tmp_path / "nothing")
    (tmp_path / "model.json").unlink()
    assert "model.json is missing" in refusal(read_facts, tmp_path / "model.safetensors")


def test_load_classifier_refuses_files_that_do_not_fit(tmp_path, classifier):
    save_classifier(tmp_path, classifier, SPEC.model_copy(update={"num_classes": 5}), {})
    assert "has 10 classes, wanted 5" in refusal(load_classifier, tmp_path)
    save_classifier(tmp_path, classifier, SPEC.model_copy(update={"model": "resnet9"}), {})
    assert "depth must be" in refusal(load_classifier, tmp_path)
