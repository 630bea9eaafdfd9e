"""A network to deploy: weights alone, or an ONNX graph that takes images in [0, 1], checked against PyTorch."""

from __future__ import annotations

import warnings
from importlib import import_module
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from soteacher.errors import InputError
from soteacher.files import replacing
from soteacher.models.classifier import Classifier, NetworkSpec
from soteacher.models.weights import WEIGHTS_FILE, load_weights, read_weights, save_classifier

Format = Literal["onnx", "safetensors"]
TOLERANCE = 1e-3
"""Largest difference of a logit between the exported graph and PyTorch, relative to the largest logit."""


def export_classifier(
    classifier: Classifier, network: NetworkSpec, images: Tensor, destination: Path, *, form: Format
) -> float:
    """Write a classifier for deployment and compare it with PyTorch on real images.

    Args:
        classifier: the network behind its normalisation.
        network: what it is built from; kept beside the weights.
        images: ``[B, C, H, W]`` float32 in [0, 1], real ones.
        destination: for ``onnx`` the file; for ``safetensors`` the folder of ``model.safetensors`` and ``model.json``.
        form: ``onnx`` or ``safetensors``.

    Returns:
        The largest difference of a logit on these images, relative to the largest logit.

    Raises:
        InputError: the destination exists, the packages for ONNX are missing, or the graph does not agree with PyTorch.
    """
    if destination.exists():
        raise InputError(f"{destination} exists; choose another place with --out")
    classifier = classifier.cpu().eval()
    with torch.no_grad():
        wanted = classifier(images)
    if form == "safetensors":
        save_classifier(destination, classifier, network, {"role": "exported"})
        load_weights(classifier.network, read_weights(destination / WEIGHTS_FILE), source=str(destination))
        with torch.no_grad():
            return _difference(classifier(images), wanted)
    with replacing(destination) as part:
        _write_onnx(classifier, images, part)
        difference = _difference(_run_onnx(part, images), wanted)
        if not difference <= TOLERANCE:
            raise InputError(
                f"the ONNX graph of {network.model} differs from PyTorch by {difference:.2g} of the largest logit, "
                f"wanted at most {TOLERANCE:g}; nothing was written"
            )
    return difference


def _write_onnx(classifier: Classifier, images: Tensor, path: Path) -> None:
    _need("onnxscript")
    batch = torch.export.Dim("batch", min=1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # the exporter's own use of names that torch is giving up
        torch.onnx.export(
            classifier, (images,), path, dynamo=True, input_names=["images"], output_names=["logits"],
            dynamic_shapes=({0: batch},), external_data=False, verbose=False,
        )  # fmt: skip


def _run_onnx(path: Path, images: Tensor) -> Tensor:
    runtime = _need("onnxruntime")
    session = runtime.InferenceSession(path.read_bytes(), providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(["logits"], {"images": images.numpy()})[0])


def _difference(came: Tensor, wanted: Tensor) -> float:
    return ((came - wanted).abs().max() / wanted.abs().max().clamp_min(1e-12)).item()


def _need(module: str) -> Any:
    try:
        return import_module(module)
    except ImportError:
        raise InputError(f"ONNX export needs {module}: pip install 'soteacher[onnx]'") from None
