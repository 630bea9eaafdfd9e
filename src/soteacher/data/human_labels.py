"""What people said about CIFAR-10's images: CIFAR-10H of the test images, CIFAR-10N of the training images.

CIFAR-10H: about 51 people's judgements of every test image (Peterson et al. 2019, arXiv:1908.07086), CC BY-NC-SA 4.0.
CIFAR-10N: three annotators' labels of every training image, an aggregate and the worst of them (Wei et al. 2022,
arXiv:2110.12088), CC BY-NC 4.0. Neither is part of this package, nor may it be: both are read from the folder of
downloadable sets, or downloaded from their authors.
"""

from __future__ import annotations

import pickle
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import one_hot

from soteacher.data.dataset import ImageSplit
from soteacher.data.download import Progress, obtain_file
from soteacher.data.npz import Arrays, distribution_of, labels_of, read_arrays
from soteacher.data.reason import reason
from soteacher.errors import InputError

LabelSource = Literal["cifar10h", "cifar10n", "cifar10n_others"]
Annotators = Literal["cifar10n", "cifar10n_others"]
TrainLabels = Literal["clean", "random_label1", "random_label2", "random_label3", "aggre_label", "worse_label"]

CIFAR10H_URL = "https://raw.githubusercontent.com/jcpeterson/cifar-10h/master/data/"
CIFAR10N_URL = "https://raw.githubusercontent.com/UCSC-REAL/cifar-10-100n/main/data/"

_ANNOTATORS = ("random_label1", "random_label2", "random_label3")
_LABELS = (*_ANNOTATORS, "aggre_label", "worse_label", "clean_label")
_LEAST_AGREEMENT = 0.95
"""The real rows agree with 99.21 % of the test labels; rows in any other order with about one in K."""

# What PyTorch's safe reader may make beside tensors: arrays of integers, wherever numpy keeps their maker.
_ARRAY_MAKERS: list[Any] = [
    np.ndarray,
    np.dtype,
    *[type(np.dtype(f"{sign}int{bits}")) for sign in ("", "u") for bits in (8, 16, 32, 64)],
    *[(np.zeros(0).__reduce__()[0], f"numpy.{core}.multiarray._reconstruct") for core in ("core", "_core")],
]


def with_cifar10h(test: ImageSplit, root: Path, *, num_classes: int, progress: Progress | None = None) -> ImageSplit:
    """Return CIFAR-10's test split with the distribution of people's judgements.

    Read from ``ROOT/cifar10h.npz`` (array ``probs``) or the authors' ``ROOT/cifar10h-probs.npy``; the latter is
    downloaded if neither is there.

    Args:
        test: all test images, in their official order.
        root: folder of downloadable sets.
        num_classes: K.
        progress: told of a download.

    Raises:
        InputError: the file cannot be had or read, is no distribution for each image, or has another order.

    Source: https://github.com/jcpeterson/cifar-10h, folder ``data``.
    """
    names = ("cifar10h.npz", "cifar10h-probs.npy")
    path = obtain_file([root / name for name in names], url=CIFAR10H_URL, progress=progress)
    if path.suffix == ".npz":
        array, place = read_arrays(path, required=("probs",), optional=())["probs"], f"probs of {path}"
    else:
        array, place = _read_npy(path), str(path)
    distribution = distribution_of(array, place, num_examples=test.num_examples, num_classes=num_classes)
    agreement = (distribution.argmax(1) == test.labels).double().mean().item()
    if agreement < _LEAST_AGREEMENT:
        raise InputError(
            f"argmax of {path} agrees with {100 * agreement:.1f} % of the test labels; wanted at least "
            f"{100 * _LEAST_AGREEMENT:.0f} %: its rows are not in the order of CIFAR-10's test images"
        )
    return replace(test, label_distribution=distribution)


def annotators_of(source: Annotators, labels: TrainLabels) -> tuple[str, ...]:
    """Return the names of the annotators whose labels make a distribution to measure networks against.

    ``cifar10n`` are all three. Where networks are trained on the labels of one of them, a distribution that holds these
    very labels credits what is learnt by heart: ``cifar10n_others`` leaves that annotator out.

    Args:
        source: the label source.
        labels: whose labels networks are trained on.

    Raises:
        InputError: ``cifar10n_others`` where the labels are made of all three annotators'.
    """
    if source == "cifar10n" or labels == "clean":
        return _ANNOTATORS
    if labels not in _ANNOTATORS:
        raise InputError(
            f"label source cifar10n_others leaves out the annotator whose labels are trained on, but {labels} is made "
            "of all three, as aggre_label and worse_label are; train on one annotator's or on clean labels"
        )
    return tuple(name for name in _ANNOTATORS if name != labels)


