"""How steady a network is: over augmented views of an example, and over the examples of a class."""

from __future__ import annotations

from typing import final

import torch
from torch import Tensor

from soteacher import metrics
from soteacher.diagnostics.calibration import log_probabilities
from soteacher.errors import InputError
from soteacher.objectives.teacher.class_information import class_centroids, divergence_from_centroids


@final
class ViewFigures:
    r"""What a network does on several augmented views of the same examples, taken in one view at a time.

    Views are not kept: what is kept are their means, 8 N (K + D) bytes on the CPU, however many they are. All sums are
    in float64 and updated after Welford 1962, so what does not vary has a variance of exactly 0.
    """

    def __init__(self, labels: Tensor) -> None:
        """Start without any view.

        Args:
            labels: ``[N]`` class ids of the examples.
        """
        self._labels = labels.detach().cpu()
        self._predictions = _Spread()
        self._features = _Spread()
        self._true_class: list[float] = []

    def add(self, logits: Tensor, features: Tensor) -> None:
        """Take in what the network returned for one view of all examples, in the order of the labels.

        Args:
            logits: ``[N, K]``.
            features: ``[N, D]`` of any layer, usually the classifier's input.

        Raises:
            InputError: shapes that do not fit the labels or the views before, a class id out of range, or a value that
                is not finite.
        """
        metrics.check_predictions(logits.cpu(), self._labels)
        probabilities = log_probabilities(logits).exp().cpu().double()
        if features.ndim != 2 or features.shape[0] != len(self._labels) or features.numel() == 0:
            raise InputError(f"features have shape {list(features.shape)}; wanted [{len(self._labels)}, D], not empty")
        if not bool(features.isfinite().all()):
            raise InputError("a feature is NaN or infinite; wanted finite ones")
        self._predictions.check(probabilities, "logits")
        self._features.check(features, "features")
        self._predictions.add(probabilities)
        self._features.add(features.detach().cpu().double())
        of_labels = probabilities.gather(1, self._labels.long().unsqueeze(1))
        self._true_class.append(of_labels.mean().item())

    def figures(self) -> dict[str, float | None]:
        r"""Return the figures of the views so far; :math:`v` runs over V views and :math:`i` over N examples.

        .. math::
            \text{prediction variance: } \frac{1}{N} \sum_i \sum_k \mathrm{var}_v \, p_{vik}, \qquad
            \text{feature variance: } \frac{\frac{1}{N} \sum_i \sum_d \mathrm{var}_v \, f_{vid}}
            {\sum_d \mathrm{var}_i \, \frac{1}{V} \sum_v f_{vid}}, \qquad
            \text{true-class deviation: } \mathrm{std}_v \, \frac{1}{N} \sum_i p_{v i y_i}

        All variances are the unbiased ones, with V - 1 and N - 1. The denominator is that of the means over V views,
        which holds 1 / V of the variance over views: compare networks over equally many views.

        Returns:
            ``prediction_variance``, in [0, 1]; ``feature_variance``, without a unit: what views do to the features
            of an example, as a share of how far examples lie apart, 0 where no feature varies over the views, and None
            where they do but the examples have equal means or there is only one; ``true_class_stddev``.

        Raises:
            InputError: fewer than two views.

        Source of the true-class deviation: the "T. stddev" of Wang et al., NeurIPS 2022, arXiv:2012.02909. The authors'
        code takes the mean probabilities of the whole vector over ten mini-batches (of five where nothing is mixed),
        again with other examples, until training ends, and averages their standard deviation over the classes. Here
        each view is of the same examples and only the labels' probability counts, so what the choice of the examples
        adds is left out. It shrinks with :math:`1 / \sqrt{N}`: compare networks on equally many examples.
        """
        views = len(self._true_class)
        if views < 2:
            raise InputError(f"figures over augmented views need at least 2 views, got {views}")
        within = self._features.variance_within()
        between = self._features.variance_between()
        return {
            "prediction_variance": self._predictions.variance_within(),
            "feature_variance": 0.0 if within == 0 else within / between if between > 0 else None,
            "true_class_stddev": torch.tensor(self._true_class, dtype=torch.float64).std().item(),
        }


