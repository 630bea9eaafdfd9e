"""Class-conditional mutual information: how far predictions are spread around the mean prediction of their class."""

from __future__ import annotations

from typing import ClassVar, final

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from soteacher.errors import InputError
from soteacher.objective import Objective, ObjectiveConfig
from soteacher.precision import at_least_float32, full_precision
from soteacher.types import Step, Task

FLOOR = 1e-12
"""Smaller entries of a centroid count as this: the logarithm and its gradient stay finite."""


def divergence_from_centroids(logits: Tensor, labels: Tensor, centroids: Tensor) -> Tensor:
    r"""Divergence of each prediction from the mean prediction of its class, one value per example.

    .. math:: \mathrm{KL}\left(\sigma(z_i) \,\|\, Q_{y_i}\right)
        = \sum_k \sigma(z_i)_k \left[ \log \sigma(z_i)_k - \log \max(Q_{y_i k}, 10^{-12}) \right]

    Where :math:`Q_y` is the mean of these very predictions, the mean over all examples is the conditional mutual
    information :math:`I(X; \hat Y \mid Y)` of input and prediction, given the label. There
    :math:`Q_{y k} \ge \sigma(z_i)_k / n_y` for each of the :math:`n_y` examples of a class, so that no value is above
    :math:`\log n_y` and the floor changes nothing that single precision can show. From other centroids a prediction can
    be any distance away, up to the floor's 27.6 nats.

    Args:
        logits: ``[B, K]``; gradients flow.
        labels: ``[B]`` integer class ids in [0, K). Their values are not checked here: a GPU would have to wait for it.
        centroids: ``[K, K]``, row y the distribution :math:`Q_y`; constants.

    Returns:
        ``[B]``, nats, at least 0 but for rounding, float32 (float64 from float64 logits); 0 where a prediction is its
        class's centroid. From uniform centroids it is :math:`\log K` less the prediction's entropy.

    Raises:
        InputError: the shapes do not fit, or the labels are not class ids.

    Source: Ye et al., ICLR 2024, arXiv:2401.08732, the empirical conditional mutual information; the floor is ours.
    """
    _check(logits, labels)
    if centroids.shape != (logits.shape[1],) * 2:
        raise InputError(f"centroids must be [K, K] for logits {list(logits.shape)}, got {list(centroids.shape)}")
    log_predictions = F.log_softmax(at_least_float32(logits), dim=-1)
    log_centroids = centroids.detach()[labels].to(log_predictions.dtype).clamp(min=FLOOR).log()
    return F.kl_div(log_centroids, log_predictions, reduction="none", log_target=True).sum(dim=-1)


def class_centroids(logits: Tensor, labels: Tensor, *, num_classes: int) -> Tensor:
    r"""Mean prediction of the examples of each class.

    .. math:: Q_y = \frac{1}{n_y} \sum_{i: y_i = y} \sigma(z_i)

    Args:
        logits: ``[B, K]``; gradients flow.
        labels: ``[B]`` integer class ids in [0, K).
        num_classes: K.

    Returns:
        ``[K, K]``, row y the distribution of class y, float32 (float64 from float64 logits). A class without examples
        has the uniform distribution: nothing is known of it.

    Raises:
        InputError: the shapes do not fit, or the labels are not class ids below ``num_classes``.

    Source: Ye et al., ICLR 2024, arXiv:2401.08732, the empirical centroid of a class's cluster.
    """
    _check(logits, labels)
    if logits.shape[1] != num_classes:
        raise InputError(f"{num_classes} classes need logits [B, {num_classes}], got {list(logits.shape)}")
    if labels.numel() and (labels.min() < 0 or labels.max() >= num_classes):
        came = f"{int(labels.min())} to {int(labels.max())}"
        raise InputError(f"labels must be class ids from 0 to {num_classes - 1}, got {came}")
    means, counts = _class_means(logits, labels)
    return torch.where(counts.unsqueeze(-1) > 0, means, 1 / num_classes)


