from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from soteacher.types import DistillStep, Outputs, Task

GOLDEN = Path(__file__).parents[1] / "data" / "golden"


@pytest.fixture
def golden() -> Callable[[str], dict[str, Tensor]]:
    """Reference values by name, computed with the authors' released code; see ``tests/data/golden``."""

    def read(name: str) -> dict[str, Tensor]:
        with np.load(GOLDEN / f"{name}.npz") as arrays:
            return {key: torch.from_numpy(arrays[key]) for key in arrays.files}

    return read


@pytest.fixture
def task() -> Task:
    return Task(num_examples=12, num_classes=5)


@pytest.fixture
def network() -> nn.Module:
    """A network with one layer of each kind, whose running statistics and weights differ from their initial ones."""
    torch.manual_seed(0)
    network = nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1, bias=False),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(4, 5),
    )
    for parameter in network.parameters():
        nn.init.normal_(parameter)
    network(torch.randn(16, 3, 6, 6))
    return network


@pytest.fixture
def make_step() -> Callable[..., DistillStep]:
    """Build a step around a network's outputs for a seeded batch; it serves teacher and student objectives alike."""

    def make(
        network: nn.Module,
        *,
        seed: int = 0,
        indices: tuple[int, ...] = (1, 3, 5, 7),
        dtype: torch.dtype = torch.float32,
        logits: Tensor | None = None,
        epoch: int = 0,
        num_epochs: int = 4,
    ) -> DistillStep:
        generator = torch.Generator().manual_seed(seed)
        images = torch.rand(len(indices), 3, 6, 6, generator=generator)
        student = network(images) if logits is None else logits
        teacher = torch.randn(student.shape, generator=generator)
        return DistillStep(
            images=images,
            labels=torch.randint(0, student.shape[1], (len(indices),), generator=generator),
            indices=torch.tensor(indices),
            outputs=Outputs(logits=student.to(dtype), features={}),
            model=network,
            epoch=epoch,
            num_epochs=num_epochs,
            progress=epoch / num_epochs,
            teacher=Outputs(logits=teacher.to(dtype), features={}),
        )

    return make
