"""Curriculum temperature: the temperature is learned against the student, the more so the further the run is."""

from __future__ import annotations

import math
from typing import ClassVar, final

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from soteacher.errors import InputError
from soteacher.objective import Method, Objective, ObjectiveConfig
from soteacher.objectives.student.class_logits import check_logits, check_positive
from soteacher.precision import at_least_float32
from soteacher.types import DistillStep, Task


def divergence_at_temperature(student_logits: Tensor, teacher_logits: Tensor, temperature: Tensor) -> Tensor:
    r"""Divergence of knowledge distillation whose temperature can be learned, one value per example.

    .. math:: \tau^2 \, \mathrm{KL}\left(\sigma(z_t / \tau) \,\|\, \sigma(z_s / \tau)\right)

    Args:
        student_logits: ``[B, K]``; gradients flow.
        teacher_logits: ``[B, K]``; a constant.
        temperature: :math:`\tau`, a positive scalar, dimensionless; gradients flow, through the teacher's distribution
            and through :math:`\tau^2` too. Its value is not checked: a GPU would have to wait for it.

    Returns:
        ``[B]``, nats times :math:`\tau^2`, float32 (float64 from float64 logits); 0 where the two agree. The value is
        that of ``kd_divergence``.

    Raises:
        InputError: the logits' shapes differ, or ``temperature`` is no scalar.

    Source: Li et al., AAAI 2023, arXiv:2211.16231, equation 1.
    """
    check_logits(student_logits, teacher_logits)
    if temperature.ndim:
        raise InputError(f"temperature must be a scalar, got a tensor of shape {list(temperature.shape)}")
    log_student = F.log_softmax(at_least_float32(student_logits) / temperature, dim=1)
    log_teacher = F.log_softmax(at_least_float32(teacher_logits.detach()) / temperature, dim=1)
    return temperature.square() * F.kl_div(log_student, log_teacher, reduction="none", log_target=True).sum(dim=1)


def bounded_temperature(position: Tensor, *, lowest_temperature: float, temperature_range: float) -> Tensor:
    r"""Return the temperature that a learned number stands for.

    .. math:: \tau = \tau_0 + \tau_r \, \mathrm{sigmoid}(u)

    Args:
        position: :math:`u`, any shape; gradients flow.
        lowest_temperature: :math:`\tau_0 > 0`.
        temperature_range: :math:`\tau_r > 0`.

    Returns:
        Of the same shape, in :math:`(\tau_0, \tau_0 + \tau_r)`.

    Raises:
        InputError: a number is not positive and finite.

    Source: Li et al., AAAI 2023, arXiv:2211.16231, section on the learnable temperature module.
    """
    check_positive(lowest_temperature=lowest_temperature, temperature_range=temperature_range)
    return lowest_temperature + temperature_range * position.sigmoid()


def reversal_strength(*, epoch: int, num_epochs: int, curriculum: float) -> float:
    r"""Return how strongly the temperature works against the student during an epoch.

    .. math::
        \lambda = \frac{1 - \cos(\pi r)}{2}, \qquad
        r = \min\left(1, \frac{\text{epoch} + 1}{\text{curriculum} \cdot \text{num\_epochs}}\right)

    Args:
        epoch: from 0.
        num_epochs: length of the run.
        curriculum: share of the run over which it grows, in (0, 1].

    Returns:
        In (0, 1].

    Raises:
        InputError: ``curriculum`` is outside (0, 1].

    Source: Li et al., AAAI 2023, arXiv:2211.16231, section on the curriculum; as in the authors' code the first epoch
    counts as 1. There the strength grows over 10 epochs of 240.
    """
    if not 0 < curriculum <= 1:
        raise InputError(f"curriculum must be in (0, 1], got {curriculum}")
    return (1 - math.cos(math.pi * min(1.0, (epoch + 1) / (curriculum * num_epochs)))) / 2


def reversed_gradient(tensor: Tensor, *, strength: float) -> Tensor:
    r"""Return a tensor as it is, whose gradient is turned round and scaled on the way back.

    .. math:: f(u) = u, \qquad f'(u) = -\lambda

    Args:
        tensor: any shape; the gradient that reaches it is :math:`-\lambda` times the one that comes.
        strength: :math:`\lambda`.

    Returns:
        The same values, of the same shape.

    Source: Ganin and Lempitsky, ICML 2015, arXiv:1409.7495.
    """
    # The difference is exactly 0 and has the gradient -1: no function with a backward pass of its own is needed, which
    # compilation could not look into.
    return tensor.detach() + strength * (tensor.detach() - tensor)


class CTKDConfig(ObjectiveConfig):
    """Settings of :class:`CTKD`."""

    needs_teacher: ClassVar[bool] = True
    standardizable: ClassVar[bool] = True
    lowest_temperature: float = Field(default=1.0, gt=0)
    """Lower bound of the learned temperature, dimensionless."""
    temperature_range: float = Field(default=20.0, gt=0)
    """How far above the lower bound the temperature can get."""
    curriculum: float = Field(default=10 / 240, gt=0, le=1)
    """Share of the run over which the temperature's work against the student grows to its full strength."""

    def build(self, task: Task) -> CTKD:
        """Return the objective; it needs nothing from the task."""
        del task
        return CTKD(self)


@final
class CTKD(Objective[DistillStep]):
    """Match the teacher's predictions, softened as is hardest for the student; see :func:`divergence_at_temperature`.

    One number is learned for all examples, by the optimiser of the network and with its weight decay; it starts at 1,
    which is temperature 15.6 with the default bounds. The optimiser lowers the loss by the student and, through a
    reversed gradient, raises it by the temperature.
    """

    name = "ctkd"

    def __init__(self, config: CTKDConfig) -> None:
        super().__init__()
        self.config = config
        self.position = nn.Parameter(torch.ones(()))

    @property
    def temperature(self) -> Tensor:
        """The temperature that is now in force, a scalar without gradients."""
        return self._bounded(self.position.detach())

    def forward(self, step: DistillStep) -> Tensor:
        """Return the mean divergence of the batch at the temperature in force."""
        strength = reversal_strength(epoch=step.epoch, num_epochs=step.num_epochs, curriculum=self.config.curriculum)
        temperature = self._bounded(reversed_gradient(self.position, strength=strength))
        return divergence_at_temperature(step.outputs.logits, step.teacher.logits, temperature).mean()

    def _bounded(self, position: Tensor) -> Tensor:
        return bounded_temperature(
            position,
            lowest_temperature=self.config.lowest_temperature,
            temperature_range=self.config.temperature_range,
        )


METHOD = Method(
    name="ctkd",
    role="student",
    title="Knowledge distillation at a temperature that is learned against the student",
    venue="AAAI 2023",
    source="Li, Li, Yang, Zhao, Song, Luo, Li and Yang, AAAI 2023, arXiv:2211.16231; settings of the authors' code",
    differs=(
        "The global temperature alone, as in the authors' code, not the paper's other variant with one for each "
        "example. The strength of the reversed gradient grows over 10 epochs of 240, as there, but scales with the "
        "length of the run."
    ),
    terms={"cross_entropy": {"weight": 0.1}, "ctkd": {"weight": 0.9}},
)
