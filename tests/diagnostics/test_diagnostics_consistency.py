import math

import numpy as np
import pytest
import torch
from scipy.special import softmax
from scipy.stats import entropy
from torch import Tensor

from soteacher.diagnostics.consistency import ViewFigures, conditional_mutual_information, view_figures
from soteacher.errors import InputError


def _example(*, views: int = 5, num_examples: int = 40) -> tuple[Tensor, Tensor, Tensor]:
    random = torch.Generator().manual_seed(7)
    logits = 2 * torch.randn(1, num_examples, 6, generator=random) + torch.randn(
        views, num_examples, 6, generator=random
    )
    features = 3 + torch.randn(1, num_examples, 9, generator=random)
    features = features + 0.5 * torch.randn(views, num_examples, 9, generator=random)
    return logits, features, torch.randint(6, (num_examples,), generator=random)


def _by_numpy(logits: Tensor, features: Tensor, labels: Tensor) -> dict[str, float]:
    probabilities, values = softmax(logits.double().numpy(), axis=2), features.double().numpy()
    of_labels = probabilities[:, range(len(labels)), labels].mean(axis=1)
    return {
        "prediction_variance": probabilities.var(axis=0, ddof=1).sum(axis=1).mean(),
        "feature_variance": values.var(axis=0, ddof=1).sum(axis=1).mean() / values.mean(0).var(axis=0, ddof=1).sum(),
        "true_class_stddev": of_labels.std(ddof=1),
    }


def _information_by_numpy(logits: Tensor, labels: Tensor) -> float:
    probabilities = softmax(logits.double().numpy(), axis=1)
    means = {label: probabilities[labels.numpy() == label].mean(axis=0) for label in labels.tolist()}
    rows = zip(probabilities, labels.tolist(), strict=True)
    return float(np.mean([entropy(row, means[label]) for row, label in rows]))


@pytest.mark.parametrize("views", [2, 3, 8])
def test_view_figures_match_numpy(views: int) -> None:
    logits, features, labels = _example(views=views)
    assert view_figures(logits, features, labels) == pytest.approx(_by_numpy(logits, features, labels), rel=1e-5)


def test_view_figures_by_hand() -> None:
    # One example turns from (1/2, 1/2) to (3/4, 1/4), the other stays: 2 * (1/4)^2 / 2 of two examples.
    logits = torch.tensor([[[0.5, 0.5], [0.5, 0.5]], [[0.75, 0.25], [0.5, 0.5]]], dtype=torch.float64).log()
    features = torch.tensor([[[0.0], [10.0]], [[2.0], [10.0]]])
    figures = view_figures(logits, features, torch.tensor([0, 1]))
    assert figures["prediction_variance"] == pytest.approx(0.0625 / 2)
    assert figures["feature_variance"] == pytest.approx((2 + 0) / 2 / ((10 - 1) ** 2 / 2))
    assert figures["true_class_stddev"] == pytest.approx(0.125 / math.sqrt(2))  # means 1/2 and 5/8


def test_views_taken_in_one_at_a_time_give_the_same() -> None:
    logits, features, labels = _example()
    views = ViewFigures(labels)
    for view in range(5):
        views.add(logits[view], features[view])
        if view:
            expected = view_figures(logits[: view + 1], features[: view + 1], labels)
            assert views.figures() == expected


def test_view_figures_ignore_orders_and_units() -> None:
    logits, features, labels = _example()
    expected = view_figures(logits, features, labels)
    order = torch.randperm(40, generator=torch.Generator().manual_seed(1))
    assert view_figures(logits[:, order], features[:, order], labels[order]) == pytest.approx(expected)
    assert view_figures(logits.flip(0), features.flip(0), labels) == pytest.approx(expected)
    assert view_figures(logits + 2, 1000 * features - 5, labels) == pytest.approx(expected, rel=1e-4)


def test_a_network_that_ignores_views_has_no_variance() -> None:
    logits, features, labels = _example(views=1)
    figures = view_figures(logits.expand(4, -1, -1), features.expand(4, -1, -1), labels)
    assert figures == {"prediction_variance": 0, "feature_variance": 0, "true_class_stddev": 0}


def test_a_constant_network_has_no_variance() -> None:
    figures = view_figures(torch.full((3, 8, 2), 0.3), torch.full((3, 8, 5), 0.1), torch.zeros(8).long())
    assert figures == {"prediction_variance": 0, "feature_variance": 0, "true_class_stddev": 0}


