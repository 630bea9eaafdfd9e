r"""Losses written as research code usually writes them in eager PyTorch: what ours are compared with.

Each computes what the objective of the same name computes, from the formulas of the papers, in the manner that the
field's repositories share: all pairs by broadcasting, memories gathered row by row, negatives drawn on the host, one
operation after the other for autograd to take apart. None is made slow on purpose, and none is made fast.

Maps are ``[B, C, H, W]`` and vectors ``[B, D]``, with one resolution on both sides where they are compared directly;
what comes from the teacher is a constant. Every loss is a scalar.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn


def kd(student_logits: Tensor, teacher_logits: Tensor, *, temperature: float) -> Tensor:
    """Return the divergence of softened predictions, Hinton et al. 2015, arXiv:1503.02531."""
    log_student = F.log_softmax(student_logits / temperature, dim=1)
    teacher = F.softmax(teacher_logits / temperature, dim=1)
    return F.kl_div(log_student, teacher, reduction="sum") * temperature**2 / student_logits.shape[0]


def dkd(
    student_logits: Tensor, teacher_logits: Tensor, labels: Tensor, *,
    temperature: float, target_weight: float, non_target_weight: float,
) -> Tensor:  # fmt: skip
    """Return the decoupled divergence, Zhao et al., CVPR 2022, arXiv:2203.08679: the target is masked out."""
    batch = student_logits.shape[0]
    is_target = torch.zeros_like(student_logits).scatter_(1, labels.unsqueeze(1), 1)
    student, teacher = F.softmax(student_logits / temperature, dim=1), F.softmax(teacher_logits / temperature, dim=1)
    student, teacher = [
        torch.stack([(p * is_target).sum(dim=1), (p * (1 - is_target)).sum(dim=1)], dim=1) for p in (student, teacher)
    ]
    target = F.kl_div(student.log(), teacher, reduction="sum") * temperature**2 / batch
    others = F.kl_div(
        F.log_softmax(student_logits / temperature - 1000 * is_target, dim=1),
        F.softmax(teacher_logits / temperature - 1000 * is_target, dim=1),
        reduction="sum",
    )
    return target_weight * target + non_target_weight * others * temperature**2 / batch


def dist(
    student_logits: Tensor, teacher_logits: Tensor, *,
    temperature: float, inter_class_weight: float, intra_class_weight: float,
) -> Tensor:  # fmt: skip
    """Return one minus the correlations of predictions, Huang et al., NeurIPS 2022, arXiv:2205.10536."""
    student, teacher = F.softmax(student_logits / temperature, dim=1), F.softmax(teacher_logits / temperature, dim=1)
    inter_class = temperature**2 * (1 - _correlation(student, teacher).mean())
    intra_class = temperature**2 * (1 - _correlation(student.t(), teacher.t()).mean())
    return inter_class_weight * inter_class + intra_class_weight * intra_class


def _correlation(first: Tensor, second: Tensor) -> Tensor:
    first, second = first - first.mean(dim=1, keepdim=True), second - second.mean(dim=1, keepdim=True)
    return (first * second).sum(dim=1) / (first.norm(dim=1) * second.norm(dim=1) + 1e-8)


def attention(student_maps: Iterable[Tensor], teacher_maps: Iterable[Tensor]) -> Tensor:
    """Return the distances of attention maps, Zagoruyko and Komodakis, ICLR 2017, arXiv:1612.03928."""
    losses = [
        (_attention_map(student) - _attention_map(teacher)).pow(2).mean()
        for student, teacher in zip(student_maps, teacher_maps, strict=True)
    ]
    return sum(losses[1:], losses[0])


def _attention_map(maps: Tensor) -> Tensor:
    return F.normalize(maps.pow(2).mean(dim=1).view(maps.shape[0], -1))


def nst(student_maps: Iterable[Tensor], teacher_maps: Iterable[Tensor]) -> Tensor:
    """Return the discrepancies of channels, Huang and Wang 2017, arXiv:1707.01219: all pairs ``[B, C, C, H * W]``."""
    losses: list[Tensor] = []
    for student, teacher in zip(student_maps, teacher_maps, strict=True):
        own = F.normalize(student.view(student.shape[0], student.shape[1], -1), dim=2)
        wanted = F.normalize(teacher.view(teacher.shape[0], teacher.shape[1], -1), dim=2)
        constant = _polynomial_kernel(wanted, wanted).mean().detach()
        losses.append(constant + _polynomial_kernel(own, own).mean() - 2 * _polynomial_kernel(own, wanted).mean())
    return sum(losses[1:], losses[0])


def _polynomial_kernel(first: Tensor, second: Tensor) -> Tensor:
    return (first.unsqueeze(2) * second.unsqueeze(1)).sum(dim=-1).pow(2)


def similarity(student_maps: Tensor, teacher_maps: Tensor) -> Tensor:
    """Return the distance of similarities within the batch, Tung and Mori, ICCV 2019, arXiv:1907.09682."""
    batch = student_maps.shape[0]
    student, teacher = student_maps.view(batch, -1), teacher_maps.view(batch, -1)
    student_similarity = F.normalize(torch.mm(student, student.t()))
    teacher_similarity = F.normalize(torch.mm(teacher, teacher.t()))
    return (student_similarity - teacher_similarity).pow(2).sum() / batch**2


def rkd(student: Tensor, teacher: Tensor, *, distance_weight: float, angle_weight: float) -> Tensor:
    """Return the distance of relations within the batch, Park et al., CVPR 2019, arXiv:1904.05068."""
    with torch.no_grad():
        teacher_distances = _relative_distances(teacher)
        teacher_angles = _angles(teacher)
    distance = F.smooth_l1_loss(_relative_distances(student), teacher_distances)
    angle = F.smooth_l1_loss(_angles(student), teacher_angles)
    return distance_weight * distance + angle_weight * angle


def _relative_distances(embeddings: Tensor) -> Tensor:
    squared = embeddings.pow(2).sum(dim=1)
    products = embeddings @ embeddings.t()
    distances = (squared.unsqueeze(1) + squared.unsqueeze(0) - 2 * products).clamp(min=1e-12).sqrt()
    others = 1 - torch.eye(len(embeddings), device=embeddings.device)
    distances = distances * others
    return distances / distances[distances > 0].mean()


def _angles(embeddings: Tensor) -> Tensor:
    differences = embeddings.unsqueeze(0) - embeddings.unsqueeze(1)
    directions = F.normalize(differences, p=2, dim=2)
    return torch.bmm(directions, directions.transpose(1, 2)).view(-1)


def pkt(student: Tensor, teacher: Tensor, *, epsilon: float = 1e-7) -> Tensor:
    """Return the divergence of the neighbours, Passalis and Tefas, ECCV 2018, arXiv:1803.10837."""
    own, wanted = _neighbours(student, epsilon), _neighbours(teacher, epsilon)
    return torch.mean(wanted * torch.log((wanted + epsilon) / (own + epsilon)))


def _neighbours(embeddings: Tensor, epsilon: float) -> Tensor:
    directions = embeddings / (embeddings.pow(2).sum(dim=1, keepdim=True).sqrt() + epsilon)
    similarities = (torch.mm(directions, directions.t()) + 1.0) / 2.0
    return similarities / similarities.sum(dim=1, keepdim=True)


class Correlation(nn.Module):
    """Errors on neighbours of the batch, Peng et al., ICCV 2019, arXiv:1904.01802, with an embedding of each side."""

    def __init__(self, student_size: int, teacher_size: int, dimension: int) -> None:
        super().__init__()
        self.student_embedding = nn.Linear(student_size, dimension)
        self.teacher_embedding = nn.Linear(teacher_size, dimension)

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        """Return the loss of vectors."""
        error = torch.abs(self.student_embedding(student) - self.teacher_embedding(teacher))
        return torch.mean((error[:-1] * error[1:]).sum(dim=1))


class FitNet(nn.Module):
    """Hints, Romero et al., ICLR 2015, arXiv:1412.6550, through a 1x1 convolution with batch normalisation."""

    def __init__(self, student_channels: int, teacher_channels: int) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(student_channels, teacher_channels, 1, bias=False)
        self.normalization = nn.BatchNorm2d(teacher_channels)

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        """Return the loss of maps."""
        return F.mse_loss(self.normalization(self.convolution(student)), teacher)


class VID(nn.Module):
    """Variational information of one stage, Ahn et al., CVPR 2019, arXiv:1904.05835."""

    def __init__(self, student_channels: int, teacher_channels: int, *, initial_variance: float = 5.0) -> None:
        super().__init__()
        self.regressor = nn.Sequential(
            nn.Conv2d(student_channels, teacher_channels, 1, bias=False),
            nn.ReLU(),
            nn.Conv2d(teacher_channels, teacher_channels, 1, bias=False),
            nn.ReLU(),
            nn.Conv2d(teacher_channels, teacher_channels, 1, bias=False),
        )
        self.epsilon = 1e-5
        start = float(np.log(np.exp(initial_variance - self.epsilon) - 1.0))
        self.log_scale = nn.Parameter(torch.full((teacher_channels,), start))

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        """Return the loss of maps."""
        mean = self.regressor(student)
        variance = (torch.log(1.0 + torch.exp(self.log_scale)) + self.epsilon).view(1, -1, 1, 1)
        return torch.mean(0.5 * ((mean - teacher) ** 2 / variance + torch.log(variance)))


class ReviewFusion(nn.Module):
    """One level of knowledge review, Chen et al., CVPR 2021, arXiv:2104.09044."""

    def __init__(self, in_channels: int, channels: int, out_channels: int, *, fuses: bool) -> None:
        super().__init__()
        self.entry = nn.Sequential(nn.Conv2d(in_channels, channels, 1, bias=False), nn.BatchNorm2d(channels))
        self.attention = nn.Sequential(nn.Conv2d(2 * channels, 2, 1), nn.Sigmoid()) if fuses else None
        self.exit = nn.Sequential(
            nn.Conv2d(channels, out_channels, 3, padding=1, bias=False), nn.BatchNorm2d(out_channels)
        )

    def forward(self, maps: Tensor, deeper: Tensor | None, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """Return what is compared with the teacher's maps of this size, and what goes on."""
        fused = self.entry(maps)
        if self.attention is not None and deeper is not None:
            deeper = F.interpolate(deeper, tuple(maps.shape[-2:]), mode="nearest")
            shares = self.attention(torch.cat([fused, deeper], dim=1))
            fused = fused * shares[:, 0:1] + deeper * shares[:, 1:2]
        if tuple(fused.shape[-2:]) != size:
            fused = F.interpolate(fused, size, mode="nearest")
        return self.exit(fused), fused


