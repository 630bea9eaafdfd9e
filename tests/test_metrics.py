import math

import pytest
import torch
from scipy.special import log_softmax
from torch import Tensor

from soteacher.errors import InputError
from soteacher.metrics import accuracy, expected_calibration_error, negative_log_likelihood, reliability_bins


def _example(*, num_examples: int = 500, num_classes: int = 7) -> tuple[Tensor, Tensor]:
    random = torch.Generator().manual_seed(3)
    logits = 2 * torch.randn(num_examples, num_classes, generator=random)
    return logits, torch.randint(num_classes, (num_examples,), generator=random)


def _logits_of(confidences: list[float]) -> Tensor:
    """Return two-class logits that predict class 0 with the given probabilities, each above one half."""
    return torch.tensor([[math.log(value / (1 - value)), 0.0] for value in confidences], dtype=torch.float64)


def test_accuracy_by_hand() -> None:
    logits = torch.tensor([[2.0, 1.0], [0.0, 1.0], [3.0, 0.0]])
    assert accuracy(logits, torch.tensor([0, 0, 0])) == 2 / 3


def test_negative_log_likelihood_matches_scipy() -> None:
    logits, labels = _example()
    expected = -log_softmax(logits.double().numpy(), axis=1)[range(500), labels.numpy()].mean()
    assert negative_log_likelihood(logits, labels) == pytest.approx(expected, rel=1e-6)


def test_negative_log_likelihood_of_uniform_is_log_of_classes() -> None:
    assert negative_log_likelihood(torch.zeros(4, 10), torch.arange(4)) == pytest.approx(math.log(10))


def test_metrics_ignore_a_shift_of_the_logits() -> None:
    logits, labels = _example()
    for metric in (accuracy, negative_log_likelihood, expected_calibration_error):
        assert metric(logits + 5, labels) == pytest.approx(metric(logits, labels), abs=1e-5)


def test_metrics_take_half_precision() -> None:
    logits, labels = _example()
    for metric in (accuracy, negative_log_likelihood, expected_calibration_error):
        assert metric(logits.bfloat16(), labels) == pytest.approx(metric(logits, labels), abs=0.02)


def test_expected_calibration_error_by_hand() -> None:
    # Bins of width 1/2: everything lies in the upper one. Three of four are right at a mean confidence of 0.8.
    logits = _logits_of([0.7, 0.8, 0.8, 0.9])
    assert expected_calibration_error(logits, torch.tensor([0, 0, 0, 1]), num_bins=2) == pytest.approx(0.05)
    # Of ten bins, three are filled: gaps 0.3 (one of four), 0.3 (two of four, one of them right), 0.9.
    value = expected_calibration_error(logits, torch.tensor([0, 0, 1, 1]), num_bins=10)
    assert value == pytest.approx((0.3 + 2 * 0.3 + 0.9) / 4)


@pytest.mark.parametrize(
    ("scale", "num_bins", "expected"),
    [  # torchmetrics 1.9.0: multiclass_calibration_error(logits.softmax(1), labels, 7, n_bins=num_bins, norm="l1")
        (1, 15, 0.38008976),
        (3, 1, 0.16255999),
        (3, 10, 0.20455073),
        (3, 15, 0.20455070),
        (10, 10, 0.16885731),
        (10, 15, 0.17710903),
    ],
)
def test_expected_calibration_error_matches_torchmetrics(scale: float, num_bins: int, expected: float) -> None:
    logits = torch.sin(torch.arange(3500, dtype=torch.float64) ** 2).reshape(500, 7)
    rows = torch.arange(500)
    labels = torch.where(rows % 5 < 3, logits.argmax(dim=1), rows % 7)
    assert expected_calibration_error(scale * logits, labels, num_bins=num_bins) == pytest.approx(expected, abs=1e-6)


def test_weighted_gap_of_the_bins_is_the_calibration_error() -> None:
    logits, labels = _example()
    bins = reliability_bins(logits, labels)
    assert sum(part["count"] for part in bins) == 500
    gaps = [part["count"] / 500 * abs(part["accuracy"] - part["confidence"]) for part in bins if part["count"]]
    assert sum(gaps) == pytest.approx(expected_calibration_error(logits, labels), abs=1e-12)


def test_reliability_bins_average_to_the_accuracy() -> None:
    logits, labels = _example()
    bins = reliability_bins(logits, labels)
    right = sum(part["count"] * part["accuracy"] for part in bins if part["count"])
    assert right / 500 == pytest.approx(accuracy(logits, labels))
    for part in bins:
        if part["count"]:
            assert part["lower"] <= part["confidence"] <= part["upper"]


def test_reliability_bins_leave_empty_means_out_and_hold_certainty() -> None:
    bins = reliability_bins(torch.tensor([[100.0, 0.0], [0.0, 0.0]]), torch.tensor([1, 0]), num_bins=4)
    assert [part["count"] for part in bins] == [0, 0, 1, 1]  # 1/2 opens the third bin, 1 lies in the last
    assert bins[0] == {"lower": 0.0, "upper": 0.25, "count": 0, "confidence": None, "accuracy": None}
    assert bins[2]["accuracy"] == 1.0
    assert bins[3] == {"lower": 0.75, "upper": 1.0, "count": 1, "confidence": 1.0, "accuracy": 0.0}


@pytest.mark.parametrize("metric", [accuracy, negative_log_likelihood, expected_calibration_error, reliability_bins])
@pytest.mark.parametrize(
    ("logits", "labels", "message"),
    [
        (torch.zeros(4), torch.zeros(4).long(), r"shapes \[4\] and \[4\]; wanted \[N, K\] and \[N\]"),
        (torch.zeros(4, 3), torch.zeros(5).long(), r"shapes \[4, 3\] and \[5\]"),
        (torch.zeros(4, 3), torch.zeros(4, 3).long(), r"shapes \[4, 3\] and \[4, 3\]"),
        (torch.zeros(0, 3), torch.zeros(0).long(), "not empty"),
        (torch.zeros(4, 3).long(), torch.zeros(4).long(), "wanted floats and integers"),
        (torch.zeros(4, 3), torch.zeros(4), "wanted floats and integers"),
        (torch.zeros(4, 3), torch.tensor([0, 1, 2, 3]), "labels run from 0 to 3; wanted 0 to 2"),
        (torch.zeros(4, 3), torch.tensor([0, 1, -1, 2]), "labels run from -1 to 2; wanted 0 to 2"),
    ],
)
def test_metrics_refuse_what_does_not_fit(metric, logits: Tensor, labels: Tensor, message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        metric(logits, labels)
    assert "\n" not in str(caught.value)


def test_reliability_bins_refuse_no_bins() -> None:
    with pytest.raises(InputError, match="num_bins must be at least 1, got 0"):
        reliability_bins(torch.zeros(1, 2), torch.zeros(1).long(), num_bins=0)
