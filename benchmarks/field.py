"""The field's way of training on CIFAR, written anew after its usual recipe: what our figures are compared with.

Images are augmented one by one as Python objects, networks run eagerly in NCHW and float32, stochastic gradient descent
is PyTorch's as it comes, and the loss and two accuracies are read back in every step.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from benchmarks.field_losses import Consistency, lipschitz
from soteacher.data import FolderImages, ImageSplit
from soteacher.data.augment import Views
from soteacher.errors import InputError
from soteacher.models.taps import Tapped, resolve_taps
from soteacher.torchvision_operators import define_missing_operators
from soteacher.types import Outputs

define_missing_operators()

from torchvision import transforms  # noqa: E402  # what it needs is defined in the line before

SIZE, PADDING = 32, 4
"""Side of CIFAR's images, and the black pixels around them before they are cropped."""
LEARNING_RATE, MOMENTUM, WEIGHT_DECAY = 0.05, 0.9, 5e-4
LIPSCHITZ_WEIGHT = 1e-5

Regularizer = Callable[[nn.Module, Tensor, Tensor], Tensor]
"""``(network, logits [B, K], indices [B])`` to a weighted scalar that is added to the loss."""
Criterion = Callable[[Outputs, Outputs, Tensor, Tensor], Tensor]
"""``(student's outputs, teacher's outputs, labels, indices)`` to the scalar of a distillation method."""


class FieldImages(Dataset[tuple[Tensor, int, int]]):
    """CIFAR's images as bytes, each turned into a PIL image, augmented and normalised when it is asked for.

    Args:
        split: of ``[N, 3, 32, 32]`` uint8 images.
        mean: by channel.
        std: by channel.

    Raises:
        InputError: the images are of another kind.
    """

    def __init__(self, split: ImageSplit, mean: Sequence[float], std: Sequence[float]) -> None:
        if isinstance(split.images, FolderImages) or split.images.dtype != torch.uint8:
            raise InputError("the field's way wants uint8 images in memory")
        if split.image_shape != (3, SIZE, SIZE):
            raise InputError(f"the field's way wants images [3, {SIZE}, {SIZE}], got {list(split.image_shape)}")
        self._images = split.images.permute(0, 2, 3, 1).contiguous().numpy()
        self._labels = split.labels.tolist()
        self.transform = transforms.Compose(
            [
                transforms.RandomCrop(SIZE, padding=PADDING),
                transforms.RandomHorizontalFlip(),
                transforms.ToTensor(),
                transforms.Normalize(mean, std),
            ]
        )

    def __len__(self) -> int:
        return len(self._labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int, int]:
        return cast("Tensor", self.transform(Image.fromarray(self._images[index]))), self._labels[index], index


def field_loader(
    split: ImageSplit, mean: Sequence[float], std: Sequence[float], *, batch_size: int, workers: int, seed: int
) -> DataLoader[Any]:
    """Return the shuffled loader of :class:`FieldImages`: batches of images, labels and indices.

    Worker processes stay from one epoch to the next: a measurement of a few batches is not to pay for their start.
    """
    return DataLoader(
        FieldImages(split, mean, std), batch_size=batch_size, shuffle=True, num_workers=workers,
        persistent_workers=workers > 0, generator=torch.Generator().manual_seed(seed),
    )  # fmt: skip


def draws_of_torchvision(count: int) -> Views:
    """Return what :class:`FieldImages` draws for the next images that are asked for, as our own augmentation takes it.

    The random state goes on as if the images had been asked for.
    """
    draws = [(_draw_place(), _draw_place(), bool(torch.rand(1) < 0.5)) for _ in range(count)]
    return Views(
        offsets=torch.tensor([(top, left) for top, left, _ in draws]), flips=torch.tensor([flip for *_, flip in draws])
    )


def _draw_place() -> int:
    return int(torch.randint(0, 2 * PADDING + 1, size=(1,)).item())


