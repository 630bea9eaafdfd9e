"""Multi-level logit distillation (MLKD), the level of examples: many temperatures, two views."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, ClassVar, final

import torch
from pydantic import Field
from torch import Tensor

from soteacher.errors import InputError
from soteacher.objective import Method, Objective, ObjectiveConfig
from soteacher.objectives.student.kd import kd_divergence
from soteacher.objectives.views import student_view, teacher_view
from soteacher.types import DistillStep, Task, View


def multi_temperature_divergence(
    student_logits: Tensor, teacher_logits: Tensor, *, temperatures: Sequence[float]
) -> Tensor:
    r"""Sum over temperatures of the divergence of the softened predictions, one value per example.

    .. math:: \sum_{\tau} \tau^2 \, \mathrm{KL}\left(\sigma(z_t / \tau) \,\|\, \sigma(z_s / \tau)\right)

    Args:
        student_logits: ``[B, K]``; gradients flow.
        teacher_logits: ``[B, K]``; a constant.
        temperatures: the :math:`\tau > 0`, at least one, dimensionless.

    Returns:
        ``[B]``, float32 (float64 from float64 logits); 0 where the two agree.

    Raises:
        InputError: the shapes differ or are not ``[B, K]``, there is no temperature, or one is not positive and finite.

    Source: Jin, Wang and Lin, CVPR 2023, "Multi-Level Logit Distillation", the level of examples; formula
    and temperatures as in the authors' code.
    """
    if not temperatures:
        raise InputError("at least one temperature is wanted, got none")
    values = [kd_divergence(student_logits, teacher_logits, temperature=value) for value in temperatures]
    return torch.stack(values).sum(dim=0)


def below_median_share(values: Tensor) -> Tensor:
    """Share of values that do not exceed their median.

    Args:
        values: ``[N]``, such as the confidences of a batch.

    Returns:
        A scalar in [1/2, 1]: 1/2 where N is even and the values in the middle differ; a constant.

    Raises:
        InputError: there are no values, or they are not ``[N]``.

    Source: in the authors' code of MLKD a mask selects the examples of low confidence and multiplies a loss that is
    already averaged, so that only the share of the selected ones counts. This is that share.
    """
    if values.ndim != 1 or not len(values):
        raise InputError(f"wanted values [N], at least one, got {list(values.shape)}")
    values = values.detach()
    return (values <= torch.quantile(values, 0.5)).to(values.dtype).mean()


class MLKDConfig(ObjectiveConfig):
    """Settings of :class:`MLKD`."""

    needs_teacher: ClassVar[bool] = True
    standardizable: ClassVar[bool] = True
    temperatures: tuple[Annotated[float, Field(gt=0)], ...] = Field(default=(2.0, 3.0, 4.0, 5.0, 6.0), min_length=1)
    """Softenings of both distributions, dimensionless; the divergences add up."""

    def build(self, task: Task) -> MLKD:
        """Return the objective; it needs nothing from the task."""
        del task
        return MLKD(self)


@final
class MLKD(Objective[DistillStep]):
    """Match the teacher's predictions for two views at many temperatures; see :func:`multi_temperature_divergence`.

    The batch's own view counts by the share of its examples whose confidence does not exceed the median, about 1/2, as
    in the authors' code; see :func:`below_median_share`. The strong view counts fully.
    """

    name = "mlkd"
    views: ClassVar[tuple[View, ...]] = ("strong",)

    def __init__(self, config: MLKDConfig) -> None:
        super().__init__()
        self.config = config

    def forward(self, step: DistillStep) -> Tensor:
        """Return the mean of the batch over both views."""
        temperatures = self.config.temperatures
        student, teacher = student_view(step, "strong"), teacher_view(step, "strong")
        weak = multi_temperature_divergence(step.outputs.logits, step.teacher.logits, temperatures=temperatures)
        strong = multi_temperature_divergence(student.logits, teacher.logits, temperatures=temperatures)
        confidence = step.teacher.logits.detach().to(weak.dtype).softmax(dim=-1).amax(dim=-1)
        return below_median_share(confidence) * weak.mean() + strong.mean()


METHOD = Method(
    name="mlkd",
    role="student",
    title="Multi-level logit distillation: examples, batch and classes, at many temperatures and on two views",
    venue="CVPR 2023",
    source="Jin, Wang and Lin, CVPR 2023, Multi-Level Logit Distillation; weights and temperatures as released",
    differs=(
        "Published rows are runs of 480 epochs on two views of each image (the released settings say 240 for some "
        "pairs), with a half or less of the usual learning rate; compare with methods of equal cost. The authors' "
        "code takes the strong view at temperatures 3, 4 and 5 and repeats the weak one at 2 and 6; here both views "
        "are taken at all."
    ),
    terms={
        "cross_entropy": {"weight": 0.1},
        "view_cross_entropy": {"weight": 0.1},
        "mlkd": {"weight": 0.9},
        "mlkd_relations": {"weight": 0.9},
    },
)
