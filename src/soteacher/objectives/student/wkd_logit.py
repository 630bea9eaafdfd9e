"""Wasserstein distance of predictions (WKD-L): mass may move between classes, and less far between related ones."""

from __future__ import annotations

import math
from typing import ClassVar, final

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from soteacher.errors import InputError
from soteacher.objective import Method, Objective, ObjectiveConfig
from soteacher.objectives.features import teacher_parts
from soteacher.objectives.student.class_logits import check_logits, check_positive, target_logits
from soteacher.precision import at_least_float32, full_precision
from soteacher.types import DistillStep, Task

_NO_LOGIT = -1e9
"""Stands for a class that is left out; finite, so that no difference of two of them is NaN."""


def class_cost(class_weights: Tensor, *, sharpness: float) -> Tensor:
    r"""Cost of moving probability from one class to another, by the angle of the classes' prototypes.

    .. math:: C_{jk} = 1 - e^{-\kappa (1 - \cos(w_j, w_k))}

    Args:
        class_weights: ``[K, D]``, one prototype a class, such as the rows of a classifier's weight; a constant.
        sharpness: :math:`\kappa > 0`, dimensionless.

    Returns:
        ``[K, K]``, in [0, 1), symmetric, 0 on the diagonal; float32 (float64 from float64 weights).

    Raises:
        InputError: the weights are not ``[K, D]``, or the sharpness is not positive.

    Source: Lv, Yang and Li, NeurIPS 2024, arXiv:2412.08139. The authors' code, read in a public copy of it, relates
    classes on CIFAR-100 by the centred kernel alignment (CKA) of what the teacher makes of all training images, found
    beforehand; this is its other choice, which needs no pass over the data.
    """
    if class_weights.ndim != 2:
        raise InputError(f"prototypes must be [K, D], got {list(class_weights.shape)}")
    check_positive(sharpness=sharpness)
    with full_precision(class_weights):
        directions = F.normalize(at_least_float32(class_weights.detach()), dim=-1)
        distance = (1 - directions @ directions.T).clamp(min=0)
    return -torch.expm1(-sharpness * distance).fill_diagonal_(0)


def sinkhorn_distance(
    log_first: Tensor, log_second: Tensor, cost: Tensor, *, regularization: float, num_iterations: int
) -> Tensor:
    r"""Cost of the regularised transport between two distributions, one value per example.

    .. math:: \langle P, C \rangle, \quad P = \operatorname{diag}(u) \, e^{-C / \lambda} \operatorname{diag}(v),
        \quad P \mathbf 1 = a, \quad P^\top \mathbf 1 \approx b

    Sinkhorn's iterations, on the logarithms of :math:`u` and :math:`v`: each makes :math:`P` fit :math:`b`, then
    :math:`a`. The smaller :math:`\lambda`, the nearer to the Wasserstein distance, and the more iterations it takes.

    Args:
        log_first: ``[B, K]`` logarithms of :math:`a`; gradients flow, through the iterations.
        log_second: ``[B, K]`` logarithms of :math:`b`; gradients flow.
        cost: :math:`C`, ``[K, K]``, at least 0.
        regularization: :math:`\lambda > 0`. The largest cost may be about 60 times as large in single precision, and
            600 times in double precision: beyond, :math:`e^{-C / \lambda}` is 0.
        num_iterations: at least 1.

    Returns:
        ``[B]``, float32 (float64 from float64 input); at least 0.

    Raises:
        InputError: the shapes do not fit, or a number is out of its range.

    Source: Cuturi 2013, arXiv:1306.0895; as Lv, Yang and Li use it, NeurIPS 2024, arXiv:2412.08139. The authors' code
    iterates on :math:`u` and :math:`v` themselves, with 1e-8 added to denominators, and a matrix of costs for each
    example; here all share one.
    """
    _check_transport(log_first, log_second, cost, regularization, num_iterations)
    first, second = at_least_float32(log_first), at_least_float32(log_second)
    cost = at_least_float32(cost)
    with full_precision(first):
        kernel = torch.exp(-cost / regularization)
        log_u = torch.zeros_like(first)
        log_v = torch.zeros_like(second)
        for _ in range(num_iterations):
            log_v = second - _log_product(log_u, kernel)
            log_u = first - _log_product(log_v, kernel.T)
        return torch.exp(log_u + _log_product(log_v, (kernel * cost).T)).sum(dim=-1)


def _check_transport(first: Tensor, second: Tensor, cost: Tensor, regularization: float, num_iterations: int) -> None:
    if first.ndim != 2 or first.shape != second.shape or cost.shape != (first.shape[-1], first.shape[-1]):
        raise InputError(
            f"wanted two distributions [B, K] and costs [K, K], got {list(first.shape)}, {list(second.shape)} and "
            f"{list(cost.shape)}"
        )
    check_positive(regularization=regularization)
    if num_iterations < 1:
        raise InputError(f"num_iterations must be at least 1, got {num_iterations}")


def _log_product(log_vectors: Tensor, matrix: Tensor) -> Tensor:
    """Return ``log(exp(log_vectors) @ matrix)``, ``[B, K]``; as large as the vectors are, nothing overflows."""
    largest = log_vectors.detach().amax(dim=-1, keepdim=True)
    product = torch.exp(log_vectors - largest) @ matrix
    return largest + torch.log(product.clamp(min=torch.finfo(product.dtype).tiny))


