"""Semantic calibration: attention decides which of the teacher's layers each of the student's layers learns from."""

from __future__ import annotations

from typing import ClassVar, final

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from soteacher.errors import InputError
from soteacher.objective import Method, Objective, ObjectiveConfig
from soteacher.objectives.connectors import BatchNormalization
from soteacher.objectives.features import as_maps, facts_of, map_shape, stages, to_smaller
from soteacher.precision import at_least_float32, full_precision
from soteacher.types import DistillStep, NetworkFacts, Task

EPSILON = 1e-6
"""The smallest length of an embedding that is divided by."""


def batch_similarities(maps: Tensor, *, num_compared: int) -> Tensor:
    r"""Inner products of each example's maps with those of the first examples of the batch.

    .. math:: A_{ij} = \langle x_i, x_j \rangle, \quad j < \min(N, B); \qquad A_{ij} = 0, \quad B \le j < N

    Args:
        maps: x ``[B, C, H, W]``; gradients flow.
        num_compared: N, at least 1.

    Returns:
        ``[B, N]``, float32 (float64 from float64 maps).

    Raises:
        InputError: ``num_compared`` is below 1, or the maps have no batch.

    Source: Chen et al., AAAI 2021, arXiv:2012.03236, where N is the batch's size.
    """
    if num_compared < 1 or maps.ndim < 2:
        raise InputError(f"wanted maps [B, ...] and num_compared of 1 or more, got {list(maps.shape)}, {num_compared}")
    flat = at_least_float32(maps).flatten(1)
    similarities = flat @ flat[:num_compared].T
    return F.pad(similarities, (0, num_compared - similarities.shape[1]))


def layer_attention(queries: Tensor, keys: Tensor) -> Tensor:
    r"""Share of each of the teacher's layers in what each of the student's layers learns, for every example.

    .. math:: a_{st} = \frac{\exp \langle q_s, k_t \rangle}{\sum_u \exp \langle q_s, k_u \rangle}

    Args:
        queries: ``[B, S, D]``, one for each layer of the student; gradients flow.
        keys: ``[B, T, D]``, one for each layer of the teacher; gradients flow.

    Returns:
        ``[B, S, T]``, float32 (float64 from float64); sums to 1 over the last dimension.

    Raises:
        InputError: another shape.

    Source: Chen et al., AAAI 2021, arXiv:2012.03236.
    """
    if queries.ndim != 3 or keys.ndim != 3 or queries.shape[::2] != keys.shape[::2]:
        raise InputError(
            f"wanted queries [B, S, D] and keys [B, T, D], got {list(queries.shape)} and {list(keys.shape)}"
        )
    return (at_least_float32(queries) @ at_least_float32(keys).mT).softmax(dim=-1)


def attended_distance(distances: Tensor, attention: Tensor) -> Tensor:
    r"""Distances of all pairs of layers, weighed by attention, one value per example.

    .. math:: \frac{1}{S} \sum_{s, t} a_{st} \, d_{st}

    Args:
        distances: d ``[B, S, T]``; gradients flow.
        attention: a ``[B, S, T]``; gradients flow.

    Returns:
        ``[B]``, float32 (float64 from float64).

    Raises:
        InputError: the shapes differ or are not ``[B, S, T]``.

    Source: Chen et al., AAAI 2021, arXiv:2012.03236; the mean over the student's layers as released.
    """
    if distances.ndim != 3 or distances.shape != attention.shape:
        raise InputError(
            f"wanted distances and attention of one shape [B, S, T], got {list(distances.shape)} and "
            f"{list(attention.shape)}"
        )
    return (at_least_float32(distances) * at_least_float32(attention)).sum(dim=2).mean(dim=1)