def annotators_source(sources: Sequence[LabelSource]) -> Annotators | None:
    """Return which distribution of CIFAR-10N's annotators is among label sources, if any.

    Raises:
        InputError: both are.
    """
    if "cifar10n" in sources and "cifar10n_others" in sources:
        raise InputError("label_sources has both cifar10n and cifar10n_others; wanted one of them")
    if "cifar10n" in sources:
        return "cifar10n"
    return "cifar10n_others" if "cifar10n_others" in sources else None


def with_cifar10n(
    train: ImageSplit,
    root: Path,
    *,
    labels: TrainLabels,
    source: Annotators | None,
    num_classes: int,
    progress: Progress | None = None,
) -> ImageSplit:
    r"""Return CIFAR-10's training split with annotators' labels, or with the distribution of some annotators.

    .. math:: p_{ik} = \frac{1}{|A|} \sum_{a \in A} [y_i^{(a)} = k]

    with :math:`A` those of :func:`annotators_of`. Read from ``ROOT/cifar10n.npz`` or the authors'
    ``ROOT/CIFAR-10_human.pt``, both with the arrays ``random_label1`` to ``random_label3``, ``aggre_label``,
    ``worse_label`` and ``clean_label``; the latter is downloaded if neither is there.

    Args:
        train: all training images, in their official order, with their own labels.
        root: folder of downloadable sets.
        labels: whose labels take the place of the split's own, which are kept as its clean ones; ``"clean"``: nobody's.
        source: which distribution the split gets, if any.
        num_classes: K.
        progress: told of a download.

    Raises:
        InputError: the file cannot be had or read, does not hold a label for each image, or has another order; or see
            :func:`annotators_of`.

    Source: https://github.com/UCSC-REAL/cifar-10-100n, folder ``data``.
    """
    annotators = () if source is None else annotators_of(source, labels)
    names = ("cifar10n.npz", "CIFAR-10_human.pt")
    path = obtain_file([root / name for name in names], url=CIFAR10N_URL, progress=progress)
    arrays = read_arrays(path, required=_LABELS, optional=()) if path.suffix == ".npz" else _read_pt(path)
    sizes = {"num_examples": train.num_examples, "num_classes": num_classes}
    said = {name: labels_of(arrays[name], f"{name} of {path}", **sizes) for name in _LABELS}
    agreeing = int((said["clean_label"] == train.labels).sum())
    if agreeing < train.num_examples:
        raise InputError(
            f"clean_label of {path} agrees with {agreeing} of {train.num_examples} training labels; wanted all of "
            "them: its rows are not in the order of CIFAR-10's training images"
        )
    if annotators:
        train = replace(train, label_distribution=_shares([said[name] for name in annotators], num_classes))
    return train if labels == "clean" else replace(train, labels=said[labels], clean_labels=train.labels)


def _shares(labels: list[Tensor], num_classes: int) -> Tensor:
    """Return which share of the annotators chose each class: ``[N, K]`` float32."""
    return torch.stack([one_hot(one, num_classes) for one in labels]).float().mean(0)


def _read_npy(path: Path) -> np.ndarray[Any, Any]:
    try:
        with path.open("rb") as opened:
            return np.lib.format.read_array(opened, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise _unreadable(path, reason(error)) from error


def _read_pt(path: Path) -> Arrays:
    """Return the arrays of the authors' PyTorch file, from which no code is ever run."""
    try:
        with torch.serialization.safe_globals(_ARRAY_MAKERS):
            record = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise _unreadable(path, "wanted a PyTorch file of a dictionary of integer arrays, nothing else") from error
    except Exception as error:  # damaged pickles can raise nearly anything
        raise _unreadable(path, reason(error)) from error
    if not isinstance(record, Mapping):
        raise _unreadable(path, f"it holds a {type(record).__name__}, wanted a dictionary of integer arrays")
    missing = [name for name in _LABELS if name not in record]
    if missing:
        raise _unreadable(path, f"it has no {', '.join(missing)}; it has {', '.join(map(str, record)) or 'nothing'}")
    return {name: np.asarray(record[name]) for name in _LABELS}


def _unreadable(path: Path, why: str) -> InputError:
    return InputError(f"cannot read {path}: {why}; delete it to have it fetched again")