def wkd_logit_distance(
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor,
    cost: Tensor,
    *,
    temperature: float,
    transport_weight: float,
    regularization: float,
    num_iterations: int,
) -> Tensor:
    r"""Cross-entropy in the label's class, and the transport of the others' softened predictions, for each example.

    .. math:: -p_{t,y} \log p_{s,y} + \gamma \, W_\lambda(q_s, q_t), \qquad
        q_k \propto [k \ne y] \, e^{z_k / \tau}

    with :math:`p` at temperature 1 and :math:`W_\lambda` the :func:`sinkhorn_distance`.

    Args:
        student_logits: ``[B, K]``; gradients flow.
        teacher_logits: ``[B, K]``; a constant.
        labels: ``[B]`` int64 class ids.
        cost: ``[K, K]`` of moving probability between classes, such as :func:`class_cost`.
        temperature: :math:`\tau > 0`, dimensionless.
        transport_weight: :math:`\gamma \ge 0`.
        regularization: see :func:`sinkhorn_distance`.
        num_iterations: see :func:`sinkhorn_distance`.

    Returns:
        ``[B]``, float32 (float64 from float64 logits); positive also where the two agree.

    Raises:
        InputError: the shapes do not fit, or a number is out of its range.

    Source: Lv, Yang and Li, NeurIPS 2024, arXiv:2412.08139; which parts are softened as in the authors' code.
    """
    check_logits(student_logits, teacher_logits, labels)
    check_positive(temperature=temperature)
    student, teacher = at_least_float32(student_logits), at_least_float32(teacher_logits.detach())
    target = target_logits(teacher.softmax(dim=1), labels) * target_logits(F.log_softmax(student, dim=1), labels)
    # The label's class stays, with no mass, so that all examples share one matrix of costs.
    classes = labels.long()[:, None]
    others = [F.log_softmax((z / temperature).scatter(1, classes, _NO_LOGIT), dim=1) for z in (student, teacher)]
    transport = sinkhorn_distance(
        others[0], others[1], cost, regularization=regularization, num_iterations=num_iterations
    )
    return transport_weight * transport - target


class WKDLogitConfig(ObjectiveConfig):
    """Settings of :class:`WKDLogit`."""

    needs_teacher: ClassVar[bool] = True
    standardizable: ClassVar[bool] = True
    temperature: float = Field(default=8.0, gt=0)
    """Softening of both predictions over the classes other than the label's, dimensionless."""
    transport_weight: float = Field(default=800.0, ge=0)
    """Factor of the transport between the other classes."""
    decay_start: float = Field(default=0.625, ge=0, le=1)
    """The share of the run after which that factor falls to 0 along half a cosine; 1: never."""
    regularization: float = Field(default=0.05, ge=0.02)
    """Entropic regularisation of the transport, in units of the cost, whose largest value is below 1."""
    num_iterations: int = Field(default=10, ge=1)
    """Sinkhorn's iterations."""
    sharpness: float = Field(default=1.0, gt=0)
    """How fast the cost grows with the angle between two classes' weights, dimensionless."""

    def build(self, task: Task) -> WKDLogit:
        """Return the objective; it needs nothing from the task."""
        del task
        return WKDLogit(self)


@final
class WKDLogit(Objective[DistillStep]):
    """Move the student's predictions to the teacher's; see :func:`wkd_logit_distance`.

    How classes relate is read from the weights of the teacher's classifier; see :func:`class_cost`.
    """

    name = "wkd_logit"

    def __init__(self, config: WKDLogitConfig) -> None:
        super().__init__()
        self.config = config

    def forward(self, step: DistillStep) -> Tensor:
        """Return the mean of the batch."""
        return wkd_logit_distance(
            step.outputs.logits,
            step.teacher.logits,
            step.labels,
            class_cost(teacher_parts(step).classifier.weight, sharpness=self.config.sharpness),
            temperature=self.config.temperature,
            transport_weight=self.config.transport_weight * self._decay(step),
            regularization=self.config.regularization,
            num_iterations=self.config.num_iterations,
        ).mean()

    def _decay(self, step: DistillStep) -> float:
        """Return the share of the transport's factor that is in force in the step's epoch."""
        late = step.epoch / step.num_epochs - self.config.decay_start
        return (1 + math.cos(math.pi * late / (1 - self.config.decay_start))) / 2 if late > 0 else 1.0


METHOD = Method(
    name="wkd_logit",
    role="student",
    title="Wasserstein distance of predictions: probability may move between related classes",
    venue="NeurIPS 2024",
    source="Lv, Yang and Li, NeurIPS 2024, arXiv:2412.08139 (WKD-L); settings of its code for one CIFAR-100 pair",
    differs=(
        "Classes are related by the cosine of the teacher's classifier weights, which the authors' code offers; its "
        "CIFAR-100 runs relate them by the CKA of the teacher's features of the whole training set. Sinkhorn's "
        "iterations run on logarithms. The weight fades one epoch later."
    ),
    terms={"cross_entropy": {"weight": 1.0}, "wkd_logit": {"weight": 1.0}},
)
