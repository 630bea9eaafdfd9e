"""The central idea: a training loss is a sum of terms, and an objective is one summand."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Generic, Literal, TypeVar, get_args

from pydantic import Field, model_validator
from torch import Tensor, nn

from soteacher.errors import InputError, unknown_name
from soteacher.logits import standardized_logits
from soteacher.settings import Settings
from soteacher.types import DistillStep, Outputs, Step, Task, View

StepT = TypeVar("StepT", bound=Step, contravariant=True)

Ramp = Literal["constant", "linear", "cosine", "quarter_circle", "step", "warmup"]
Stage = Literal["preparation", "training"]
"""A training may have a stage of its own before it, with a loss of its own."""


def ramp_factor(ramp: Ramp, *, epoch: int, num_epochs: int) -> float:
    r"""Return the share of a term's weight that is in force during an epoch.

    With :math:`r = (\text{epoch} + 1) / \text{num\_epochs}`, in (0, 1]: constant 1; linear :math:`r`; cosine
    :math:`(1 - \cos \pi r) / 2`; quarter circle :math:`1 - \sqrt{1 - r^2}`; step 0 while :math:`r \le 1/2`, then 1;
    warmup :math:`\min(1, 12 r)`, which is 20 epochs of 240.

    Args:
        ramp: the ramp's name.
        epoch: from 0.
        num_epochs: length of the run.

    Raises:
        InputError: there is no such ramp.

    Source: the linear ramp is exactly that of SoTeacher's recipe (Dong et al. 2024, arXiv:2206.06661), whose epochs
    count from 1; the warm-up is that of Zhao et al. (DKD), CVPR 2022, arXiv:2203.08679; the shapes of the others are
    ours.
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
    if ramp == "warmup":
        return min(1.0, 12 * share)
    return 1.0


class Objective(nn.Module, ABC, Generic[StepT]):
    """One summand of a training loss, unweighted. Subclasses are final.

    State is registered buffers, so that device, checkpoint and resume come for free.
    """

    name: ClassVar[str]
    features: tuple[str, ...] = ()
    """The taps that it reads of the network in training; the study takes the union over all terms."""
    teacher_features: tuple[str, ...] = ()
    """The taps that it reads of the teacher."""
    trains_network: ClassVar[bool] = True
    """Whether its loss reaches the network's weights; if not, a preparation by it leaves the network as it was."""
    views: ClassVar[tuple[View, ...]] = ()
    """The views of each image that it reads besides the batch's own."""

    surveys: ClassVar[bool] = False
    """Whether it wants to see all training examples before the first step."""

    @abstractmethod
    def forward(self, step: StepT) -> Tensor:
        """Return the scalar mean over the batch. Must not change the objective's state."""

    def update(self, step: StepT) -> None:
        """Take in the finished step: running averages, memory banks. Stateless objectives do nothing."""
        del step

    def survey(self, step: StepT) -> None:
        """Take in a batch of the training examples as the network sees them before the first step.

        Called for each batch, in order, of unchanged images, with the network in evaluation mode and without gradients,
        if ``surveys`` says so. A resumed training is not surveyed again: what is kept must be buffers.
        """
        del step

    def start(self, prepared: Mapping[str, Objective[Any]]) -> None:
        """Take over what the preparation has made; called once, before the first step of the training.

        Args:
            prepared: the objectives of the preparation by name; empty where there was none.
        """
        del prepared


@dataclass(frozen=True, slots=True, kw_only=True)
class Term(Generic[StepT]):
    """An objective with its weight in the training loss and the ramp by which the weight grows."""

    objective: Objective[StepT]
    weight: float = 1.0
    ramp: Ramp = "constant"
    standardize: bool = False
    """Whether the objective sees standardised logits; see :func:`soteacher.logits.standardized_logits`."""
    distils: bool = False
    """Whether the loss comes from a teacher, for optimisers that tell its gradient from the task's."""

    def __post_init__(self) -> None:
        if not self.weight > 0 or not math.isfinite(self.weight):
            raise InputError(
                f"weight of {self.objective.name} must be positive, got {self.weight}; or leave the term out"
            )
        ramp_factor(self.ramp, epoch=0, num_epochs=1)  # an unknown ramp is an error now, not in the first step

    def weight_at(self, *, epoch: int, num_epochs: int) -> float:
        """Return the weight in force during an epoch; see :func:`ramp_factor`."""
        return self.weight * ramp_factor(self.ramp, epoch=epoch, num_epochs=num_epochs)

    def weighted_loss(self, step: StepT) -> Tensor:
        """Return the objective's scalar times the weight in force."""
        seen: Any = _standardized(step) if self.standardize else step
        return self.weight_at(epoch=step.epoch, num_epochs=step.num_epochs) * self.objective(seen)


