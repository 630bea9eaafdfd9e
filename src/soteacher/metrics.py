"""How good a network's outputs are: pure functions over logits and labels."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from soteacher.errors import InputError


def check_predictions(logits: Tensor, labels: Tensor) -> None:
    """Check that ``logits`` is ``[N, K]`` of floats and ``labels`` is ``[N]`` of class ids, with N at least 1.

    Raises:
        InputError: they are something else.
    """
    if logits.ndim != 2 or labels.shape != logits.shape[:1] or logits.numel() == 0:
        shapes = f"{list(logits.shape)} and {list(labels.shape)}"
        raise InputError(f"logits and labels have shapes {shapes}; wanted [N, K] and [N], not empty")
    if not logits.is_floating_point() or labels.is_floating_point() or labels.dtype == torch.bool:
        raise InputError(f"logits and labels are {logits.dtype} and {labels.dtype}; wanted floats and integers")
    lowest, highest = int(labels.min()), int(labels.max())
    if lowest < 0 or highest >= logits.shape[1]:
        raise InputError(f"labels run from {lowest} to {highest}; wanted 0 to {logits.shape[1] - 1}")


def accuracy(logits: Tensor, labels: Tensor) -> float:
    """Return the share of examples whose largest logit is that of the label, in [0, 1].

    Args:
        logits: ``[N, K]``.
        labels: ``[N]`` class ids.

    Raises:
        InputError: wrong shapes, types or class ids.
    """
    check_predictions(logits, labels)
    return int((logits.argmax(dim=1) == labels).sum()) / len(labels)


def negative_log_likelihood(logits: Tensor, labels: Tensor) -> float:
    r"""Return the mean of :math:`-\log p_y` over the examples, in nats; :math:`p` is the softmax of the logits.

    Args:
        logits: ``[N, K]``.
        labels: ``[N]`` class ids.

    Raises:
        InputError: wrong shapes, types or class ids.
    """
    check_predictions(logits, labels)
    wide = logits if logits.dtype == torch.float64 else logits.float()
    losses = F.cross_entropy(wide, labels.long(), reduction="none")
    return losses.cpu().double().mean().item()


def reliability_bins(logits: Tensor, labels: Tensor, *, num_bins: int = 15) -> list[dict[str, Any]]:
    """Return how often the network is right, by how confident it is.

    The confidence of an example is its largest softmax probability. Bins are of equal width over [0, 1] and closed
    below: ``lower <= confidence < upper``; the last one also holds confidence 1.

    Args:
        logits: ``[N, K]``.
        labels: ``[N]`` class ids.
        num_bins: at least 1.

    Returns:
        One dictionary a bin: ``lower``, ``upper``, ``count``, and the means ``confidence`` and ``accuracy``, which are
        None where the bin is empty.

    Raises:
        InputError: wrong shapes, types or class ids, or ``num_bins < 1``.
    """
    check_predictions(logits, labels)
    if num_bins < 1:
        raise InputError(f"num_bins must be at least 1, got {num_bins}")
    wide = logits if logits.dtype == torch.float64 else logits.float()
    confidences, predictions = (part.cpu() for part in wide.softmax(dim=1).max(dim=1))
    confidences = confidences.float()
    edges = torch.linspace(0, 1, num_bins + 1)
    places = (torch.bucketize(confidences, edges, right=True) - 1).clamp(max=num_bins - 1)

    def totals(values: Tensor) -> list[float]:
        return torch.zeros(num_bins, dtype=torch.float64).index_add_(0, places, values.double()).tolist()

    counts = torch.bincount(places, minlength=num_bins).tolist()
    rows = zip(counts, totals(confidences), totals(predictions == labels.cpu()), strict=True)
    return [
        {
            "lower": index / num_bins,
            "upper": (index + 1) / num_bins,
            "count": count,
            "confidence": confidence / count if count else None,
            "accuracy": right / count if count else None,
        }
        for index, (count, confidence, right) in enumerate(rows)
    ]


def expected_calibration_error(logits: Tensor, labels: Tensor, *, num_bins: int = 15) -> float:
    r"""Return how far confidence and accuracy lie apart: the weighted gap of the reliability bins, in [0, 1].

    .. math:: \sum_b \frac{n_b}{N} \, |\mathrm{accuracy}_b - \mathrm{confidence}_b|

    Args:
        logits: ``[N, K]``.
        labels: ``[N]`` class ids.
        num_bins: at least 1.

    Raises:
        InputError: see :func:`reliability_bins`.

    Source: Naeini et al. 2015; Guo et al. 2017, arXiv:1706.04599, equation 3. Equal to torchmetrics'
    ``multiclass_calibration_error(norm="l1")`` but for examples of confidence 1, which that puts into one bin more.
    """
    bins = reliability_bins(logits, labels, num_bins=num_bins)
    filled = [part for part in bins if part["count"]]
    return sum(part["count"] * abs(part["accuracy"] - part["confidence"]) for part in filled) / len(labels)
