"""Evaluation of a classifier on a split."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from soteacher import metrics
from soteacher.types import Batch


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation:
    """What a classifier does on a split."""

    accuracy: float
    """Share of the examples whose largest logit is their label's, in [0, 1]."""
    nll: float
    """Mean negative log-likelihood of the labels, nats."""
    ece: float
    """Expected calibration error over 15 equal bins of confidence, in [0, 1]."""
    reliability: list[dict[str, float | int | None]]
    """Those bins; see :func:`soteacher.metrics.reliability_bins`."""


@torch.no_grad()
def predict(classifier: nn.Module, batches: Iterable[Batch]) -> tuple[Tensor, Tensor]:
    """Return the logits ``[N, K]`` and labels ``[N]`` of a split, in its order, in float32 and evaluation mode.

    The network's mode is put back afterwards.
    """
    was_training = classifier.training
    classifier.eval()
    try:
        pairs = [(classifier(batch.images).float(), batch.labels) for batch in batches]
    finally:
        classifier.train(was_training)
    logits, labels = zip(*pairs, strict=True)
    return torch.cat(logits), torch.cat(labels)


def evaluate(classifier: nn.Module, batches: Iterable[Batch]) -> Evaluation:
    """Return the figures of a classifier on a split."""
    logits, labels = predict(classifier, batches)
    return Evaluation(
        accuracy=metrics.accuracy(logits, labels),
        nll=metrics.negative_log_likelihood(logits, labels),
        ece=metrics.expected_calibration_error(logits, labels),
        reliability=metrics.reliability_bins(logits, labels),
    )
