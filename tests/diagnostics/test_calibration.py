import math

import numpy as np
import pytest
import torch
from scipy.optimize import minimize_scalar
from scipy.special import log_softmax, softmax
from scipy.stats import entropy
from torch import Tensor

from soteacher.diagnostics.calibration import (
    adaptive_calibration_error,
    brier_score,
    calibration_figures,
    confidence_histogram,
    cross_fitted_logits,
    fit_temperature,
    log_probabilities,
)
from soteacher.errors import InputError
from soteacher.metrics import expected_calibration_error, negative_log_likelihood
from soteacher.torchvision_operators import define_missing_operators

FIGURES = ("nll", "brier", "ece", "adaptive_ece")


def _calibrated(*, num_examples: int = 20_000, num_classes: int = 5, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Return logits and labels that are drawn from their probabilities."""
    random = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(num_examples, num_classes, generator=random)
    return logits, torch.multinomial(logits.softmax(dim=1), 1, generator=random).squeeze(1)


def _logits_of(confidences: list[float]) -> Tensor:
    """Return two-class logits that predict class 0 with the given probabilities, each at least one half."""
    return torch.tensor([[math.log(value / (1 - value)), 0.0] for value in confidences], dtype=torch.float64)


def _adaptive_by_loops(logits: Tensor, labels: Tensor, num_bins: int) -> float:
    """Adaptive calibration error of examples without ties, one bin at a time."""
    probabilities = softmax(logits.double().numpy(), axis=1)
    order = np.argsort(probabilities.max(axis=1))
    error = 0.0
    for place in range(num_bins):
        members = [order[i] for i in range(len(order)) if i * num_bins // len(order) == place]
        if members:
            right = np.mean([probabilities[i].argmax() == labels[i].item() for i in members])
            error += len(members) / len(order) * abs(right - np.mean([probabilities[i].max() for i in members]))
    return error


def test_brier_score_by_hand() -> None:
    logits = torch.tensor([[0.7, 0.2, 0.1], [0.1, 0.1, 0.8]], dtype=torch.float64).log()
    expected = ((0.3**2 + 0.2**2 + 0.1**2) + (0.1**2 + 0.9**2 + 0.8**2)) / 2
    assert brier_score(logits, torch.tensor([0, 1])) == pytest.approx(expected)


def test_brier_score_of_two_classes_is_twice_that_of_one() -> None:
    logits, labels = _calibrated(num_examples=200, num_classes=2)
    of_second = np.mean((softmax(logits.double().numpy(), axis=1)[:, 1] - labels.numpy()) ** 2)
    assert brier_score(logits, labels) == pytest.approx(2 * of_second, rel=1e-5)


def test_brier_score_reaches_its_ends() -> None:
    sure = torch.tensor([[1e4, -1e4]])
    assert brier_score(sure, torch.tensor([0])) == 0
    assert brier_score(sure, torch.tensor([1])) == 2


def test_adaptive_error_by_hand() -> None:
    # Two bins of two: half right at 0.65, all right at 0.85.
    logits = _logits_of([0.8, 0.6, 0.9, 0.7])
    value = adaptive_calibration_error(logits, torch.tensor([0, 0, 0, 1]), num_bins=2)
    assert value == pytest.approx((0.15 + 0.15) / 2)


@pytest.mark.parametrize(("num_examples", "num_bins"), [(300, 15), (100, 15), (7, 3), (5, 15), (1, 15), (50, 1)])
def test_adaptive_error_matches_loops(num_examples: int, num_bins: int) -> None:
    logits, labels = _calibrated(num_examples=num_examples)
    logits = 2 * logits.double()
    value = adaptive_calibration_error(logits, labels, num_bins=num_bins)
    assert value == pytest.approx(_adaptive_by_loops(logits, labels, num_bins), abs=1e-12)


def test_adaptive_error_shares_a_tie_that_lies_across_a_cut() -> None:
    # Ordered: one wrong at 0.6, then three at 0.9 of which two are right; the cut lies after the second.
    logits = _logits_of([0.9, 0.6, 0.9, 0.9])
    labels = torch.tensor([0, 1, 1, 0])
    expected = (abs(0 + 2 / 3 - 1.5) + abs(4 / 3 - 1.8)) / 4
    for order in torch.tensor([[0, 1, 2, 3], [3, 2, 1, 0], [2, 0, 1, 3]]):
        value = adaptive_calibration_error(logits[order], labels[order], num_bins=2)
        assert value == pytest.approx(expected)


def test_adaptive_error_of_one_bin_is_the_gap_of_the_means() -> None:
    logits, labels = _calibrated(num_examples=400)
    figures = calibration_figures(2 * logits, labels)
    value = adaptive_calibration_error(2 * logits, labels, num_bins=1)
    assert value == pytest.approx(abs(figures["accuracy"] - figures["confidence"]))


@pytest.mark.parametrize("true_temperature", [0.2, 1.0, 3.0, 20.0])
def test_temperature_matches_scipy(true_temperature: float) -> None:
    logits, labels = _calibrated(num_examples=500)
    logits = true_temperature * logits

    def loss(log_temperature: float) -> float:
        return -log_softmax(logits.double().numpy() / np.exp(log_temperature), axis=1)[range(500), labels].mean()

    found = minimize_scalar(loss, bounds=(math.log(0.01), math.log(100)), method="bounded", options={"xatol": 1e-9})
    assert fit_temperature(logits, labels) == pytest.approx(np.exp(found.x), rel=1e-5)


def test_temperature_is_equivariant_and_ignores_shift_order_and_precision() -> None:
    logits, labels = _calibrated(num_examples=300)
    value = fit_temperature(logits, labels)
    order = torch.randperm(300, generator=torch.Generator().manual_seed(1))
    shifts = torch.arange(300.0).unsqueeze(1)
    assert fit_temperature(7 * logits, labels) == pytest.approx(7 * value, rel=1e-5)
    assert fit_temperature(logits + shifts, labels) == pytest.approx(value, rel=1e-4)
    assert fit_temperature(logits[order], labels[order]) == pytest.approx(value, rel=1e-6)
    assert fit_temperature(logits.double(), labels.int()) == pytest.approx(value, rel=1e-5)
    assert fit_temperature(logits.bfloat16(), labels) == pytest.approx(value, rel=0.02)


def test_temperature_at_its_ends() -> None:
    logits, labels = torch.eye(3) * 50, torch.arange(3)
    assert fit_temperature(logits, labels) == 0.01  # all right
    assert fit_temperature(logits * 1e-3, labels) == 0.01  # by however little
    assert fit_temperature(logits, labels.roll(1)) == 100  # all wrong
    assert fit_temperature(torch.full((4, 3), 7.0), torch.tensor([0, 1, 2, 2])) == 1  # nothing to say


def test_a_calibrated_classifier_has_small_errors_and_temperature_one() -> None:
    logits, labels = _calibrated()
    figures = calibration_figures(logits, labels)
    # The gap of a bin has a standard deviation of at most 1 / (2 sqrt(n_b)): 0.014 over 15 bins of 20 000 examples.
    for name in ("ece", "adaptive_ece", "ece_calibrated", "adaptive_ece_calibrated"):
        assert figures[name] < 0.014
    assert fit_temperature(logits, labels) == pytest.approx(1, abs=0.03)
    # Labels are drawn from the probabilities, so NLL and entropy, and accuracy and confidence, have equal expectations.
    assert figures["nll"] == pytest.approx(figures["entropy"], abs=0.02)
    assert figures["accuracy"] == pytest.approx(figures["confidence"], abs=4 * 0.5 / math.sqrt(20_000))
    expected_brier = 1 - logits.softmax(dim=1).square().sum(dim=1).mean().item()
    assert figures["brier"] == pytest.approx(expected_brier, abs=0.01)


def test_an_overconfident_classifier_is_put_right_by_its_temperature() -> None:
    logits, labels = _calibrated()
    plain, sharp = calibration_figures(logits, labels), calibration_figures(3 * logits, labels)
    assert fit_temperature(3 * logits, labels) == pytest.approx(3, abs=0.1)
    for name in FIGURES:
        assert sharp[name] > plain[name] + 0.05
        assert sharp[f"{name}_calibrated"] == pytest.approx(plain[name], abs=0.005)
        assert sharp[f"{name}_calibrated"] == pytest.approx(plain[f"{name}_calibrated"], abs=1e-4)
    assert sharp["accuracy"] == plain["accuracy"]


def test_figures_of_a_constant_classifier() -> None:
    probabilities = torch.tensor([0.6, 0.3, 0.1], dtype=torch.float64)
    logits = probabilities.log().expand(20, 3)
    labels = torch.tensor([0, 1] * 10)
    figures = calibration_figures(logits, labels)
    assert figures["accuracy"] == 0.5
    assert figures["confidence"] == pytest.approx(0.6)
    assert figures["ece"] == pytest.approx(0.1)
    assert figures["adaptive_ece"] == pytest.approx(0.1)
    assert figures["entropy"] == pytest.approx(entropy([0.6, 0.3, 0.1]))
    assert figures["nll"] == pytest.approx(-(math.log(0.6) + math.log(0.3)) / 2)
    assert figures["brier"] == pytest.approx(((0.16 + 0.09 + 0.01) + (0.36 + 0.49 + 0.01)) / 2)


def test_figures_match_scipy_and_the_metrics() -> None:
    logits, labels = _calibrated(num_examples=400)
    figures = calibration_figures(2 * logits, labels)
    probabilities = softmax(2 * logits.double().numpy(), axis=1)
    assert figures["entropy"] == pytest.approx(entropy(probabilities, axis=1).mean(), rel=1e-5)
    assert figures["confidence"] == pytest.approx(probabilities.max(axis=1).mean(), rel=1e-6)
    assert figures["brier"] == pytest.approx(((probabilities - np.eye(5)[labels]) ** 2).sum(axis=1).mean(), rel=1e-5)
    assert figures["nll"] == negative_log_likelihood(2 * logits, labels)
    assert figures["ece"] == expected_calibration_error(2 * logits, labels)
    calibrated = cross_fitted_logits(2 * logits, labels)
    assert figures["nll_calibrated"] == negative_log_likelihood(calibrated, labels)
    assert figures["brier_calibrated"] == brier_score(calibrated, labels)
    assert figures["ece_calibrated"] == expected_calibration_error(calibrated, labels)
    assert figures["adaptive_ece_calibrated"] == adaptive_calibration_error(calibrated, labels)


def test_calibration_errors_match_torchmetrics() -> None:
    define_missing_operators()  # torchmetrics imports torchvision
    classification = pytest.importorskip("torchmetrics.functional.classification", reason="torchmetrics is not there")
    logits, labels = _calibrated(num_examples=2000)
    figures = calibration_figures(3 * logits, labels)
    pairs = {"ece": 3 * logits, "ece_calibrated": cross_fitted_logits(3 * logits, labels)}
    for name, scaled in pairs.items():
        kwargs = {"num_classes": 5, "n_bins": 15, "norm": "l1"}
        expected = classification.multiclass_calibration_error(scaled.softmax(dim=1), labels, **kwargs)
        assert figures[name] == pytest.approx(expected.item(), abs=1e-5)


def test_figures_do_not_depend_on_the_order_or_on_a_shift() -> None:
    logits, labels = _calibrated(num_examples=500)
    order = torch.randperm(500, generator=torch.Generator().manual_seed(1))
    first = calibration_figures(logits, labels)
    for other in (calibration_figures(logits[order], labels[order]), calibration_figures(logits + 3, labels)):
        for name in ("accuracy", *FIGURES, "entropy", "confidence"):
            assert other[name] == pytest.approx(first[name], abs=1e-5)
        for name in FIGURES:  # the halves hold other examples
            assert other[f"{name}_calibrated"] == pytest.approx(first[f"{name}_calibrated"], abs=0.05)


def test_cross_fitting_judges_nothing_on_what_it_was_fitted_to() -> None:
    logits, labels = _calibrated(num_examples=101)
    temperatures = (logits / cross_fitted_logits(logits, labels)).mean(dim=1)  # two values, but for rounding
    first, second = temperatures.min().item(), temperatures.max().item()
    of_first = (temperatures - first).abs() < (temperatures - second).abs()
    assert sorted([int(of_first.sum()), int((~of_first).sum())]) == [50, 51]
    assert fit_temperature(logits[~of_first], labels[~of_first]) == pytest.approx(first, rel=1e-4)
    assert fit_temperature(logits[of_first], labels[of_first]) == pytest.approx(second, rel=1e-4)


def test_cross_fitting_is_seeded_and_leaves_its_input_alone() -> None:
    logits, labels = _calibrated(num_examples=60)
    copy = logits.clone()
    first = cross_fitted_logits(logits, labels)
    assert torch.equal(first, cross_fitted_logits(logits, labels))
    assert not torch.equal(first, cross_fitted_logits(logits, labels, seed=1))
    assert torch.equal(logits, copy)
    assert calibration_figures(logits, labels, seed=1)["nll_calibrated"] == pytest.approx(
        negative_log_likelihood(cross_fitted_logits(logits, labels, seed=1), labels)
    )


@pytest.mark.parametrize("scale", [0.0, 1e-30, 1e4, 1e30])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_figures_of_extreme_logits_are_finite(scale: float, dtype: torch.dtype) -> None:
    logits, labels = _calibrated(num_examples=50)
    figures = calibration_figures(scale * logits.to(dtype), labels)
    assert all(math.isfinite(value) for value in figures.values())
    assert 0 <= figures["brier"] <= 2
    assert 0 <= figures["adaptive_ece"] <= 1
    assert 0 <= figures["entropy"] <= math.log(5) + 1e-6


def test_figures_take_half_precision_and_logits_with_a_gradient() -> None:
    logits, labels = _calibrated(num_examples=200)
    first = calibration_figures(logits, labels)
    second = calibration_figures(logits.bfloat16().requires_grad_(), labels.int())
    assert second == pytest.approx(first, abs=0.05)


def test_log_probabilities_match_scipy() -> None:
    logits = torch.tensor([[1.0, 2.0, 1e4], [-3.0, 0.0, 0.5]])
    assert log_probabilities(logits).numpy() == pytest.approx(log_softmax(logits.double().numpy(), axis=1), rel=1e-6)


@pytest.mark.parametrize("highest", [2e38, 3.4e38])
def test_figures_of_logits_whose_difference_overflows_are_finite(highest: float) -> None:
    logits = torch.tensor([[highest, -highest], [-highest, highest], [1.0, 0.0]])
    found = log_probabilities(logits)
    assert found.isfinite().all()
    assert found[0].tolist() == [0, torch.finfo(torch.float32).min]
    for labels in (torch.tensor([0, 1, 0]), torch.tensor([1, 0, 1]), torch.tensor([0, 0, 0])):
        assert all(math.isfinite(value) for value in calibration_figures(logits, labels).values())
        assert 0.01 <= fit_temperature(logits, labels) <= 100
        assert cross_fitted_logits(logits, labels).isfinite().all()


def test_histogram_by_hand() -> None:
    logits = torch.tensor([[100.0, 0.0], [0.0, 0.0], [0.0, 1.0], [0.0, 100.0]])  # confidences 1, 1/2, 0.73, 1
    shares, edges = confidence_histogram(logits, num_bins=4)
    assert shares == [0, 0, 0.5, 0.5]
    assert edges == [0, 0.25, 0.5, 0.75, 1]


def test_histogram_matches_numpy() -> None:
    logits, _ = _calibrated(num_examples=500)
    shares, edges = confidence_histogram(logits)
    counts, expected_edges = np.histogram(softmax(logits.double().numpy(), axis=1).max(axis=1), bins=20, range=(0, 1))
    assert edges == pytest.approx(expected_edges)
    assert shares == pytest.approx(counts / 500)
    assert sum(shares) == pytest.approx(1)


BAD_LABELS = [
    (torch.zeros(4), torch.zeros(4).long(), r"shapes \[4\] and \[4\]; wanted \[N, K\] and \[N\]"),
    (torch.zeros(4, 3), torch.zeros(5).long(), r"shapes \[4, 3\] and \[5\]"),
    (torch.zeros(0, 3), torch.zeros(0).long(), "not empty"),
    (torch.zeros(4, 3), torch.zeros(4), "wanted floats and integers"),
    (torch.zeros(4, 3), torch.tensor([0, 1, 2, 3]), "labels run from 0 to 3; wanted 0 to 2"),
    (torch.tensor([[0.0, math.nan], [math.inf, 1]]), torch.zeros(2).long(), "2 of 4 logits are NaN or infinite"),
]


@pytest.mark.parametrize(
    "function", [brier_score, adaptive_calibration_error, fit_temperature, cross_fitted_logits, calibration_figures]
)
@pytest.mark.parametrize(("logits", "labels", "message"), BAD_LABELS)
def test_calibration_refuses_what_does_not_fit(function, logits: Tensor, labels: Tensor, message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        function(logits, labels)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("logits", "message"),
    [
        (torch.zeros(3), r"torch.float32 of shape \[3\]; wanted floats \[N, K\]"),
        (torch.zeros(0, 3), "not empty"),
        (torch.zeros(2, 3).long(), "logits are torch.int64"),
        (torch.tensor([[math.nan, 0.0]]), "1 of 2 logits are NaN or infinite; wanted finite ones"),
    ],
)
def test_histogram_refuses_what_are_no_logits(logits: Tensor, message: str) -> None:
    with pytest.raises(InputError, match=message):
        confidence_histogram(logits)


def test_bins_and_halves_must_hold_something() -> None:
    logits, labels = torch.zeros(1, 2), torch.zeros(1).long()
    with pytest.raises(InputError, match="num_bins must be at least 1, got 0"):
        adaptive_calibration_error(logits, labels, num_bins=0)
    with pytest.raises(InputError, match="num_bins must be at least 1, got 0"):
        confidence_histogram(logits, num_bins=0)
    with pytest.raises(InputError, match="needs at least 2 examples, got 1"):
        cross_fitted_logits(logits, labels)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_figures_on_a_gpu_are_those_of_the_cpu() -> None:
    logits, labels = _calibrated(num_examples=500)
    expected = calibration_figures(logits, labels)
    assert calibration_figures(logits.cuda(), labels.cuda()) == pytest.approx(expected, abs=1e-4)
    assert calibration_figures(logits.cuda(), labels) == pytest.approx(expected, abs=1e-4)
    assert confidence_histogram(logits.cuda())[0] == pytest.approx(confidence_histogram(logits)[0])
