"""Weights on disk: safetensors beside a JSON file of ours, and other people's files, from which no code is ever run."""

from __future__ import annotations

import argparse
import pickle
import re
import warnings
from collections.abc import Iterable, Mapping
from hashlib import blake2b
from pathlib import Path
from typing import Any, cast

import safetensors.torch
import torch
from torch import Tensor, nn

from soteacher.errors import InputError
from soteacher.files import read_json, write_json, write_tensors
from soteacher.models.classifier import Classifier, NetworkSpec, build_classifier
from soteacher.models.taps import classifier_module
from soteacher.settings import parse, shortened

SCHEMA = 1
"""Version of ``model.json``."""
WEIGHTS_FILE = "model.safetensors"
FACTS_FILE = "model.json"
WRAPPERS = ("module.", "_orig_mod.")
"""What data parallelism and compilation put before every name."""
STATE_KEYS = ("state_dict", "model_state_dict", "model", "net")
"""Under which of them the field's checkpoints keep the weights."""


def read_weights(path: Path) -> dict[str, Tensor]:
    """Return the tensors of a file by their names in the network, on the CPU.

    ``.safetensors`` files, and PyTorch's of any other ending: a ``state_dict``, or one below any of ``STATE_KEYS``.
    Prefixes of data parallelism and compilation are taken off.

    Raises:
        InputError: the file is missing or damaged, would run code when it is read, does not hold tensors by name, or
            a value is NaN or infinite.
    """
    if not path.is_file():
        raise InputError(f"no weights at {path}: there is no such file")
    stored = _read_safetensors(path) if path.suffix == ".safetensors" else _read_pickle(path)
    found = _unwrapped(stored)
    if not isinstance(found, Mapping) or not found:
        raise InputError(f"{path} holds no weights: wanted a state_dict of tensors, got {_described(found)}")
    for name, value in cast("Mapping[Any, Any]", found).items():
        if not isinstance(name, str) or not isinstance(value, Tensor) or value.layout != torch.strided:
            raise InputError(f"{path} holds no weights: wanted only tensors by name, got {name!r}: {_described(value)}")
        if not _finite(value):
            raise InputError(f"{path} holds no usable weights: {name} has values that are NaN or infinite")
    return _without_wrappers(cast("Mapping[str, Tensor]", found))


def load_weights(network: nn.Module, weights: Mapping[str, Tensor], *, source: str) -> None:
    """Copy weights into a network that has the same names and shapes, else change nothing.

    Batch norm's ``num_batches_tracked`` may be missing, as in the files of early PyTorch.

    Args:
        network: takes the weights.
        weights: by name.
        source: where they are from, for the message.

    Raises:
        InputError: names are missing or not known, or shapes differ.
    """
    own = network.state_dict()
    complete = {name: value for name, value in own.items() if name.endswith("num_batches_tracked")} | dict(weights)
    problems = [
        _counted("missing", [name for name in own if name not in complete]),
        _counted("not known to it", [name for name in complete if name not in own]),
    ]
    differing = [name for name in own if name in complete and own[name].shape != complete[name].shape]
    if differing and not any(problems):
        _check_classes(network, own, complete, differing, source=source)
    shapes = [f"{name} is {list(complete[name].shape)}, wanted {list(own[name].shape)}" for name in differing]
    problems.append(_counted("of another shape", shapes))
    if any(problems):
        raise InputError(f"{source} does not fit {type(network).__name__}: {'; '.join(filter(None, problems))}")
    network.load_state_dict(complete)


def save_classifier(folder: Path, classifier: Classifier, spec: NetworkSpec, facts: Mapping[str, Any]) -> None:
    """Write ``model.safetensors`` and then ``model.json``: where the latter is, the model is whole.

    Args:
        folder: made where it is missing; a model in it is replaced.
        classifier: its network's weights are written, under the network's own names.
        spec: what builds the classifier again.
        facts: more to keep in ``model.json``; not ``schema`` or ``network``.

    Raises:
        ValueError: a fact is NaN or infinite.
    """
    assert not facts.keys() & {"schema", "network"}, "these keys are taken"
    (folder / FACTS_FILE).unlink(missing_ok=True)
    write_tensors(folder / WEIGHTS_FILE, _without_wrappers(classifier.network.state_dict()))
    write_json(folder / FACTS_FILE, {"schema": SCHEMA, "network": spec.model_dump(mode="json"), **facts})


def load_classifier(path: Path) -> tuple[Classifier, NetworkSpec, dict[str, Any]]:
    """Return a saved classifier in eval mode on the CPU, its spec, and the other facts of ``model.json``.

    PyTorch's global random state is left as it was.

    Args:
        path: the folder, or the ``.safetensors`` file in it.

    Raises:
        InputError: a file is missing, damaged, of another schema, or the two do not fit.
    """
    weights_path = path / WEIGHTS_FILE if path.is_dir() else path
    if path.exists() and weights_path.suffix != ".safetensors":
        raise InputError(f"{path}: wanted a folder with {WEIGHTS_FILE} and {FACTS_FILE}, or that {WEIGHTS_FILE}")
    spec, facts = read_facts(path)
    weights = read_weights(weights_path)
    with torch.random.fork_rng(devices=[]):
        classifier = build_classifier(spec)
    load_weights(classifier.network, weights, source=str(weights_path))
    return classifier.eval(), spec, facts