class FieldTeacher:
    """A teacher in training.

    Args:
        network: takes normalised images, on the device that it is trained on.
        regularizers: what is added to the cross-entropy.
    """

    def __init__(self, network: nn.Module, regularizers: Sequence[Regularizer] = ()) -> None:
        self.network = network.train()
        self.optimizer = _optimizer(network.parameters())
        self._regularizers = regularizers
        self._device = next(network.parameters()).device

    def step(self, images: Tensor, labels: Tensor, indices: Tensor) -> float:
        """Take a step on a batch of normalised images and return its loss."""
        images, labels, indices = (tensor.to(self._device) for tensor in (images, labels, indices))
        logits = self.network(images)
        loss = F.cross_entropy(logits, labels)
        for regularizer in self._regularizers:
            loss = loss + regularizer(self.network, logits, indices)
        return _finish(self.optimizer, loss, logits, labels)


class FieldStudent:
    """A student in training, beside its frozen teacher.

    Args:
        student: takes normalised images, on the device that it is trained on.
        teacher: likewise; it is frozen.
        criterion: the loss of the distillation method; what it has to train is trained if it is a module.
        label_weight: of the cross-entropy.
        distillation_weight: of the criterion.
        features: taps of the student that the criterion reads.
        teacher_features: taps of the teacher that it reads.
    """

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module,
        criterion: Criterion,
        *,
        label_weight: float,
        distillation_weight: float,
        features: Sequence[str] = (),
        teacher_features: Sequence[str] = (),
    ) -> None:
        self.student = Tapped(student, resolve_taps(student, features)).train()
        self.teacher = Tapped(teacher, resolve_taps(teacher, teacher_features)).eval()
        trained = nn.ModuleList([self.student, *([criterion] if isinstance(criterion, nn.Module) else [])])
        self.optimizer = _optimizer(trained.parameters())
        self._criterion = criterion
        self._weights = label_weight, distillation_weight
        self._device = next(student.parameters()).device

    def step(self, images: Tensor, labels: Tensor, indices: Tensor) -> float:
        """Take a step on a batch of normalised images and return its loss."""
        images, labels, indices = (tensor.to(self._device) for tensor in (images, labels, indices))
        logits, features = self.student(images)
        with torch.no_grad():
            teacher_logits, teacher_features = self.teacher(images)
        distillation = self._criterion(
            Outputs(logits=logits, features=features),
            Outputs(logits=teacher_logits, features=teacher_features),
            labels,
            indices,
        )
        label_weight, distillation_weight = self._weights
        loss = label_weight * F.cross_entropy(logits, labels) + distillation_weight * distillation
        return _finish(self.optimizer, loss, logits, labels)


def soteacher_regularizers(
    num_examples: int, num_classes: int, *, ramp: float, device: torch.device | str = "cpu"
) -> list[Regularizer]:
    """Return the two terms of SoTeacher at the weights of its recipe.

    Args:
        num_examples: of the training set, N.
        num_classes: K.
        ramp: share of the consistency term's weight that is in force, in (0, 1].
        device: where the network is.
    """
    memory = Consistency(num_examples, num_classes).to(device)
    return [
        lambda network, logits, indices: LIPSCHITZ_WEIGHT * lipschitz(network),  # noqa: ARG005
        lambda network, logits, indices: ramp * memory(logits, indices),  # noqa: ARG005
    ]


def _optimizer(parameters: Any) -> torch.optim.SGD:
    return torch.optim.SGD(parameters, lr=LEARNING_RATE, momentum=MOMENTUM, weight_decay=WEIGHT_DECAY)


def _finish(optimizer: torch.optim.SGD, loss: Tensor, logits: Tensor, labels: Tensor) -> float:
    """Read the figures of a step, go back through it and move the weights; return the loss."""
    value = loss.item()
    _accuracies(logits, labels)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return value


@torch.no_grad()
def _accuracies(logits: Tensor, labels: Tensor) -> tuple[float, float]:
    """Return the shares of examples whose label is the first, and among the first five, of the predictions."""
    right = logits.topk(min(5, logits.shape[1]), dim=1).indices == labels[:, None]
    return right[:, :1].float().sum(1).mean().item(), right.float().sum(1).mean().item()