class Review(nn.Module):
    """Knowledge review, Chen et al., CVPR 2021, arXiv:2104.09044: levels from shallow to deep, fused from the deep end.

    Args:
        student_channels: of each level, the pooled features as the last.
        teacher_channels: likewise.
        channels: of what goes from level to level.
    """

    def __init__(self, student_channels: Sequence[int], teacher_channels: Sequence[int], channels: int) -> None:
        super().__init__()
        last = len(student_channels) - 1
        self.fusions = nn.ModuleList(
            ReviewFusion(own, channels, wanted, fuses=level < last)
            for level, (own, wanted) in enumerate(zip(student_channels, teacher_channels, strict=True))
        )

    def forward(self, student_maps: Sequence[Tensor], teacher_maps: Sequence[Tensor]) -> Tensor:
        """Return the sum over the levels."""
        deeper: Tensor | None = None
        losses: list[Tensor] = []
        for level in reversed(range(len(self.fusions))):
            teacher = teacher_maps[level]
            size = (teacher.shape[2], teacher.shape[3])
            compared, deeper = self.fusions[level](student_maps[level], deeper, size)
            losses.append(_hierarchical_distance(compared, teacher))
        return sum(losses[1:], losses[0])


def _hierarchical_distance(student: Tensor, teacher: Tensor) -> Tensor:
    loss, factor, total = F.mse_loss(student, teacher), 1.0, 1.0
    for side in (4, 2, 1):
        if side >= student.shape[2]:
            continue
        factor /= 2.0
        pooled = F.adaptive_avg_pool2d(student, (side, side)), F.adaptive_avg_pool2d(teacher, (side, side))
        loss = loss + F.mse_loss(*pooled) * factor
        total += factor
    return loss / total


