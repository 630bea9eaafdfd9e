"""Contrastive representation distillation: an example's two embeddings meet, those of other classes part."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any, cast, final

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from soteacher.errors import InputError
from soteacher.objective import Method, Objective
from soteacher.objectives.features import FeatureConfig, TapPair, own_generator
from soteacher.objectives.pooled import pair_vectors, vector_pair
from soteacher.precision import full_precision
from soteacher.types import DistillStep, Task

EPSILON = 1e-7
DENSE_RATIO = 16
"""Up to so many memory rows for each drawn one, a product with the whole memory is faster than a look-up of rows."""
GATHERED_NUMBERS = {"cpu": 2**21, "cuda": 2**26}
"""Numbers of the memory that are looked up at a time: as many as fit the cache, or the memory beside a network."""


def contrastive_negative_log_likelihood(log_probabilities: Tensor, *, num_examples: int) -> Tensor:
    r"""How badly a positive is told from negatives that were drawn from noise, one value per example.

    With :math:`M` negatives, noise of probability :math:`1 / N` and :math:`\epsilon = 10^{-7}`:

    .. math:: -\log \frac{p_0}{p_0 + M / N + \epsilon} - \sum_{j=1}^{M} \log \frac{M / N}{p_j + M / N + \epsilon}

    Args:
        log_probabilities: ``[B, 1 + M]`` logarithms of :math:`p`, the positive first; gradients flow.
        num_examples: :math:`N`, the examples of the training set.

    Returns:
        ``[B]``, nats.

    Raises:
        InputError: not ``[B, 1 + M]`` with at least one negative, or ``num_examples`` is not positive.

    Source: Tian, Krishnan and Isola, ICLR 2020, arXiv:1910.10699, equation 18, and the released code, which has the
    :math:`\epsilon`.
    """
    if log_probabilities.ndim != 2 or log_probabilities.shape[1] < 2 or num_examples < 1:
        raise InputError(
            "contrastive likelihood needs log probabilities [B, 1 + M], M at least 1, of at least one example, got "
            f"{list(log_probabilities.shape)} and {num_examples} examples"
        )
    noise = (log_probabilities.shape[1] - 1) / num_examples
    log_odds = log_probabilities - math.log(noise + EPSILON)
    positive, negatives = log_odds.split((1, log_odds.shape[1] - 1), dim=1)  # slices would have a gradient each
    losses = F.softplus(-positive).squeeze(1) + F.softplus(negatives).sum(dim=1)
    return losses + (log_probabilities.shape[1] - 1) * (math.log(noise + EPSILON) - math.log(noise))


def contrast_scores(embedding: Tensor, memory: Tensor, rows: Tensor, *, temperature: float) -> Tensor:
    r"""Similarity of each example to some rows of a memory.

    .. math:: s_{bj} = \langle e_b, m_{r_{bj}} \rangle / \tau

    Args:
        embedding: ``[B, D]``; gradients flow.
        memory: ``[N, D]``; a constant.
        rows: ``[B, M]`` int64 rows of the memory.
        temperature: :math:`\tau > 0`, dimensionless.

    Returns:
        ``[B, M]``.

    Raises:
        InputError: the shapes do not fit, or ``temperature`` is not positive and finite.

    Source: the released code of Tian, Krishnan and Isola, ICLR 2020, arXiv:1910.10699.
    """
    if embedding.ndim != 2 or memory.ndim != 2 or rows.ndim != 2 or embedding.shape[1] != memory.shape[1]:
        raise InputError(
            "contrast scores need embeddings [B, D], a memory [N, D] and rows [B, M], got "
            f"{list(embedding.shape)}, {list(memory.shape)} and {list(rows.shape)}"
        )
    if not temperature > 0 or not math.isfinite(temperature):
        raise InputError(f"temperature must be positive and finite, got {temperature}")
    return cast("Tensor", _RowProducts.apply(embedding / temperature, memory, rows))


class _RowProducts(torch.autograd.Function):
    """Scalar products with rows of a memory, ``[B, M]``; nothing of ``[B, N]`` or ``[B, M, D]`` is kept."""

    @staticmethod
    def forward(ctx: Any, embedding: Tensor, memory: Tensor, rows: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx.save_for_backward(memory, rows)
        with full_precision(embedding):
            if _is_dense(memory, rows):
                return (embedding @ memory.T).gather(1, rows)
            portions = _portions(embedding, memory, rows)
            return torch.cat([(F.embedding(some, memory) @ own.unsqueeze(2)).squeeze(2) for own, some in portions])

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        memory, rows = ctx.saved_tensors
        with full_precision(gradient):
            return _weighted_sums(gradient, memory, rows), None, None


def _weighted_sums(weights: Tensor, memory: Tensor, rows: Tensor) -> Tensor:
    """Return the sums of a memory's rows, weighted by ``[B, M]``: ``[B, D]``."""
    if weights.device.type == "cpu":
        return F.embedding_bag(rows, memory, mode="sum", per_sample_weights=weights)
    if _is_dense(memory, rows):  # a GPU has a bag of thousands of rows added up by a few threads
        return weights.new_zeros(len(rows), len(memory)).scatter_add_(1, rows, weights) @ memory
    portions = _portions(weights, memory, rows)
    return torch.cat([(own.unsqueeze(1) @ F.embedding(some, memory)).squeeze(1) for own, some in portions])


