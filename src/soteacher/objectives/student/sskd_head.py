"""The stage before SSKD: a head on the frozen teacher learns which image a rotated view is of."""

from __future__ import annotations

from typing import ClassVar, final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from soteacher.errors import InputError
from soteacher.objective import Objective, ObjectiveConfig, Stage
from soteacher.objectives.features import as_vectors, facts_of, vector_shape
from soteacher.precision import at_least_float32, full_precision
from soteacher.types import DistillStep, Task, View

EPSILON = 1e-12


def view_similarity(views: Tensor, images: Tensor) -> Tensor:
    r"""Cosine of each view's embedding with that of each image.

    .. math:: v_i \cdot x_j / (\|v_i\| \, \|x_j\|), \quad \|v\|^2 = \textstyle\sum_d v_d^2 + 10^{-12}

    Args:
        views: ``[V, D]``; gradients flow.
        images: ``[B, D]``; gradients flow.

    Returns:
        ``[V, B]`` in [-1, 1], float32 (float64 from float64).

    Raises:
        InputError: the embeddings are not of one width.

    Source: Xu et al., ECCV 2020, arXiv:2006.07114.
    """
    if views.ndim != 2 or images.ndim != 2 or views.shape[1] != images.shape[1]:
        raise InputError(
            f"embeddings must be [V, D] and [B, D], got {list(views.shape)} (views) and {list(images.shape)} (images)"
        )
    with full_precision(views):
        return _normalized(views) @ _normalized(images).T


def _normalized(embeddings: Tensor) -> Tensor:
    embeddings = at_least_float32(embeddings)
    return embeddings * (embeddings.square().sum(dim=1, keepdim=True) + EPSILON).rsqrt()


def view_contrast(similarity: Tensor) -> Tensor:
    r"""Cross-entropy of finding the image that each view is of, one value per view.

    .. math:: -\log \frac{\exp s_{i, i \bmod B}}{\sum_j \exp s_{ij}}

    Args:
        similarity: ``[V, B]``, the views of one kind together, each kind in the order of the images; gradients flow.

    Returns:
        ``[V]``, nats.

    Raises:
        InputError: there are not so many views of each image.

    Source: Xu et al., ECCV 2020, arXiv:2006.07114; without a temperature, as released.
    """
    return F.cross_entropy(at_least_float32(similarity), own_images(similarity), reduction="none")


def own_images(similarity: Tensor) -> Tensor:
    """Return the place of the image that each view is of, as :func:`view_contrast` counts them: ``[V]`` int64.

    Args:
        similarity: ``[V, B]``.

    Raises:
        InputError: V is no multiple of B.
    """
    num_views, num_images = similarity.shape
    if num_views % num_images:
        raise InputError(f"as many views of each image are wanted, got {num_views} views of {num_images} images")
    return torch.arange(num_images, device=similarity.device).repeat(num_views // num_images)


@final
class SelfSupervisionHead(nn.Module):
    """Two layers that turn pooled features into embeddings of the same width, and compare views with images.

    Args:
        width: of the pooled feature.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, width))

    def forward(self, views: Tensor, images: Tensor) -> Tensor:
        """Return the similarity ``[V, B]`` of pooled features ``[V, D]`` of views and ``[B, D]`` of images."""
        with full_precision(images):
            return view_similarity(self.layers(as_vectors(views)), self.layers(as_vectors(images)))


class SSKDHeadConfig(ObjectiveConfig):
    """Settings of :class:`SSKDHead`."""

    is_taken_over: ClassVar[bool] = True
    reads: ClassVar[str] = "`pooled` of the teacher, also of the turned images"
    needs_teacher: ClassVar[bool] = True
    stage: Stage = "preparation"
    """When the head is trained: in the ``preparation``, as the student's training takes it over finished."""

    def build(self, task: Task) -> SSKDHead:
        """Return the objective for the width of the teacher's pooled feature."""
        return SSKDHead(vector_shape(facts_of(task)[1], "pooled")[0])


@final
class SSKDHead(Objective[DistillStep]):
    """Train a head on the teacher's pooled feature to tell of which image a rotated view is; see :func:`view_contrast`.

    Args:
        width: of the teacher's pooled feature.
    """

    name = "sskd_head"
    teacher_features = ("pooled",)
    trains_network = False
    views: ClassVar[tuple[View, ...]] = ("rotated",)

    def __init__(self, width: int) -> None:
        super().__init__()
        self.head = SelfSupervisionHead(width)

    def forward(self, step: DistillStep) -> Tensor:
        """Return the mean over the views."""
        views, images = step.teacher_views["rotated"].features["pooled"], step.teacher.features["pooled"]
        return view_contrast(self.head(views.detach(), images.detach())).mean()
