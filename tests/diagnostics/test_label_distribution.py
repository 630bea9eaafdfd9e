import math

import numpy as np
import pytest
import torch
from scipy.special import softmax
from scipy.stats import entropy
from torch import Tensor

from soteacher.diagnostics.label_distribution import distribution_distances, most_different
from soteacher.errors import InputError


def _example(*, num_examples: int = 200, num_classes: int = 6) -> tuple[Tensor, Tensor]:
    random = torch.Generator().manual_seed(5)
    logits = 2 * torch.randn(num_examples, num_classes, generator=random)
    return logits, (2 * torch.randn(num_examples, num_classes, generator=random)).softmax(dim=1)


def test_distances_by_hand() -> None:
    logits = torch.tensor([[0.5, 0.25, 0.25], [0.2, 0.2, 0.6]], dtype=torch.float64).log()
    truth = torch.tensor([[1.0, 0.0, 0.0], [0.2, 0.2, 0.6]], dtype=torch.float64)
    figures = distribution_distances(logits, truth)
    assert figures == pytest.approx({"mse": 0.375 / 2, "kl": math.log(2) / 2, "total_variation": 0.25})


def test_distances_match_numpy_and_scipy() -> None:
    logits, truth = _example()
    predictions, expected = softmax(logits.double().numpy(), axis=1), truth.double().numpy()
    figures = distribution_distances(logits, truth)
    assert figures["mse"] == pytest.approx(((predictions - expected) ** 2).sum(axis=1).mean(), rel=1e-5)
    assert figures["kl"] == pytest.approx(entropy(expected, predictions, axis=1).mean(), rel=1e-5)
    assert figures["total_variation"] == pytest.approx(np.abs(predictions - expected).sum(axis=1).mean() / 2, rel=1e-5)


def test_distances_vanish_where_the_two_agree() -> None:
    logits, _ = _example()
    figures = distribution_distances(logits, logits.softmax(dim=1))
    assert figures == pytest.approx({"mse": 0, "kl": 0, "total_variation": 0}, abs=1e-6)
    assert figures["kl"] >= 0


def test_distances_from_labels_are_brier_score_and_likelihood() -> None:
    logits, _ = _example()
    labels = torch.arange(200) % 6
    figures = distribution_distances(logits, torch.eye(6)[labels])
    probabilities = softmax(logits.double().numpy(), axis=1)
    assert figures["mse"] == pytest.approx(((probabilities - np.eye(6)[labels]) ** 2).sum(axis=1).mean(), rel=1e-5)
    assert figures["kl"] == pytest.approx(-np.log(probabilities[range(200), labels]).mean(), rel=1e-5)
    assert figures["total_variation"] == pytest.approx(1 - probabilities[range(200), labels].mean(), rel=1e-5)


def test_distances_obey_pinsker_and_ignore_order_and_shift() -> None:
    logits, truth = _example()
    figures = distribution_distances(logits, truth)
    assert 2 * figures["total_variation"] ** 2 <= figures["kl"]  # holds for means too: the square is convex
    order = torch.randperm(200, generator=torch.Generator().manual_seed(1))
    assert distribution_distances(logits[order], truth[order]) == pytest.approx(figures)
    assert distribution_distances(logits + 4, truth.double()) == pytest.approx(figures, rel=1e-4)
    assert distribution_distances(logits.bfloat16(), truth) == pytest.approx(figures, abs=0.05)


@pytest.mark.parametrize("scale", [0.0, 1e4, 1e30])
def test_distances_of_extreme_logits_are_finite(scale: float) -> None:
    logits, _ = _example()
    figures = distribution_distances(scale * logits, torch.eye(6)[torch.arange(200) % 6])
    assert all(math.isfinite(value) for value in figures.values())
    assert figures["mse"] <= 2
    assert figures["total_variation"] <= 1


