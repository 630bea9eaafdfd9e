"""Student-friendly teachers: branches of the student on the teacher's stages are trained with it."""

from __future__ import annotations

import math
from typing import ClassVar, final

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from soteacher.errors import InputError
from soteacher.objective import Method, Objective, ObjectiveConfig
from soteacher.objectives.features import TapPair
from soteacher.objectives.teacher.student_branches import StudentBranch, branch_points
from soteacher.precision import at_least_float32
from soteacher.types import Step, Task


def branch_loss(
    branch_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor,
    *,
    temperature: float,
    divergence_weight: float,
    cross_entropy_weight: float,
) -> Tensor:
    r"""Loss of a student branch: its divergence from the teacher and its cross-entropy, one value per example.

    .. math::

        w_{\mathrm{KL}} \, \tau^2 \, \mathrm{KL}\left(\sigma(z_t / \tau) \,\|\, \sigma(z_b / \tau)\right)
        - w_{\mathrm{CE}} \log \sigma(z_b)_y

    The teacher's logits are no constant here: teacher and branch come towards each other.

    Args:
        branch_logits: :math:`z_b`, ``[B, K]``; gradients flow.
        teacher_logits: :math:`z_t`, ``[B, K]``; gradients flow.
        labels: ``[B]`` integer class ids in [0, K), unchecked.
        temperature: :math:`\tau > 0`, dimensionless.
        divergence_weight: :math:`w_{\mathrm{KL}} \ge 0`.
        cross_entropy_weight: :math:`w_{\mathrm{CE}} \ge 0`.

    Returns:
        ``[B]``, nats, float32 (float64 from float64 logits).

    Raises:
        InputError: the shapes do not fit, the labels are not class ids, or a number is out of its range.

    Source: Park et al., NeurIPS 2021, arXiv:2102.07650, student-aware training. Its losses, the direction of the
    divergence and that it reaches the teacher's logits are from memory of the paper, not checked; the factor
    :math:`\tau^2`, 1 by default, keeps the size of the gradient as in distillation.
    """
    if (
        branch_logits.ndim != 2
        or branch_logits.shape != teacher_logits.shape
        or labels.shape != branch_logits.shape[:1]
    ):
        raise InputError(
            "a branch's and the teacher's logits must have one shape [B, K] and labels [B], got "
            f"{list(branch_logits.shape)} (branch), {list(teacher_logits.shape)} (teacher) and {list(labels.shape)}"
        )
    if labels.is_floating_point():
        raise InputError(f"labels must be integer class ids, got {labels.dtype}")
    if not 0 < temperature < math.inf:
        raise InputError(f"temperature must be positive and finite, got {temperature}")
    for name, weight in (("divergence_weight", divergence_weight), ("cross_entropy_weight", cross_entropy_weight)):
        if not 0 <= weight < math.inf:
            raise InputError(f"{name} must be at least 0 and finite, got {weight}")
    branch, teacher = at_least_float32(branch_logits), at_least_float32(teacher_logits)
    log_branch, log_teacher = (F.log_softmax(logits / temperature, dim=-1) for logits in (branch, teacher))
    divergence = temperature**2 * F.kl_div(log_branch, log_teacher, reduction="none", log_target=True).sum(dim=-1)
    mistakes = F.cross_entropy(branch, labels.long(), reduction="none")
    return divergence_weight * divergence + cross_entropy_weight * mistakes


class SFTNConfig(ObjectiveConfig):
    """Settings of :class:`SFTN`."""

    reads: ClassVar[str] = "the teacher's stages, paired with the student's from the deepest back, but the last pair"

    student: str | None = None
    """Name of the network that the teacher is to be friendly to, as under ``students``; needed."""
    temperature: float = Field(default=1.0, gt=0)
    """Softening of teacher's and branches' predictions in the divergence, dimensionless."""
    divergence_weight: float = Field(default=3.0, gt=0)
    """Factor of each branch's divergence from the teacher."""
    cross_entropy_weight: float = Field(default=1.0, gt=0)
    """Factor of each branch's cross-entropy with the labels."""

    def build(self, task: Task) -> SFTN:
        """Return the objective with a branch, of its own weights, for each of the teacher's stages but the last.

        Raises:
            InputError: no student is named, the task says nothing of the network in training or makes no networks, or
                the student's stages do not fit.
        """
        if self.student is None:
            raise InputError("sftn needs the student's network: set terms.sftn.student (in a command --student)")
        if task.network is None or task.build_network is None:
            raise InputError("sftn builds branches for a network: give Task(network=..., build_network=...)")
        first = task.build_network(self.student)
        if first.facts.num_logits != task.num_classes:
            raise InputError(f"{first.facts.name} gives {first.facts.num_logits} logits for {task.num_classes} classes")
        pairs = branch_points(task.network, first.facts)
        students = [first, *(task.build_network(self.student) for _ in pairs[1:])]
        return SFTN(self, pairs, [StudentBranch(*made) for made in zip(students, pairs, strict=True)])


@final
class SFTN(Objective[Step]):
    r"""Train branches of the student on the teacher's features, and the teacher with them.

    .. math::

        \sum_b \left[ w_{\mathrm{KL}} \, \tau^2 \, \mathrm{KL}(p_t \,\|\, p_b) + w_{\mathrm{CE}} \, \mathrm{CE}(p_b, y)
        \right]

    A branch :math:`b` takes the feature of one of the teacher's stages over a connector into a student, behind the
    stage that stands beside it, and ends in the student's classifier; see :func:`branch_loss`. Gradients reach the
    teacher over the feature and over its own logits. Each branch has all of its student's layers, of which those before
    its stage neither run nor train. Branches are trained with the teacher and are in its resume file; they are gone
    when it is saved. They normalise by the batch, without running statistics, and run as they are, uncompiled.
    """

    name = "sftn"

    def __init__(self, config: SFTNConfig, pairs: tuple[TapPair, ...], branches: list[StudentBranch]) -> None:
        super().__init__()
        self.config = config
        self.features = tuple(pair.teacher for pair in pairs)
        self.branches = nn.ModuleList(branches)

    def forward(self, step: Step) -> Tensor:
        """Return the sum of all branches' losses, the mean over the batch."""
        losses = [
            self._loss(step, branch(step.outputs.features[tap], step.images))
            for tap, branch in zip(self.features, self.branches, strict=True)
        ]
        return torch.stack(losses).sum(dim=0).mean()

    def _loss(self, step: Step, branch_logits: Tensor) -> Tensor:
        config = self.config
        return branch_loss(
            branch_logits, step.outputs.logits, step.labels, temperature=config.temperature,
            divergence_weight=config.divergence_weight, cross_entropy_weight=config.cross_entropy_weight,
        )  # fmt: skip


METHOD = Method(
    name="sftn",
    role="teacher",
    title="Student-friendly teacher: branches of the student on the teacher's stages, trained with it and thrown away",
    venue="NeurIPS 2021",
    source="Park, Cha, Jeong, Kim and Han, NeurIPS 2021, arXiv:2102.07650",
    differs=(
        "The weights 1, 3 and 1, the temperature 1, the direction of the divergence and that its gradient reaches the "
        "teacher's logits are from memory of the paper, not checked against it or the authors' code. Connectors (1x1 "
        "convolution and batch normalisation, resized where maps differ in size), which stages stand beside each "
        "other, and that branches have no running statistics are ours. Branches are summed, not averaged (from memory "
        "the paper averages over them), so that their weight beside the cross-entropy grows with their number."
    ),
    terms={"cross_entropy": {"weight": 1.0}, "sftn": {"weight": 1.0}},
)