class CRD(nn.Module):
    """Contrastive representation distillation, Tian et al., ICLR 2020, arXiv:1910.10699.

    Args:
        labels: ``[N]`` class of each training example.
        student_size: numbers in the student's vector.
        teacher_size: numbers in the teacher's.
        embedding_size: D of both embeddings and memories.
        num_negatives: M for each example.
        temperature: divides the scalar products.
        momentum: share of the old row in a memory's new one.
    """

    student_memory: Tensor
    teacher_memory: Tensor

    def __init__(
        self, labels: np.ndarray[Any, Any], student_size: int, teacher_size: int, *,
        embedding_size: int, num_negatives: int, temperature: float, momentum: float,
    ) -> None:  # fmt: skip
        super().__init__()
        self.num_examples, self.num_negatives = len(labels), num_negatives
        self.temperature, self.momentum = temperature, momentum
        self.others = [np.flatnonzero(labels != label) for label in range(int(labels.max()) + 1)]
        self.random = np.random.default_rng(0)
        self.student_embedding = nn.Linear(student_size, embedding_size)
        self.teacher_embedding = nn.Linear(teacher_size, embedding_size)
        bound = 1.0 / np.sqrt(embedding_size / 3)
        for name in ("student_memory", "teacher_memory"):
            self.register_buffer(name, torch.rand(len(labels), embedding_size).mul_(2 * bound).add_(-bound))
        self.student_constant = self.teacher_constant = -1.0

    def draw(self, labels: Tensor) -> Tensor:
        """Return ``[B, M]`` examples of other classes, drawn for each image on the host, each once if there are enough.

        Args:
            labels: ``[B]``.
        """
        rows: list[np.ndarray[Any, Any]] = []
        for label in labels.tolist():
            others = self.others[label]
            rows.append(self.random.choice(others, self.num_negatives, replace=len(others) < self.num_negatives))
        return torch.from_numpy(np.stack(rows))

    def forward(self, student: Tensor, teacher: Tensor, indices: Tensor, negatives: Tensor) -> Tensor:
        """Return the loss of vectors, and take their embeddings into the memories.

        Args:
            student: ``[B, D_s]``.
            teacher: ``[B, D_t]``.
            indices: ``[B]`` rows of the training set.
            negatives: ``[B, M]`` rows as :meth:`draw` returns them.
        """
        own = _normalized(self.student_embedding(student))
        wanted = _normalized(self.teacher_embedding(teacher))
        rows = torch.cat([indices.unsqueeze(1), negatives], dim=1)
        student_scores = self._exponentials(own, self.teacher_memory, rows)
        teacher_scores = self._exponentials(wanted, self.student_memory, rows)
        if self.student_constant < 0:
            self.student_constant = (student_scores.mean() * self.num_examples).item()
            self.teacher_constant = (teacher_scores.mean() * self.num_examples).item()
        loss = self._contrast(student_scores / self.student_constant)
        loss = loss + self._contrast(teacher_scores / self.teacher_constant)
        self._remember(self.student_memory, own, indices)
        self._remember(self.teacher_memory, wanted, indices)
        return loss

    def _exponentials(self, embedding: Tensor, memory: Tensor, rows: Tensor) -> Tensor:
        batch, number = rows.shape
        gathered = torch.index_select(memory, 0, rows.view(-1)).view(batch, number, -1)
        return torch.exp(torch.bmm(gathered, embedding.unsqueeze(2)).squeeze(2) / self.temperature)

    def _contrast(self, probabilities: Tensor) -> Tensor:
        noise, epsilon = self.num_negatives / self.num_examples, 1e-7
        positive, negatives = probabilities[:, 0], probabilities[:, 1:]
        log_positive = torch.log(positive / (positive + noise + epsilon))
        log_negatives = torch.log(noise / (negatives + noise + epsilon))
        return -(log_positive.sum() + log_negatives.sum()) / len(probabilities)

    @torch.no_grad()
    def _remember(self, memory: Tensor, embedding: Tensor, indices: Tensor) -> None:
        blended = torch.index_select(memory, 0, indices) * self.momentum + embedding * (1 - self.momentum)
        memory.index_copy_(0, indices, _normalized(blended))