def test_distances_of_logits_whose_difference_overflows_are_finite() -> None:
    logits = torch.tensor([[3e38, -3e38, -3e38]]).expand(2, 3)
    right = distribution_distances(logits, torch.tensor([[1.0, 0, 0]]).expand(2, 3))
    assert right == {"mse": 0, "kl": 0, "total_variation": 0}
    wrong = distribution_distances(logits, torch.tensor([[0, 0.5, 0.5009]]).expand(2, 3))
    assert wrong["kl"] == pytest.approx(1.0009 * -float(torch.finfo(torch.float32).min))
    assert all(math.isfinite(value) for value in wrong.values())


def test_most_different_by_hand() -> None:
    logits = torch.zeros(4, 2)
    truth = torch.tensor([[0.5, 0.5], [1.0, 0.0], [0.25, 0.75], [0.0, 1.0]])
    rows, distances = most_different(logits, truth, count=3)
    assert rows.tolist() == [1, 3, 2]  # rows 1 and 3 are tied
    assert distances.tolist() == [0.5, 0.5, 0.25]
    assert most_different(logits, truth, count=9)[0].tolist() == [1, 3, 2, 0]


def test_most_different_orders_by_total_variation() -> None:
    logits, truth = _example()
    rows, distances = most_different(logits, truth, count=200)
    expected = np.abs(softmax(logits.double().numpy(), axis=1) - truth.double().numpy()).sum(axis=1) / 2
    assert sorted(rows.tolist()) == list(range(200))
    assert distances.numpy() == pytest.approx(expected[rows], abs=1e-6)
    assert distances.mean().item() == pytest.approx(distribution_distances(logits, truth)["total_variation"])


def test_most_different_keeps_the_order_of_many_ties() -> None:
    rows, _ = most_different(torch.zeros(1000, 2), torch.eye(2).repeat(500, 1), count=1000)
    assert rows.tolist() == list(range(1000))


@pytest.mark.parametrize("function", [distribution_distances, lambda *pair: most_different(*pair, count=1)])
@pytest.mark.parametrize(
    ("logits", "truth", "message"),
    [
        (torch.zeros(2, 3), torch.zeros(2, 4), r"shapes \[2, 3\] and \[2, 4\]; wanted one shape \[N, K\]"),
        (torch.zeros(3), torch.zeros(3), "wanted floats"),
        (torch.zeros(0, 3), torch.zeros(0, 3), "not empty"),
        (torch.tensor([[math.nan, 0.0]]), torch.tensor([[0.5, 0.5]]), "1 of 2 logits are NaN or infinite"),
        (torch.zeros(1, 3), torch.tensor([[1.2, -0.1, -0.1]]), "2 values of the distribution are negative"),
        (torch.zeros(2, 2), torch.tensor([[0.5, 0.5], [0.6, 0.6]]), "row 1 of the distribution sums to 1.2; wanted 1"),
        (torch.zeros(1, 2), torch.tensor([[math.nan, 1.0]]), "row 0 of the distribution sums to nan"),
        (torch.zeros(1, 2), torch.tensor([[3, 4]]), "sums to 7"),
    ],
)
def test_distances_refuse_what_is_no_distribution(function, logits: Tensor, truth: Tensor, message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        function(logits, truth)
    assert "\n" not in str(caught.value)


def test_distances_take_rows_that_sum_to_one_within_a_thousandth() -> None:
    distribution_distances(torch.zeros(1, 2), torch.tensor([[0.5, 0.5005]]))
    with pytest.raises(InputError, match=r"sums to 1\.002"):
        distribution_distances(torch.zeros(1, 2), torch.tensor([[0.5, 0.502]]))


def test_most_different_refuses_no_rows() -> None:
    with pytest.raises(InputError, match="count must be at least 1, got 0"):
        most_different(torch.zeros(1, 2), torch.full((1, 2), 0.5), count=0)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_distances_on_a_gpu_are_those_of_the_cpu() -> None:
    logits, truth = _example()
    assert distribution_distances(logits.cuda(), truth) == pytest.approx(distribution_distances(logits, truth))
    assert (
        most_different(logits.cuda(), truth, count=5)[0].tolist() == most_different(logits, truth, count=5)[0].tolist()
    )