def _is_dense(memory: Tensor, rows: Tensor) -> bool:
    return len(memory) <= DENSE_RATIO * rows.shape[1]


def _portions(examples: Tensor, memory: Tensor, rows: Tensor) -> Iterable[tuple[Tensor, Tensor]]:
    """Return some examples and their rows at a time: all rows that are looked up may not fit at once."""
    numbers = GATHERED_NUMBERS.get(memory.device.type, GATHERED_NUMBERS["cpu"])
    size = max(1, numbers // (rows.shape[1] * memory.shape[1]))
    return zip(examples.split(size), rows.split(size), strict=True)


def log_contrast_normalizer(scores: Tensor, *, num_examples: int) -> Tensor:
    r"""Logarithm of the constant by which the exponentials of scores become probabilities over a whole data set.

    .. math:: \log Z, \quad Z = \frac{N}{B M} \sum_{b,j} e^{s_{bj}}

    Args:
        scores: ``[B, M]``.
        num_examples: :math:`N`.

    Returns:
        A scalar without gradient.

    Source: the released code of Tian, Krishnan and Isola, ICLR 2020, arXiv:1910.10699.
    """
    return scores.detach().flatten().logsumexp(dim=0) + math.log(num_examples / scores.numel())


def blended_directions(old: Tensor, new: Tensor, *, momentum: float) -> Tensor:
    r"""Directions between old and new ones.

    .. math:: v / \lVert v \rVert, \quad v = m \, \text{old} + (1 - m) \, \text{new}

    Args:
        old: ``[B, D]``.
        new: ``[B, D]``.
        momentum: :math:`m`, in [0, 1).

    Returns:
        ``[B, D]`` of length 1.

    Source: the released code of Tian, Krishnan and Isola, ICLR 2020, arXiv:1910.10699.
    """
    return F.normalize(momentum * old + (1 - momentum) * new, dim=1)


class CRDConfig(FeatureConfig):
    """Settings of :class:`CRD`."""

    default_taps = "pooled"
    embedding_size: int = Field(default=128, gt=0)
    """Numbers in an embedding, of the student as of the teacher."""
    num_negatives: int = Field(default=16384, gt=0)
    """Examples of other classes that each example is contrasted with, drawn anew in each step."""
    temperature: float = Field(default=0.07, gt=0)
    """Divides the cosines, dimensionless."""
    momentum: float = Field(default=0.5, ge=0, lt=1)
    """Share of the old embedding in the memory when an example's new one comes."""

    def build(self, task: Task) -> CRD:
        """Return the objective with random memories, one row for each training example."""
        return CRD(self, vector_pair(self, task, "crd"), _OtherClasses(task))


@final
class CRD(Objective[DistillStep]):
    """Tell an example's embedding in the other network from those of other classes, in both directions.

    The two memories take 8 N D bytes: 51 MB for CIFAR, 1.3 GB for ImageNet. No example may occur twice in one step.
    """

    name = "crd"
    student_memory: Tensor
    """``[N, D]`` the student's embedding of each example, blended over the epochs."""
    teacher_memory: Tensor
    """``[N, D]`` the teacher's."""
    log_normalizers: Tensor
    """``[2]`` for the student's embeddings and for the teacher's, constant from the first step on; before that NaN."""

    def __init__(self, config: CRDConfig, pair: TapPair, others: _OtherClasses) -> None:
        super().__init__()
        self.config, self.pair, self.others = config, pair, others
        self.features, self.teacher_features = (pair.student,), (pair.teacher,)
        self.student_embedding = nn.Linear(pair.student_shape[0], config.embedding_size)
        self.teacher_embedding = nn.Linear(pair.teacher_shape[0], config.embedding_size)
        shape, bound = (others.num_rows, config.embedding_size), math.sqrt(3 / config.embedding_size)
        self.register_buffer("student_memory", torch.empty(shape).uniform_(-bound, bound))
        self.register_buffer("teacher_memory", torch.empty(shape).uniform_(-bound, bound))
        self.register_buffer("log_normalizers", torch.full((2,), torch.nan))
        # Asked on the host, so that a device is not waited for in every step. A resumed objective asks once more.
        self._normalized = False
        self.register_load_state_dict_post_hook(_ask_for_normalizers)

    def forward(self, step: DistillStep) -> Tensor:
        """Return the mean over the batch of the two directions' sum."""
        scores = self._scores(step, *self._embeddings(step))
        normalizers = self._normalizers(scores)
        directions = [
            contrastive_negative_log_likelihood(side - normalizer, num_examples=self.others.num_examples)
            for side, normalizer in zip(scores, normalizers, strict=True)
        ]
        return (directions[0] + directions[1]).mean()

    @torch.no_grad()
    def update(self, step: DistillStep) -> None:
        """Keep the first step's normalisers, and blend this step's embeddings into the memories.

        The embeddings are those of the loss as long as no optimiser has moved their layers in between.
        """
        student, teacher = self._embeddings(step)
        if not self._normalized:
            self.log_normalizers.copy_(self._normalizers(self._scores(step, student, teacher)))
            self._normalized = True
        for memory, new in ((self.student_memory, student), (self.teacher_memory, teacher)):
            memory[step.indices] = blended_directions(memory[step.indices], new, momentum=self.config.momentum)

    def _embeddings(self, step: DistillStep) -> tuple[Tensor, Tensor]:
        student, teacher = pair_vectors(step, self.pair)
        with full_precision(student):
            return (
                F.normalize(self.student_embedding(student), dim=1),
                F.normalize(self.teacher_embedding(teacher), dim=1),
            )

    def _scores(self, step: DistillStep, student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
        """Compare the student's embeddings with the teacher's memory, and the other way round; positives first."""
        generator = own_generator(step, step.labels.device)
        negatives = self.others.draw(step.labels, self.config.num_negatives, generator)
        rows = torch.cat([step.indices.unsqueeze(1), negatives], dim=1)
        temperature = self.config.temperature
        return (
            contrast_scores(student, self.teacher_memory, rows, temperature=temperature),
            contrast_scores(teacher, self.student_memory, rows, temperature=temperature),
        )

    def _normalizers(self, scores: tuple[Tensor, Tensor]) -> Tensor:
        """Return those of the first step; in that step, its own."""
        if self._normalized:
            return self.log_normalizers
        own = [log_contrast_normalizer(side, num_examples=self.others.num_examples) for side in scores]
        return torch.where(self.log_normalizers.isnan(), torch.stack(own), self.log_normalizers)


def _ask_for_normalizers(objective: CRD, incompatible_keys: object) -> None:
    del incompatible_keys
    objective._normalized = False  # pyright: ignore[reportPrivateUsage] the objective's own hook


@final
class _OtherClasses(nn.Module):
    """Draws training examples of other classes, on the device: the examples stand in a row, sorted by class."""

    order: Tensor
    """``[M]`` rows of the training set that are trained on, class after class."""
    starts: Tensor
    """``[K]`` where each class begins in the order."""
    sizes: Tensor
    """``[K]`` how many examples each class has."""

    def __init__(self, task: Task) -> None:
        super().__init__()
        labels = task.labels
        if labels is None or labels.shape != (task.num_examples,):
            came = "none" if labels is None else list(labels.shape)
            raise InputError(f"crd draws from other classes: it needs labels [{task.num_examples}], got {came}")
        rows = torch.arange(task.num_examples) if task.rows is None else task.rows
        sizes = labels[rows].bincount(minlength=task.num_classes)
        if len(rows) <= int(sizes.max()):
            raise InputError("crd draws from other classes: the training examples must be of at least two")
        self.num_rows, self.num_examples = task.num_examples, len(rows)
        # They follow from the data set, so that no checkpoint needs to hold them.
        self.register_buffer("order", rows[labels[rows].argsort(stable=True)], persistent=False)
        self.register_buffer("starts", sizes.cumsum(0) - sizes, persistent=False)
        self.register_buffer("sizes", sizes, persistent=False)

    def draw(self, labels: Tensor, number: int, generator: torch.Generator) -> Tensor:
        """Return ``[B, number]`` rows of the training set, uniform over those of other classes, with replacement."""
        size = self.sizes[labels].unsqueeze(1)
        # From so wide a range the remainder is uniform to 1 in 10^11, and reaches every place at any size.
        wide = torch.randint(2**62, (len(labels), number), generator=generator, device=labels.device)
        place = wide.remainder_(len(self.order) - size)  # in place: these are millions of numbers
        # Places from the own class's beginning on stand behind its block.
        return self.order[place.add_(size * (place >= self.starts[labels].unsqueeze(1)))]


METHOD = Method(
    name="crd",
    role="student",
    title="Contrastive representation distillation: each example against thousands of other classes",
    venue="ICLR 2020",
    source="Tian, Krishnan and Isola, ICLR 2020, arXiv:1910.10699; settings as released",
    differs="Negatives are drawn on the device, with replacement; the released code draws without where it can.",
    terms={"cross_entropy": {"weight": 1.0}, "crd": {"weight": 0.8}},
)