def read_facts(path: Path) -> tuple[NetworkSpec, dict[str, Any]]:
    """Return the spec and the other facts that the ``model.json`` of a saved classifier holds.

    Args:
        path: the folder, or a file in it.

    Raises:
        InputError: there is no such path or no ``model.json``, or the latter is damaged, of another schema or of
            another program.
    """
    if not path.exists():
        raise InputError(f"no model at {path}: there is no such file or folder")
    facts_path = (path if path.is_dir() else path.parent) / FACTS_FILE
    if not facts_path.is_file():
        raise InputError(f"no finished model in {facts_path.parent}: {FACTS_FILE} is missing")
    try:
        facts = read_json(facts_path)
    except (OSError, ValueError) as error:
        raise InputError(f"{facts_path} cannot be read as JSON: {_one_line(error)}") from error
    schema = facts.pop("schema", None) if isinstance(facts, dict) else None
    if schema != SCHEMA or "network" not in facts:
        came = shortened(schema)
        raise InputError(
            f"{facts_path} does not describe a model: wanted schema {SCHEMA} and network, got schema {came}"
        )
    return parse(NetworkSpec, facts.pop("network"), place="network", source=str(facts_path)), facts


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    """Return the tensors of a safetensors file."""
    try:
        return safetensors.torch.load_file(path)
    except (OSError, safetensors.SafetensorError) as error:
        raise InputError(f"{path} cannot be read as safetensors, it may be damaged: {_one_line(error)}") from error


def _read_pickle(path: Path) -> Any:
    """Return what a PyTorch file holds, with no more code run than PyTorch's for tensors and plain containers."""
    try:
        # Option objects are plain attributes; the field's checkpoints often carry one beside the weights. PyTorch's
        # warnings on the kind of file say no more than the result.
        with torch.serialization.safe_globals([argparse.Namespace]), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return torch.load(path, weights_only=True, map_location="cpu")
    except Exception as error:  # damaged bytes can make the unpickler and the archive reader raise anything
        reason = _one_line(error)
        if not re.search(r"[^\W\d]{2}", reason):  # a KeyError of the unpickler says a byte's number and no more
            reason = f"{type(error).__name__} {reason}"
        code = "a TorchScript archive" if "TorchScript" in str(error) else None
        if isinstance(error, pickle.UnpicklingError):  # its message advises to run the code, so only the cause is taken
            named = re.search(r"GLOBAL ([\w.]+)", str(error))
            code = named[1] if named else None
            detail = re.search(r"WeightsUnpickler error:\s*(\S.*)", str(error))
            reason = detail[1] if detail else "not unpickled"
        if code is None:
            raise InputError(f"{path} cannot be read, it may be damaged or no PyTorch file: {reason}") from error
        raise InputError(
            f"{path} is refused: reading it would run code ({code}); save only the state_dict, or as safetensors"
        ) from error


def _unwrapped(stored: Any) -> Any:
    """Return the dictionary of tensors below any of ``STATE_KEYS``."""
    while isinstance(stored, Mapping):
        mapping = cast("Mapping[str, Any]", stored)
        inner = next((mapping[key] for key in STATE_KEYS if key in mapping), None)
        if inner is None or isinstance(inner, Tensor):
            break
        stored = inner
    return cast("Any", stored)


def _without_wrappers(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the weights without the prefixes that every name has from its wrappers."""
    for prefix in WRAPPERS:
        if weights and all(name.startswith(prefix) for name in weights):
            return _without_wrappers({name.removeprefix(prefix): value for name, value in weights.items()})
    return dict(weights)


def _finite(value: Tensor) -> bool:
    """Return whether a tensor holds neither NaN nor infinities."""
    if not (value.is_floating_point() or value.is_complex()):
        return True
    # PyTorch cannot ask this of numbers of 8 bits.
    return bool(torch.isfinite(value.float() if value.element_size() == 1 else value).all())


def _check_classes(
    network: nn.Module, own: Mapping[str, Tensor], weights: Mapping[str, Tensor], differing: list[str], *, source: str
) -> None:
    """Raise an InputError where the number of classes is all that differs."""
    layer = classifier_module(network)
    if layer is None or not all(name.startswith(f"{layer}.") for name in differing):
        return
    name = differing[0]
    came, wanted = weights[name].shape, own[name].shape
    if len(came) == len(wanted) > 0 and came[1:] == wanted[1:]:
        raise InputError(f"{source} has {came[0]} classes, wanted {wanted[0]}")


def _counted(what: str, items: Iterable[str]) -> str:
    """Return a count with the first three items, or nothing for none."""
    items = list(items)
    shown = ", ".join(items[:3]) + (", ..." if len(items) > 3 else "")
    return f"{len(items)} {what} ({shown})" if items else ""


def _described(value: Any) -> str:
    """Return what stands where tensors were wanted."""
    if isinstance(value, Mapping):
        return "a dictionary" if value else "an empty dictionary"
    if isinstance(value, Tensor) and value.layout != torch.strided:
        return "a sparse Tensor"
    return type(value).__name__


def _one_line(error: Exception) -> str:
    """Return the first sentence of a library's message."""
    return re.split(r"\n|\. ", str(error).strip(), maxsplit=1)[0] or type(error).__name__


def weights_checksum(network: nn.Module) -> str:
    """Return a checksum of a network's weights, by name."""
    checksum = blake2b(digest_size=16)
    for name, tensor in sorted(network.state_dict().items()):
        numbers = tensor.detach().cpu().contiguous().flatten().view(torch.uint8)  # NumPy does not know all types
        checksum.update(name.encode() + numbers.numpy().tobytes())
    return checksum.hexdigest()