def _normalized(rows: Tensor) -> Tensor:
    return rows / rows.pow(2).sum(dim=1, keepdim=True).sqrt()


def lipschitz(network: nn.Module) -> Tensor:
    """Return the sum of the layers' 1-norms, Dong et al., ICLR 2024, arXiv:2206.06661: layer after layer.

    Args:
        network: of ungrouped convolutions, linear layers and batch norms with weights.
    """
    loss: Tensor | None = None
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            norm = module.weight.abs().sum(dim=(0, 2, 3)).max()
        elif isinstance(module, nn.Linear):
            norm = module.weight.abs().sum(dim=0).max()
        elif isinstance(module, nn.BatchNorm2d) and module.running_var is not None:
            norm = (module.weight.abs() / torch.sqrt(module.running_var + module.eps)).max()
        else:
            continue
        loss = norm if loss is None else loss + norm
    assert loss is not None, "a network has layers"
    return loss


class Consistency(nn.Module):
    """Distance from the mean of an example's earlier predictions, Dong et al., ICLR 2024, arXiv:2206.06661."""

    average: Tensor
    count: Tensor

    def __init__(self, num_examples: int, num_classes: int) -> None:
        super().__init__()
        self.register_buffer("average", torch.zeros(num_examples, num_classes))
        self.register_buffer("count", torch.zeros(num_examples, 1))

    def forward(self, logits: Tensor, indices: Tensor) -> Tensor:
        """Return the loss, and take the predictions into the memory."""
        predictions = F.softmax(logits, dim=1)
        average, count = self.average[indices], self.count[indices]
        known = (count > 0).float()
        loss = (known * (predictions - average).pow(2)).sum() / len(logits)
        self.average[indices] = (average * count + predictions.detach()) / (count + 1)
        self.count[indices] = count + 1
        return loss
