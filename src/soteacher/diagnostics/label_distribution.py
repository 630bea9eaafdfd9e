"""How near a network's probabilities come to the true distribution of each example's label, where that is known."""

from __future__ import annotations

import torch
from torch import Tensor

from soteacher.diagnostics.calibration import log_probabilities
from soteacher.errors import InputError

SUM_TOLERANCE = 1e-3
"""How far the probabilities of an example may sum from 1."""


def distribution_distances(logits: Tensor, distribution: Tensor) -> dict[str, float]:
    r"""Return three distances of a network's probabilities from the true ones, each a mean over the examples.

    .. math::
        \text{mse: } \sum_k (p_{ik} - p^*_{ik})^2, \qquad
        \text{kl: } \sum_k p^*_{ik} \log \frac{p^*_{ik}}{p_{ik}}, \qquad
        \text{total variation: } \tfrac{1}{2} \sum_k |p_{ik} - p^*_{ik}|

    with :math:`0 \log 0 = 0`.

    Args:
        logits: ``[N, K]``.
        distribution: ``[N, K]`` true probabilities :math:`p^*`.

    Returns:
        ``mse`` in [0, 2], ``kl`` in nats and not bounded above, ``total_variation`` in [0, 1].

    Raises:
        InputError: the shapes differ, nothing to compare, a logit that is not finite, or rows of ``distribution`` that
            hold a negative value or do not sum to 1 within 0.001.

    Source: the squared distance is that of the theory of Dong, Liu and Shang, ICLR 2024, arXiv:2206.06661 (from memory
    of the paper, not checked).
    """
    predictions, truth = _checked(logits, distribution)
    gaps = predictions.exp() - truth
    wide = truth.cpu().double()  # in which no product with the lowest logarithm overflows
    divergences = (torch.xlogy(wide, wide) - wide * predictions.cpu().double()).sum(dim=1)
    figures = {
        "mse": gaps.square().sum(dim=1),
        "kl": divergences.clamp(min=0),  # rounding may leave less
        "total_variation": gaps.abs().sum(dim=1) / 2,
    }
    return {name: values.cpu().double().mean().item() for name, values in figures.items()}


def most_different(logits: Tensor, distribution: Tensor, *, count: int) -> tuple[Tensor, Tensor]:
    """Return the examples whose probabilities lie farthest from the true ones in total variation, farthest first.

    Args:
        logits: ``[N, K]``.
        distribution: ``[N, K]`` true probabilities.
        count: how many, at least 1; all N where there are fewer.

    Returns:
        Their rows, int64, and their distances in [0, 1]; of equal distances the lower row comes first.

    Raises:
        InputError: ``count < 1``; or see :func:`distribution_distances`.
    """
    predictions, truth = _checked(logits, distribution)
    if count < 1:
        raise InputError(f"count must be at least 1, got {count}")
    distances = (predictions.exp() - truth).abs().sum(dim=1) / 2
    ordered, rows = distances.sort(descending=True, stable=True)
    return rows[:count], ordered[:count]


def _checked(logits: Tensor, distribution: Tensor) -> tuple[Tensor, Tensor]:
    """Return log probabilities and the true probabilities, of one shape, type and device."""
    if logits.shape != distribution.shape:
        shapes = f"{list(logits.shape)} and {list(distribution.shape)}"
        raise InputError(f"logits and distribution have shapes {shapes}; wanted one shape [N, K]")
    predictions = log_probabilities(logits)
    truth = distribution.detach().to(predictions)
    negative = int((truth < 0).sum())
    if negative:
        raise InputError(f"{negative} values of the distribution are negative; wanted probabilities")
    sums = truth.sum(dim=1)
    wrong = ~((sums - 1).abs() <= SUM_TOLERANCE)  # so that NaN is wrong too
    if bool(wrong.any()):
        row = int(wrong.nonzero()[0])
        raise InputError(
            f"row {row} of the distribution sums to {float(sums[row]):.6g}; wanted 1 within {SUM_TOLERANCE}"
        )
    return predictions, truth