def view_figures(logits: Tensor, features: Tensor, labels: Tensor) -> dict[str, float | None]:
    """Return :meth:`ViewFigures.figures` of views that are all at hand.

    Args:
        logits: ``[V, N, K]``.
        features: ``[V, N, D]``.
        labels: ``[N]`` class ids.

    Raises:
        InputError: fewer than two views, or what :meth:`ViewFigures.add` refuses.
    """
    if logits.ndim != 3 or features.ndim != 3 or logits.shape[0] != features.shape[0]:
        shapes = f"{list(logits.shape)} and {list(features.shape)}"
        raise InputError(f"logits and features of views have shapes {shapes}; wanted [V, N, K] and [V, N, D]")
    views = ViewFigures(labels)
    for view_logits, view_features in zip(logits, features, strict=True):
        views.add(view_logits, view_features)
    return views.figures()


def conditional_mutual_information(logits: Tensor, labels: Tensor, *, num_classes: int) -> float:
    r"""Return how much predictions tell of an example beyond its class, in nats: 0 where each class has one prediction.

    .. math:: \frac{1}{N} \sum_i \mathrm{KL}(p_i \,\|\, Q_{y_i}), \qquad
        Q_y = \frac{1}{N_y} \sum_{i : y_i = y} p_i

    The mean prediction :math:`Q_y` of a class holds the very example that is compared with it: with few examples of a
    class the value is too small, and it is 0 with one. Compare it only between equal numbers of examples of each class.

    Args:
        logits: ``[N, K]``.
        labels: ``[N]`` class ids.
        num_classes: K.

    Returns:
        A number of at least 0. A class with :math:`N_y` examples adds at most :math:`\min(\log K, \log N_y)` for each.

    Raises:
        InputError: wrong shapes, types or class ids, logits that are not finite, or ``num_classes`` is not their K.

    Source: Ye et al., ICLR 2024, arXiv:2401.08732; see ``objectives/teacher/class_information.py``.
    """
    metrics.check_predictions(logits, labels)
    predictions = log_probabilities(logits)  # logits of the same predictions, and finite ones
    labels = labels.to(logits.device, torch.int64)
    centroids = class_centroids(predictions, labels, num_classes=num_classes)
    divergences = divergence_from_centroids(predictions, labels, centroids)
    return max(0.0, divergences.cpu().double().mean().item())  # rounding may leave less


@final
class _Spread:
    """Running means of ``[N, D]`` values over views, and the squared distances of the views from them."""

    def __init__(self) -> None:
        self.count = 0
        self.mean = torch.zeros(0, dtype=torch.float64)
        self.squares = torch.zeros(0, dtype=torch.float64)

    def check(self, values: Tensor, name: str) -> None:
        if self.count and values.shape != self.mean.shape:
            shapes = f"{list(values.shape)} after views of {list(self.mean.shape)}"
            raise InputError(f"{name} have shape {shapes}; wanted one shape for all views")

    def add(self, values: Tensor) -> None:
        if not self.count:
            self.mean, self.squares = torch.zeros_like(values), torch.zeros_like(values[:, 0])
        self.count += 1
        step = values - self.mean
        self.mean = self.mean + step / self.count
        self.squares = self.squares + (step * (values - self.mean)).sum(dim=1)

    def variance_within(self) -> float:
        """Return the variance over the views, summed over D, mean over N."""
        return self.squares.mean().item() / (self.count - 1)

    def variance_between(self) -> float:
        """Return the variance of the means over the examples, summed over D; 0 for a single example."""
        if len(self.mean) < 2:
            return 0.0
        return (self.mean - self.mean[0]).var(dim=0).sum().item()  # from one of them, so that equal ones have exactly 0
