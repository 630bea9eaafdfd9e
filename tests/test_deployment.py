import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from soteacher import deployment
from soteacher.deployment import export_classifier
from soteacher.errors import InputError
from soteacher.models.classifier import Classifier, NetworkSpec, build_classifier
from soteacher.models.weights import load_classifier

SPEC = NetworkSpec(model="resnet8", num_classes=3, in_channels=1, mean=(0.4,), std=(0.3,))


@pytest.fixture
def classifier() -> Classifier:
    torch.manual_seed(0)
    return build_classifier(SPEC)


@pytest.fixture
def images() -> Tensor:
    return torch.rand(8, 1, 12, 12, generator=torch.Generator().manual_seed(0))


def test_safetensors_read_back_equal(tmp_path: Path, classifier: Classifier, images: Tensor) -> None:
    assert export_classifier(classifier, SPEC, images, tmp_path / "out", form="safetensors") == 0
    loaded, spec, _ = load_classifier(tmp_path / "out")
    assert spec == SPEC
    assert torch.equal(loaded(images), classifier.eval()(images))


def test_onnx_agrees_with_torch_for_any_batch(tmp_path: Path, classifier: Classifier, images: Tensor) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    path = tmp_path / "new" / "student.onnx"
    difference = export_classifier(classifier, SPEC, images, path, form="onnx")
    assert 0 <= difference < 1e-5
    assert [entry.name for entry in path.parent.iterdir()] == ["student.onnx"]
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    assert [entry.name for entry in session.get_inputs()] == ["images"]
    assert [entry.name for entry in session.get_outputs()] == ["logits"]
    for count in (1, 5, 64):
        batch = torch.rand(count, 1, 12, 12)
        (logits,) = session.run(None, {"images": batch.numpy()})
        assert torch.allclose(torch.from_numpy(logits), classifier(batch), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("form", ["onnx", "safetensors"])
def test_a_destination_that_exists_is_refused(
    tmp_path: Path, classifier: Classifier, images: Tensor, form: Any
) -> None:
    (tmp_path / "out").write_text("mine")
    with pytest.raises(InputError, match="out exists; choose another place with --out"):
        export_classifier(classifier, SPEC, images, tmp_path / "out", form=form)
    assert (tmp_path / "out").read_text() == "mine"


@pytest.mark.parametrize("wrong", [lambda logits: logits + 0.1 * logits.abs().max(), lambda logits: logits * torch.nan])
def test_a_wrong_graph_is_refused_and_leaves_nothing(
    tmp_path: Path, classifier: Classifier, images: Tensor, monkeypatch: pytest.MonkeyPatch, wrong: Any
) -> None:
    wanted = classifier.eval()(images).detach()
    monkeypatch.setattr(deployment, "_write_onnx", lambda _, __, path: path.write_bytes(b"a graph"))
    monkeypatch.setattr(deployment, "_run_onnx", lambda *_: wrong(wanted))
    with pytest.raises(InputError, match=r"the ONNX graph of resnet8 differs from PyTorch by .*; nothing was written"):
        export_classifier(classifier, SPEC, images, tmp_path / "student.onnx", form="onnx")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("package", ["onnxscript", "onnxruntime"])
def test_a_missing_package_is_named(
    tmp_path: Path, classifier: Classifier, images: Tensor, monkeypatch: pytest.MonkeyPatch, package: str
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    if package == "onnxruntime":
        monkeypatch.setattr(deployment, "_write_onnx", lambda _, __, path: path.write_bytes(b"a graph"))
    with pytest.raises(InputError, match=rf"ONNX export needs {package}: pip install 'soteacher\[onnx\]'"):
        export_classifier(classifier, SPEC, images, tmp_path / "student.onnx", form="onnx")
    assert list(tmp_path.iterdir()) == []