@final
class LayerEmbedding(nn.Module):
    """Rows of similarities ``[B, N]`` to unit vectors ``[B, D]``, the queries and keys of a layer.

    Args:
        num_compared: N; D is a quarter of it.
    """

    def __init__(self, num_compared: int) -> None:
        super().__init__()
        size = max(1, num_compared // 4)
        self.hidden = nn.Linear(num_compared, 2 * size)
        self.exit = nn.Linear(2 * size, size)

    def forward(self, similarities: Tensor) -> Tensor:
        """Return the embeddings."""
        return F.normalize(self.exit(F.relu(self.hidden(similarities))), dim=1, eps=EPSILON)


@final
class LayerProjection(nn.Module):
    """The student's maps ``[B, C, H, W]`` in a teacher's layer's channels: 1x1, 3x3 and 1x1 convolutions.

    Args:
        in_channels: C.
        channels: of the result; between the convolutions there are twice as many.
    """

    def __init__(self, in_channels: int, channels: int) -> None:
        super().__init__()
        self.entry = nn.Conv2d(in_channels, 2 * channels, 1, bias=False)
        self.entry_normalization = BatchNormalization(2 * channels)
        self.hidden = nn.Conv2d(2 * channels, 2 * channels, 3, padding=1, bias=False)
        self.hidden_normalization = BatchNormalization(2 * channels)
        self.exit = nn.Conv2d(2 * channels, channels, 1, bias=False)

    def forward(self, maps: Tensor) -> Tensor:
        """Return the projected maps."""
        maps = F.relu(self.entry_normalization(self.entry(maps)))
        return self.exit(F.relu(self.hidden_normalization(self.hidden(maps))))


class SemCKDConfig(ObjectiveConfig):
    """Settings of :class:`SemCKD`."""

    reads: ClassVar[str] = "all stages of both networks, each with each"
    needs_teacher: ClassVar[bool] = True
    student_taps: tuple[str, ...] | None = None
    """Taps of the student, each of which learns from all of the teacher's; null: its stages."""
    teacher_taps: tuple[str, ...] | None = None
    """Taps of the teacher; null: its stages. There may be more or fewer of them than of the student's."""
    num_compared: int = Field(default=64, ge=1)
    """With how many examples of the batch, the first ones, each example is compared to decide on the attention; places
    that a smaller batch leaves are 0. The authors' number is the batch's size, 64."""

    def build(self, task: Task) -> SemCKD:
        """Return the objective with its embeddings and projections.

        Raises:
            InputError: there are no such taps, or none on one side.
        """
        student, teacher = facts_of(task)
        return SemCKD(
            self,
            _channels(student, self.student_taps, "student_taps"),
            _channels(teacher, self.teacher_taps, "teacher_taps"),
        )


def _channels(facts: NetworkFacts, taps: tuple[str, ...] | None, setting: str) -> dict[str, int]:
    """Return the channels of the taps by name."""
    chosen = stages(facts) if taps is None else taps
    if not chosen:
        raise InputError(f"{facts.name}: no stages are known or named; set {setting} to at least one tap")
    return {tap: map_shape(facts, tap)[0] for tap in chosen}


@final
class SemCKD(Objective[DistillStep]):
    """Learn from all of the teacher's layers, each as far as attention gives it weight; see :func:`attended_distance`.

    The distance of a pair of layers is the mean squared one of the student's projected and the teacher's maps, at the
    smaller size of both. Queries and keys are made of each layer's :func:`batch_similarities`, so that the order of
    the batch has an influence.
    """

    name = "semckd"

    def __init__(self, config: SemCKDConfig, student: dict[str, int], teacher: dict[str, int]) -> None:
        super().__init__()
        self.config = config
        self.features = tuple(student)
        self.teacher_features = tuple(teacher)
        self.queries = nn.ModuleList(LayerEmbedding(config.num_compared) for _ in student)
        self.keys = nn.ModuleList(LayerEmbedding(config.num_compared) for _ in teacher)
        self.projections = nn.ModuleList(
            LayerProjection(own, wanted) for own in student.values() for wanted in teacher.values()
        )

    def forward(self, step: DistillStep) -> Tensor:
        """Return the mean of the batch."""
        own = [as_maps(step.outputs.features[tap]) for tap in self.features]
        wanted = [as_maps(step.teacher.features[tap].detach()) for tap in self.teacher_features]
        with full_precision(own[0]):
            attention = layer_attention(self._embed(self.queries, own), self._embed(self.keys, wanted))
            return attended_distance(self._distances(own, wanted), attention).mean()

    def _embed(self, embeddings: nn.ModuleList, layers: list[Tensor]) -> Tensor:
        """Return queries or keys ``[B, layers, D]``."""
        compared = self.config.num_compared
        return torch.stack(
            [
                embedding(batch_similarities(maps, num_compared=compared))
                for embedding, maps in zip(embeddings, layers, strict=True)
            ],
            dim=1,
        )

    def _distances(self, own: list[Tensor], wanted: list[Tensor]) -> Tensor:
        """Return the distance of every pair of layers: ``[B, S, T]``."""
        distances: list[Tensor] = []
        pairs = [(student, teacher) for student in own for teacher in wanted]
        for projection, (student, teacher) in zip(self.projections, pairs, strict=True):
            student, teacher = to_smaller(student, teacher)
            distances.append((projection(student) - teacher).square().flatten(1).mean(dim=1))
        return torch.stack(distances, dim=1).unflatten(1, (len(own), len(wanted)))


METHOD = Method(
    name="semckd",
    role="student",
    title="Semantic calibration: each of the student's layers learns from all of the teacher's, weighed by attention",
    venue="AAAI 2021",
    source="Chen, Mei, Zhang, Wang, Wang, Feng and Chen, AAAI 2021, arXiv:2012.03236; weights of the authors' script",
    differs="To decide on the attention, each example is compared with at most 64 of the batch; the authors compare it "
    "with the whole batch, whose size of 64 their attention is tied to. With batches of 64 the two are the same.",
    terms={
        "cross_entropy": {},
        "kd": {"weight": 1.0, "temperature": 4.0},
        "semckd": {"weight": 400.0},
    },
)