def _standardized(step: Step) -> Step:
    """Return a step whose logits, the student's and the teacher's, are standardised."""
    changes: dict[str, Any] = {"outputs": _standardized_outputs(step.outputs), "views": _standardized_views(step.views)}
    if isinstance(step, DistillStep):
        changes["teacher"] = _standardized_outputs(step.teacher)
        changes["teacher_views"] = _standardized_views(step.teacher_views)
    return replace(step, **changes)


def _standardized_outputs(outputs: Outputs) -> Outputs:
    return Outputs(logits=standardized_logits(outputs.logits), features=outputs.features)


def _standardized_views(views: Mapping[View, Outputs]) -> dict[View, Outputs]:
    return {view: _standardized_outputs(outputs) for view, outputs in views.items()}


def weighted_losses(terms: Sequence[Term[StepT]], step: StepT) -> list[Tensor]:
    """Return each term's weighted scalar, in the order of ``terms``. The training loss is the sum.

    They are not one tensor, so that the gradient of one can be had without the others'.
    """
    return [term.weighted_loss(step) for term in terms]


@dataclass(frozen=True, slots=True, kw_only=True)
class ReusedClassifier:
    """How a student's last maps reach the classifier that it takes over from its teacher."""

    reduction: int
    """The projector's inner channels are the teacher's divided by this."""


class ObjectiveConfig(Settings, ABC):
    """Settings of one term of a loss: its weight and ramp, and what its objective needs. Subclasses are final."""

    needs_teacher: ClassVar[bool] = False
    """Whether the objective reads a teacher."""
    standardizable: ClassVar[bool] = False
    """Whether the objective compares logits with logits and reads nothing in them that standardising would take."""
    reads: ClassVar[str] = ""
    """Which taps it reads, in words, where the settings do not choose them."""
    takes_over: ClassVar[str | None] = None
    """The objective of the preparation that it continues, and cannot do without."""
    is_taken_over: ClassVar[bool] = False
    """Whether it only makes, in the preparation, what another objective takes over."""
    takes_mixtures: ClassVar[bool] = False
    """Whether the objective knows what to do with blended images; see :class:`soteacher.types.Mixture`."""
    prepares_alone: ClassVar[bool] = False
    """Whether the network's preparation is to follow this objective and no other one."""

    weight: float = Field(default=1.0, gt=0)
    """Factor of the objective in the training loss."""
    ramp: Ramp = "constant"
    """How the weight grows over the run; see ``ramp_factor``."""
    stage: Stage = "training"
    """When the term counts: in the ``training``, or in a ``preparation`` before it."""
    standardize: bool = False
    """Whether teacher's and student's logits are standardised first; for terms that compare logits."""

    @model_validator(mode="after")
    def _standardizes_logits(self) -> ObjectiveConfig:
        if self.standardize and not self.standardizable:
            raise InputError("standardize is for terms on the logits of both networks; this one does not offer it")
        return self

    def reuse(self) -> ReusedClassifier | None:
        """Return how the student takes over the teacher's classifier; ``None`` where it keeps its own."""
        return None

    @abstractmethod
    def build(self, task: Task) -> Objective[Any]:
        """Return the objective with these settings."""

    def term(self, task: Task) -> Term[Any]:
        """Return the objective with its weight and ramp."""
        return Term(
            objective=self.build(task), weight=self.weight, ramp=self.ramp, standardize=self.standardize,
            distils=self.needs_teacher,
        )  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Method:
    """A named training loss: which terms, with which settings. What ``method: NAME`` in a study stands for."""

    name: str
    role: Literal["teacher", "student"]
    title: str
    """One line that says what it does."""
    source: str
    """Authors, venue and year, arXiv number."""
    venue: str = ""
    """Where and when it was published, as lists show it: ``CVPR 2022``; empty for what is nobody's."""
    differs: str = ""
    """What we do differently from the authors' code, in a sentence or more; empty where nothing is known."""
    terms: dict[str, dict[str, Any]]
    """Objective names and their settings; an empty dictionary takes the objective's defaults."""
    training: dict[str, Any] = field(default_factory=dict[str, Any])
    """What the method changes in how the network is trained; a study's own settings go over it."""
    fine_tunes: bool = False
    """Whether it goes on from a network that is trained already, which the study's ``start`` names."""

    def without(self, term: str) -> Method:
        """Return the ablation that leaves one term out; it is called ``NAME_without_TERM``."""
        return replace(
            self,
            name=f"{self.name}_without_{term}",
            title=f"{self.title}; without the term {term}",
            terms={name: settings for name, settings in self.terms.items() if name != term},
        )