def test_feature_variance_needs_examples_that_differ() -> None:
    features = torch.tensor([[[1.0]], [[2.0]]])
    logits = torch.zeros(2, 1, 2)
    assert view_figures(logits, features, torch.tensor([0]))["feature_variance"] is None
    twice = view_figures(logits.expand(2, 2, 2), features.expand(2, 2, 1), torch.tensor([0, 0]))
    assert twice["feature_variance"] is None


def test_variance_of_large_features_is_exact() -> None:
    logits, features, labels = _example()
    shifted = 1e6 + features.double()
    expected = _by_numpy(logits, features.double(), labels)["feature_variance"]
    assert view_figures(logits, shifted, labels)["feature_variance"] == pytest.approx(expected, rel=1e-6)


def test_views_of_extreme_logits_stay_finite() -> None:
    logits, features, labels = _example()
    figures = view_figures(1e30 * logits, 1e30 * features, labels)
    assert all(value is not None and math.isfinite(value) for value in figures.values())
    assert 0 <= figures["prediction_variance"] <= 2
    half = view_figures(logits.bfloat16(), features.bfloat16(), labels)
    assert half == pytest.approx(view_figures(logits, features, labels), rel=0.1)


@pytest.mark.parametrize(
    ("logits", "features", "message"),
    [
        (torch.zeros(1, 4, 3), torch.zeros(1, 4, 2), "at least 2 views, got 1"),
        (torch.zeros(0, 4, 3), torch.zeros(0, 4, 2), "at least 2 views, got 0"),
        (torch.zeros(4, 3), torch.zeros(2, 4, 2), r"shapes \[4, 3\] and \[2, 4, 2\]; wanted \[V, N, K\]"),
        (torch.zeros(2, 4, 3), torch.zeros(3, 4, 2), r"shapes \[2, 4, 3\] and \[3, 4, 2\]"),
        (torch.zeros(2, 5, 3), torch.zeros(2, 4, 2), r"shapes \[5, 3\] and \[4\]"),
        (torch.zeros(2, 4, 3), torch.zeros(2, 5, 2), r"features have shape \[5, 2\]; wanted \[4, D\]"),
        (torch.zeros(2, 4, 3), torch.zeros(2, 4, 0), "not empty"),
        (torch.zeros(2, 4, 2), torch.zeros(2, 4, 2), "labels run from 0 to 2; wanted 0 to 1"),
        (torch.full((2, 4, 3), math.nan), torch.zeros(2, 4, 2), "12 of 12 logits are NaN or infinite"),
        (torch.zeros(2, 4, 3), torch.full((2, 4, 2), math.inf), "a feature is NaN or infinite"),
    ],
)
def test_view_figures_refuse_what_does_not_fit(logits: Tensor, features: Tensor, message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        view_figures(logits, features, torch.tensor([0, 1, 2, 0]))
    assert "\n" not in str(caught.value)


def test_views_must_have_one_shape() -> None:
    views = ViewFigures(torch.zeros(4).long())
    views.add(torch.zeros(4, 3), torch.zeros(4, 2))
    with pytest.raises(InputError, match=r"logits have shape \[4, 5\] after views of \[4, 3\]"):
        views.add(torch.zeros(4, 5), torch.zeros(4, 2))
    with pytest.raises(InputError, match=r"features have shape \[4, 1\] after views of \[4, 2\]"):
        views.add(torch.zeros(4, 3), torch.zeros(4, 1))
    views.add(torch.zeros(4, 3), torch.zeros(4, 2))  # what was refused has left nothing behind
    assert views.figures() == {"prediction_variance": 0, "feature_variance": 0, "true_class_stddev": 0}


def test_information_matches_numpy() -> None:
    logits, _, labels = _example(views=1, num_examples=200)
    value = conditional_mutual_information(logits[0], labels, num_classes=6)
    assert value == pytest.approx(_information_by_numpy(logits[0], labels), rel=1e-4)


def test_information_by_hand() -> None:
    # Class 0: (1, 0) and (0, 1) around (1/2, 1/2), log 2 each; class 1: two that agree.
    logits = torch.tensor([[200.0, 0.0], [0.0, 200.0], [0.0, 1.0], [0.0, 1.0]])
    value = conditional_mutual_information(logits, torch.tensor([0, 0, 1, 1]), num_classes=2)
    assert value == pytest.approx(math.log(2) / 2, rel=1e-5)


def test_information_vanishes_where_each_class_has_one_prediction() -> None:
    labels = torch.arange(12) % 3
    for logits in (torch.full((12, 3), 0.7), torch.randn(3, 3, generator=torch.Generator().manual_seed(0))[labels]):
        assert conditional_mutual_information(logits, labels, num_classes=3) == pytest.approx(0, abs=1e-6)


def test_information_ignores_order_and_classes_without_examples() -> None:
    logits, _, labels = _example(views=1)
    labels = labels.clamp(max=3)
    expected = _information_by_numpy(logits[0], labels)
    order = torch.randperm(40, generator=torch.Generator().manual_seed(1))
    value = conditional_mutual_information(logits[0][order], labels[order], num_classes=6)
    assert value == pytest.approx(expected, rel=1e-4)


def test_information_is_at_most_the_logarithm_of_a_class_s_examples_and_falls_short_with_few() -> None:
    sure = 1e3 * torch.eye(8)
    for count in (1, 2, 5, 8):
        value = conditional_mutual_information(sure[:count], torch.zeros(count).long(), num_classes=8)
        assert value == pytest.approx(math.log(count), abs=1e-6)  # each another class
    assert conditional_mutual_information(sure.repeat(3, 1), torch.zeros(24).long(), num_classes=8) == pytest.approx(
        math.log(8)
    )
    # In the mean over parts of one class, the fewer examples each part has, the smaller is the value.
    logits, means = torch.randn(1000, 8, generator=torch.Generator().manual_seed(0)), list[float]()
    for count in (2, 5, 20, 1000):
        labels = torch.zeros(count).long()
        parts = [conditional_mutual_information(part, labels, num_classes=8) for part in logits.split(count)]
        means.append(sum(parts) / len(parts))
    assert means == sorted(means)
    assert means[0] < 0.7 * means[-1]


@pytest.mark.parametrize("views", [2, 3, 6])
def test_prediction_variance_is_at_most_one(views: int) -> None:
    logits = 1e3 * torch.eye(6)[:views].unsqueeze(1)  # each view is sure of another class
    figures = view_figures(logits, torch.ones(views, 1, 1), torch.tensor([0]))
    assert figures["prediction_variance"] == pytest.approx(1)


def test_information_of_logits_whose_difference_overflows_is_finite() -> None:
    logits = torch.tensor([[3e38, -3e38], [-3e38, 3e38]])
    value = conditional_mutual_information(logits, torch.tensor([0, 0]), num_classes=2)
    assert value == pytest.approx(math.log(2))


def test_information_takes_labels_of_any_integer_type() -> None:
    logits, _, labels = _example(views=1)
    expected = conditional_mutual_information(logits[0], labels, num_classes=6)
    value = conditional_mutual_information(logits[0].requires_grad_(), labels.to(torch.uint8), num_classes=6)
    assert value == expected


@pytest.mark.parametrize("scale", [1e4, 1e30])
def test_information_of_extreme_logits_is_finite(scale: float) -> None:
    logits, _, labels = _example(views=1)
    value = conditional_mutual_information(scale * logits[0], labels, num_classes=6)
    assert 0 <= value <= math.log(6)
    assert value == pytest.approx(_information_by_numpy(scale * logits[0], labels), rel=1e-3)


@pytest.mark.parametrize(
    ("logits", "labels", "message"),
    [
        (torch.zeros(4, 3), torch.zeros(5).long(), r"shapes \[4, 3\] and \[5\]"),
        (torch.zeros(0, 3), torch.zeros(0).long(), "not empty"),
        (torch.zeros(4, 3), torch.tensor([0, 1, 2, 3]), "labels run from 0 to 3"),
        (torch.full((4, 3), math.nan), torch.zeros(4).long(), "12 of 12 logits are NaN or infinite"),
        (torch.zeros(4, 4), torch.zeros(4).long(), r"3 classes need logits \[B, 3\], got \[4, 4\]"),
    ],
)
def test_information_refuses_what_does_not_fit(logits: Tensor, labels: Tensor, message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        conditional_mutual_information(logits, labels, num_classes=3)
    assert "\n" not in str(caught.value)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_view_figures_on_a_gpu_are_those_of_the_cpu() -> None:
    logits, features, labels = _example()
    expected = view_figures(logits, features, labels)
    assert view_figures(logits.cuda(), features.cuda(), labels.cuda()) == pytest.approx(expected, rel=1e-4)
    on_gpu = conditional_mutual_information(logits[0].cuda(), labels, num_classes=6)
    assert on_gpu == pytest.approx(conditional_mutual_information(logits[0], labels, num_classes=6), rel=1e-4)
