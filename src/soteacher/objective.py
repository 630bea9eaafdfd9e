"""The central idea: a training loss is a sum of terms, and an objective is one summand."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Generic, Literal, TypeVar, get_args

import torch
from pydantic import Field
from torch import Tensor, nn

from soteacher.errors import InputError, unknown_name
from soteacher.settings import Settings
from soteacher.types import Step, Task

StepT = TypeVar("StepT", bound=Step, contravariant=True)

Ramp = Literal["constant", "linear", "cosine", "quarter_circle", "step"]


def ramp_factor(ramp: Ramp, *, epoch: int, num_epochs: int) -> float:
    r"""Return the share of a term's weight that is in force during an epoch.

    With :math:`r = (\text{epoch} + 1) / \text{num\_epochs}`, in (0, 1]: constant 1; linear :math:`r`; cosine
    :math:`(1 - \cos \pi r) / 2`; quarter circle :math:`1 - \sqrt{1 - r^2}`; step 0 while :math:`r \le 1/2`, then 1.

    Args:
        ramp: the ramp's name.
        epoch: from 0.
        num_epochs: length of the run.

    Raises:
        InputError: there is no such ramp.

    Source: the linear ramp is exactly that of SoTeacher's recipe (Dong et al. 2024, arXiv:2206.06661), whose epochs
    count from 1; the shapes of the others are ours.
    """
    share = (epoch + 1) / num_epochs
    if ramp not in get_args(Ramp):
        raise unknown_name("ramp", ramp, get_args(Ramp))
    if ramp == "linear":
        return share
    if ramp == "cosine":
        return (1 - math.cos(math.pi * share)) / 2
    if ramp == "quarter_circle":
        return 1 - math.sqrt(max(0.0, 1 - share * share))
    if ramp == "step":
        return 1.0 if share > 0.5 else 0.0
    return 1.0


class Objective(nn.Module, ABC, Generic[StepT]):
    """One summand of a training loss, unweighted. Subclasses are final.

    State is registered buffers, so that device, checkpoint and resume come for free.
    """

    name: ClassVar[str]
    features: ClassVar[tuple[str, ...]] = ()
    """The taps that it reads; the study takes the union over all terms."""

    @abstractmethod
    def forward(self, step: StepT) -> Tensor:
        """Return the scalar mean over the batch. Must not change the objective's state."""

    def update(self, step: StepT) -> None:
        """Take in the finished step: running averages, memory banks. Stateless objectives do nothing."""
        del step


@dataclass(frozen=True, slots=True, kw_only=True)
class Term(Generic[StepT]):
    """An objective with its weight in the training loss and the ramp by which the weight grows."""

    objective: Objective[StepT]
    weight: float = 1.0
    ramp: Ramp = "constant"

    def __post_init__(self) -> None:
        if not self.weight > 0 or not math.isfinite(self.weight):
            raise InputError(
                f"weight of {self.objective.name} must be positive, got {self.weight}; or leave the term out"
            )
        ramp_factor(self.ramp, epoch=0, num_epochs=1)  # an unknown ramp is an error now, not in the first step

    def weight_at(self, *, epoch: int, num_epochs: int) -> float:
        """Return the weight in force during an epoch; see :func:`ramp_factor`."""
        return self.weight * ramp_factor(self.ramp, epoch=epoch, num_epochs=num_epochs)


def weighted_losses(terms: Sequence[Term[StepT]], step: StepT) -> Tensor:
    """Return each term's weighted scalar, in the order of ``terms``: ``[len(terms)]``. The training loss is the sum."""
    return torch.stack(
        [term.weight_at(epoch=step.epoch, num_epochs=step.num_epochs) * term.objective(step) for term in terms]
    )


class ObjectiveConfig(Settings, ABC):
    """Settings of one term of a loss: its weight and ramp, and what its objective needs. Subclasses are final."""

    needs_teacher: ClassVar[bool] = False
    """Whether the objective reads a teacher."""

    weight: float = Field(default=1.0, gt=0)
    """Factor of the objective in the training loss."""
    ramp: Ramp = "constant"
    """How the weight grows over the run; see ``ramp_factor``."""

    @abstractmethod
    def build(self, task: Task) -> Objective[Any]:
        """Return the objective with these settings."""

    def term(self, task: Task) -> Term[Any]:
        """Return the objective with its weight and ramp."""
        return Term(objective=self.build(task), weight=self.weight, ramp=self.ramp)


@dataclass(frozen=True, slots=True, kw_only=True)
class Method:
    """A named training loss: which terms, with which settings. What ``method: NAME`` in a study stands for."""

    name: str
    role: Literal["teacher", "student"]
    title: str
    """One line that says what it does."""
    source: str
    """Authors, year, venue or arXiv number."""
    terms: dict[str, dict[str, Any]]
    """Objective names and their settings; an empty dictionary takes the objective's defaults."""
