"""How far a network's probabilities can be believed, with and without a fitted temperature."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from soteacher import metrics
from soteacher.errors import InputError
from soteacher.precision import at_least_float32
from soteacher.randomness import generator

LOWEST_TEMPERATURE, HIGHEST_TEMPERATURE = 0.01, 100.0


def log_probabilities(logits: Tensor) -> Tensor:
    """Return the logarithm of the softmax of logits that every figure of this package is computed from.

    Args:
        logits: ``[N, K]``.

    Returns:
        ``[N, K]``, nats, finite; float32, or float64 from float64 logits; no gradients flow. What lies below the
        lowest number of its type, as for the logits 3e38 and -3e38, is that number.

    Raises:
        InputError: another shape, no entries, no floats, or an entry that is NaN or infinite.
    """
    if logits.ndim != 2 or logits.numel() == 0 or not logits.is_floating_point():
        raise InputError(f"logits are {logits.dtype} of shape {list(logits.shape)}; wanted floats [N, K], not empty")
    finite = logits.isfinite()
    if not bool(finite.all()):
        raise InputError(f"{int((~finite).sum())} of {logits.numel()} logits are NaN or infinite; wanted finite ones")
    return _finite(at_least_float32(logits.detach()).log_softmax(dim=1))


def brier_score(logits: Tensor, labels: Tensor) -> float:
    r"""Return the mean squared distance of the probabilities from the labels, in [0, 2].

    .. math:: \frac{1}{N} \sum_i \sum_k \bigl(p_{ik} - [k = y_i]\bigr)^2

    Args:
        logits: ``[N, K]``.
        labels: ``[N]`` class ids.

    Raises:
        InputError: wrong shapes, types or class ids, or logits that are not finite.

    Source: Brier 1950. The sum runs over all classes, so with two it is twice the score of the second class alone.
    """
    errors, labels = _checked(logits, labels)
    errors = errors.exp()
    errors[torch.arange(len(labels), device=labels.device), labels] -= 1
    return _mean(errors.square().sum(dim=1))


def adaptive_calibration_error(logits: Tensor, labels: Tensor, *, num_bins: int = 15) -> float:
    r"""Return how far confidence and accuracy lie apart, over bins that hold equally many examples, in [0, 1].

    .. math:: \sum_b \frac{n_b}{N} \, |\mathrm{accuracy}_b - \mathrm{confidence}_b|

    Examples are ordered by their largest probability and cut into bins whose sizes differ by at most one; with fewer
    examples than bins, each has its own. Examples of exactly equal confidence each count with the share of them that is
    right, so the value does not depend on the order of the examples, also where a tie lies across a cut.

    Args:
        logits: ``[N, K]``.
        labels: ``[N]`` class ids.
        num_bins: at least 1.

    Raises:
        InputError: wrong shapes, types or class ids, logits that are not finite, or ``num_bins < 1``.

    Source: the adaptive binning of Nguyen and O'Connor 2015, arXiv:1508.05154, and of Nixon et al. 2019,
    arXiv:1904.01685, both from memory of the paper, not checked. The latter average over the probabilities of all
    classes; here, as in the expected calibration error, only the largest counts. The treatment of ties is ours.
    """
    predictions, labels = _checked(logits, labels)
    if num_bins < 1:
        raise InputError(f"num_bins must be at least 1, got {num_bins}")
    confidences, classes = predictions.softmax(dim=1).max(dim=1)
    levels, level_of = torch.unique(confidences.cpu(), return_inverse=True)
    right = torch.zeros(len(levels), dtype=torch.float64).index_add_(0, level_of, (classes == labels).cpu().double())
    gaps = right / torch.bincount(level_of) - levels.double()
    places = torch.arange(len(labels)) * num_bins // len(labels)
    sums = torch.zeros(num_bins, dtype=torch.float64).index_add_(0, places, gaps[level_of.sort().values])
    return sums.abs().sum().item() / len(labels)


def fit_temperature(logits: Tensor, labels: Tensor) -> float:
    r"""Return the temperature by which logits must be divided for the least negative log-likelihood.

    .. math:: \arg\min_{\tau} \; -\frac{1}{N} \sum_i \log \sigma(z_i / \tau)_{y_i}

    The likelihood is convex in :math:`1 / \tau`; the root of its slope there,
    :math:`\frac{1}{N} \sum_i \bigl(\sum_k p_{ik} z_{ik} - z_{i y_i}\bigr)`, is found by bracketing.

    Args:
        logits: ``[N, K]``.
        labels: ``[N]`` class ids.

    Returns:
        :math:`\tau` in [0.01, 100]: the lower end where every label has the largest logit of its example, as ever
        sharper is ever better then, and the upper end where the logits say no more than chance, or less. Where every
        example has equal logits any temperature will do, and it is 1.

    Raises:
        InputError: wrong shapes, types or class ids, or logits that are not finite.

    Source: Guo et al. 2017, arXiv:1706.04599, section 4.2.
    """
    from scipy.optimize import root_scalar  # imported here: it takes long, and not every figure needs it

    _, labels = _checked(logits, labels)
    wide = at_least_float32(logits.detach())
    offsets = _finite(wide - wide.amax(dim=1, keepdim=True))
    of_labels = offsets.gather(1, labels.unsqueeze(1)).squeeze(1)

    def slope(log_temperature: float) -> float:
        probabilities = (offsets * math.exp(-log_temperature)).softmax(dim=1)
        return _mean((probabilities * offsets).sum(dim=1) - of_labels)

    lower, upper = math.log(LOWEST_TEMPERATURE), math.log(HIGHEST_TEMPERATURE)
    if bool((offsets == 0).all()):
        return 1.0
    if slope(upper) >= 0:
        return HIGHEST_TEMPERATURE
    if slope(lower) <= 0:
        return LOWEST_TEMPERATURE
    return math.exp(root_scalar(slope, bracket=(lower, upper), method="brentq").root)


def cross_fitted_logits(logits: Tensor, labels: Tensor, *, seed: int = 0) -> Tensor:
    """Return logits divided by a fitted temperature, that of the half of the examples to which each does not belong.

    The halves are the even and the odd places of a random order, so nothing is judged on what it was fitted to.

    Args:
        logits: ``[N, K]``.
        labels: ``[N]`` class ids.
        seed: decides the order.

    Returns:
        ``[N, K]``, float32 or wider.

    Raises:
        InputError: fewer than two examples; or see :func:`fit_temperature`.
    """
    _, labels = _checked(logits, labels)
    if len(labels) < 2:
        raise InputError("a temperature fitted on one half and used on the other needs at least 2 examples, got 1")
    order = torch.randperm(len(labels), generator=generator(seed, "cross-fitting")).to(logits.device)
    calibrated = at_least_float32(logits.detach()).clone()
    for fitted, judged in ((order[::2], order[1::2]), (order[1::2], order[::2])):
        calibrated[judged] /= fit_temperature(logits[fitted], labels[fitted])
    return _finite(calibrated)


def calibration_figures(logits: Tensor, labels: Tensor, *, seed: int = 0) -> dict[str, float]:
    r"""Return how right, how sure and how well calibrated a network is on a split.

    A half in which every example is right has the lowest temperature; an example of the other half that is wrong then
    costs a hundred times its margin. On a training split that is almost all right, ``nll_calibrated`` may therefore
    be far above ``nll``.

    Args:
        logits: ``[N, K]``.
        labels: ``[N]`` class ids.
        seed: decides the halves on which temperatures are fitted.

    Returns:
        ``accuracy``; ``nll``, nats; ``brier``; ``ece`` and ``adaptive_ece`` over 15 bins; ``entropy``, the mean of
        :math:`-\sum_k p_k \log p_k`, nats; ``confidence``, the mean of the largest probability; and
        ``nll_calibrated``, ``brier_calibrated``, ``ece_calibrated`` and ``adaptive_ece_calibrated``, the same of
        :func:`cross_fitted_logits`.

    Raises:
        InputError: wrong shapes, types or class ids, logits that are not finite, or fewer than two examples.
    """
    predictions, _ = _checked(logits, labels)
    probabilities = predictions.exp()
    calibrated = _errors(cross_fitted_logits(logits, labels, seed=seed), labels)
    return {
        "accuracy": metrics.accuracy(logits, labels.to(logits.device)),
        **_errors(logits, labels),
        "entropy": _mean(torch.special.entr(probabilities).sum(dim=1)),
        "confidence": _mean(probabilities.amax(dim=1)),
        **{f"{name}_calibrated": value for name, value in calibrated.items()},
    }


def confidence_histogram(logits: Tensor, *, num_bins: int = 20) -> tuple[list[float], list[float]]:
    """Return which share of the examples has which confidence, and the edges of the bins.

    Bins are those of :func:`soteacher.metrics.reliability_bins`: of equal width over [0, 1] and closed below, and the
    last one also holds confidence 1.

    Args:
        logits: ``[N, K]``.
        num_bins: at least 1.

    Returns:
        ``num_bins`` shares, which sum to 1, and ``num_bins + 1`` edges.

    Raises:
        InputError: logits of another shape or type, none, or not finite; or ``num_bins < 1``.
    """
    predictions = log_probabilities(logits)
    bins = metrics.reliability_bins(predictions, predictions.argmax(dim=1), num_bins=num_bins)
    return [part["count"] / len(logits) for part in bins], [0.0, *(part["upper"] for part in bins)]


def _checked(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Return log probabilities and labels that fit them, on one device."""
    metrics.check_predictions(logits, labels)
    return log_probabilities(logits), labels.to(logits.device, torch.int64)


def _finite(values: Tensor) -> Tensor:
    """Return values without infinite ones, which are the largest and the lowest of their type instead."""
    limits = torch.finfo(values.dtype)
    return values.clamp(limits.min, limits.max)


def _errors(logits: Tensor, labels: Tensor) -> dict[str, float]:
    labels = labels.to(logits.device)
    return {
        "nll": -_mean(log_probabilities(logits).gather(1, labels.long().unsqueeze(1))),
        "brier": brier_score(logits, labels),
        "ece": metrics.expected_calibration_error(logits, labels),
        "adaptive_ece": adaptive_calibration_error(logits, labels),
    }


def _mean(values: Tensor) -> float:
    return values.cpu().double().mean().item()