def running_centroids(
    centroids: Tensor, counts: Tensor, logits: Tensor, labels: Tensor, *, momentum: float
) -> tuple[Tensor, Tensor]:
    r"""Centroids that have taken in a batch, and how many examples of each class they have seen.

    .. math::

        Q_y \leftarrow Q_y + r_y (\bar p_y - Q_y), \qquad
        r_y = \max\left(1 - m^{n_y}, \; \frac{n_y}{N_y + n_y}\right)

    where :math:`\bar p_y` is the mean prediction of the batch's :math:`n_y` examples of class y and :math:`N_y` counts
    those before. So the centroid is the mean of all examples until there are about :math:`1 / (1 - m)` of them, and
    from then on a mean over about the last so many. How they fall into batches does not matter for its pace. Classes
    that the batch does not show keep their centroid.

    Args:
        centroids: ``[K, K]``; a row that has seen nothing is replaced, whatever it holds.
        counts: ``[K]`` integers :math:`N_y \ge 0`.
        logits: ``[B, K]``.
        labels: ``[B]`` integer class ids in [0, K), unchecked.
        momentum: :math:`m` in [0, 1], of a single example; 1 gives the mean of all examples ever.

    Returns:
        The new centroids ``[K, K]`` and counts ``[K]``.

    Raises:
        InputError: the shapes do not fit, the labels are not class ids, or ``momentum`` is outside [0, 1].
    """
    _check(logits, labels)
    if centroids.shape != (logits.shape[1],) * 2 or counts.shape != centroids.shape[:1]:
        raise InputError(
            f"centroids must be [K, K] and counts [K] for logits {list(logits.shape)}, got {list(centroids.shape)} and "
            f"{list(counts.shape)}"
        )
    if not 0 <= momentum <= 1:
        raise InputError(f"momentum must be in [0, 1], got {momentum}")
    means, new = _class_means(logits, labels)
    total, number = counts + new, new.to(means.dtype)
    rate = torch.maximum(1 - momentum**number, number / total.clamp(min=1)).unsqueeze(-1)
    return centroids + rate.to(centroids.dtype) * (means.to(centroids.dtype) - centroids), total


def _check(logits: Tensor, labels: Tensor) -> None:
    if logits.ndim != 2 or labels.shape != logits.shape[:1]:
        raise InputError(
            f"class information needs logits [B, K] and labels [B], got {list(logits.shape)} and {list(labels.shape)}"
        )
    if labels.is_floating_point():
        raise InputError(f"labels must be integer class ids, got {labels.dtype}")


def _class_means(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Return the mean prediction ``[K, K]`` of each class, zeros where it has no example, and their numbers ``[K]``."""
    predictions = at_least_float32(logits).softmax(dim=-1)
    members = labels.unsqueeze(-1) == torch.arange(logits.shape[1], device=labels.device)
    counts = members.sum(dim=0)
    with full_precision(predictions):  # a product adds in the same order each time, as adding by index on a GPU may not
        sums = members.to(predictions.dtype).T @ predictions
    return sums / counts.clamp(min=1).unsqueeze(-1), counts


class ClassInformationConfig(ObjectiveConfig):
    """Settings of :class:`ClassInformation`."""

    momentum: float = Field(default=0.998, ge=0, lt=1)
    """How much of a centroid one further example of its class leaves; 0.998 is a mean over about the last 500."""

    def build(self, task: Task) -> ClassInformation:
        """Return the objective with uniform centroids."""
        return ClassInformation(self, task)


@final
class ClassInformation(Objective[Step]):
    r"""Spread the predictions of each class: minus the conditional mutual information, its centroids kept current.

    .. math:: - \frac{1}{B} \sum_i \mathrm{KL}\left(\sigma(z_i) \,\|\, Q_{y_i}\right)

    Weights are positive, so it is the objective that has the sign: its value is at most 0, and less is more
    information. See :func:`divergence_from_centroids`. Centroids begin as the exact means over the training examples,
    taken in by the survey before the first step, and go on with each batch; see :func:`running_centroids`. Where nobody
    surveys, a class's centroid is uniform until its first example.

    The value is bounded below. A prediction that its class's centroid holds with the share :math:`s` is at most
    :math:`\log 1/s` away, and a centroid that is kept current holds the likes of all recent predictions: as long as an
    example is predicted much as an epoch ago, of about 500 of its class, that is about 7 nats.
    """

    name = "class_information"
    surveys: ClassVar[bool] = True
    centroids: Tensor
    """``[K, K]`` float32 running mean prediction of each class."""
    counts: Tensor
    """``[K]`` int64 number of examples of each class that have been seen."""

    def __init__(self, config: ClassInformationConfig, task: Task) -> None:
        super().__init__()
        self.config = config
        self.register_buffer("centroids", torch.full((task.num_classes,) * 2, 1 / task.num_classes))
        self.register_buffer("counts", torch.zeros(task.num_classes, dtype=torch.int64))

    def forward(self, step: Step) -> Tensor:
        """Return minus the mean divergence of the batch, from the centroids before this step."""
        return -divergence_from_centroids(step.outputs.logits, step.labels, self.centroids).mean()

    def survey(self, step: Step) -> None:
        """Take a batch of the training examples into the means."""
        self._take_in(step, momentum=1.0)

    def update(self, step: Step) -> None:
        """Take this step's predictions into the centroids of its classes."""
        self._take_in(step, momentum=self.config.momentum)

    @torch.no_grad()
    def _take_in(self, step: Step, *, momentum: float) -> None:
        self.centroids, self.counts = running_centroids(
            self.centroids, self.counts, step.outputs.logits, step.labels, momentum=momentum
        )
