"""The field's way of writing a loss gives the same as ours: only then is a ratio of their times worth something."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from benchmarks.objectives import COMPARED, GIVEN, Material, counterpart, make_material, measure
from torch import Tensor

from benchmarks import field_losses
from soteacher.objective import Objective
from soteacher.objectives import objective_config
from soteacher.types import DistillStep, Outputs

BATCH, EXAMPLES, CLASSES, NEGATIVES = 6, 40, 5, 12
SETTINGS = {"crd": {"num_negatives": NEGATIVES, "embedding_size": 8}}
NAMES = [name for name in COMPARED if name != GIVEN]


@pytest.fixture(scope="module")
def material() -> Material:
    """Two small networks' shapes, with features that differ from example to example as trained ones do."""
    made = make_material("wrn_10_1", "wrn_10_2", batch_size=BATCH, num_examples=EXAMPLES, num_classes=CLASSES)
    return Material(task=made.task, step=random_step(made, 0))


def random_step(made: Material, seed: int) -> DistillStep:
    assert made.task.labels is not None
    generator = torch.Generator().manual_seed(seed)

    def like(outputs: Outputs, *, trained: bool) -> Outputs:
        logits, *features = (
            torch.randn(value.shape, generator=generator).requires_grad_(trained)
            for value in (outputs.logits, *outputs.features.values())
        )
        return Outputs(logits=logits, features=dict(zip(outputs.features, features, strict=True)))

    indices = torch.randperm(EXAMPLES, generator=generator)[:BATCH]
    return replace(
        made.step, indices=indices, labels=made.task.labels[indices], outputs=like(made.step.outputs, trained=True),
        teacher=like(made.step.teacher, trained=False),
    )  # fmt: skip


def built(name: str, material: Material) -> Objective[Any]:
    torch.manual_seed(1)
    return objective_config(name).model_validate(SETTINGS.get(name, {})).build(material.task)


def drawn() -> Tensor:
    return torch.randint(EXAMPLES, (BATCH, NEGATIVES), generator=torch.Generator().manual_seed(2))


def draw_these(objective: Any, negatives: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(objective.others, "draw", lambda *_: negatives)


def value_and_gradients(
    loss: Callable[[DistillStep], Tensor], step: DistillStep, layers: torch.nn.Module
) -> tuple[Tensor, list[Tensor]]:
    outputs = step.outputs
    leaves = [outputs.logits, *outputs.features.values(), *step.model.parameters(), *layers.parameters()]
    value = loss(step)
    gradients = torch.autograd.grad(value, leaves, allow_unused=True)
    return value, [gradient for gradient in gradients if gradient is not None]


@pytest.mark.parametrize("name", NAMES)
def test_field_loss_and_its_gradients_equal_ours(
    name: str, material: Material, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours = built(name, material)
    negatives = drawn() if name == "crd" else None
    theirs = counterpart(ours, material.task, negatives=negatives)
    if negatives is not None:
        draw_these(ours, negatives, monkeypatch)
    step = random_step(material, 3)
    if name == "consistency":  # nothing to be consistent with in the first step
        earlier = replace(random_step(material, 4), indices=step.indices)
        theirs.loss(earlier)
        ours.update(earlier)
    expected, expected_gradients = value_and_gradients(theirs.loss, step, theirs.layers)
    found, gradients = value_and_gradients(ours, step, ours)
    assert found > 0
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-7)
    assert len(gradients) == len(expected_gradients) > 0
    for own, other in zip(by_shape(gradients), by_shape(expected_gradients), strict=True):
        assert (own - other).norm() <= 1e-4 * other.norm() + 1e-7


def by_shape(gradients: list[Tensor]) -> list[Tensor]:
    """Our layers may stand in another order than the field's."""
    return sorted(gradients, key=lambda gradient: (*gradient.shape, round(gradient.norm().item(), 3)))


def test_memories_of_crd_equal_ours_after_two_steps(material: Material, monkeypatch: pytest.MonkeyPatch) -> None:
    ours: Any = built("crd", material)
    negatives = drawn()
    theirs = counterpart(ours, material.task, negatives=negatives)
    draw_these(ours, negatives, monkeypatch)
    for seed in (4, 5):
        step = random_step(material, seed)
        torch.testing.assert_close(ours(step), theirs.loss(step), rtol=1e-5, atol=0)
        ours.update(step)
    layers: Any = theirs.layers
    torch.testing.assert_close(ours.student_memory, layers.student_memory, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(ours.teacher_memory, layers.teacher_memory, rtol=1e-5, atol=1e-6)
    constants = torch.tensor([layers.student_constant, layers.teacher_constant])
    torch.testing.assert_close(ours.log_normalizers.exp(), constants, rtol=1e-5, atol=0)


def test_memory_of_consistency_equals_ours_after_three_steps(material: Material) -> None:
    ours: Any = built("consistency", material)
    memory = field_losses.Consistency(EXAMPLES, CLASSES)
    for seed in (0, 6, 0):
        step = random_step(material, seed)
        torch.testing.assert_close(ours(step), memory(step.outputs.logits, step.indices), rtol=1e-5, atol=1e-7)
        ours.update(step)
    torch.testing.assert_close(ours.average, memory.average, rtol=1e-5, atol=1e-7)
    assert torch.equal(ours.count, memory.count.squeeze(1).long())


@pytest.mark.parametrize("number", [7, 500])
def test_negatives_of_the_field_are_of_other_classes(number: int) -> None:
    labels = np.arange(EXAMPLES) % CLASSES
    loss = field_losses.CRD(labels, 2, 2, embedding_size=2, num_negatives=number, temperature=0.07, momentum=0.5)
    rows = loss.draw(torch.tensor([0, 3]))
    assert rows.shape == (2, number)
    for own, others in zip((0, 3), rows.tolist(), strict=True):
        assert own not in labels[others]
        assert number > EXAMPLES or len(set(others)) == number  # each once where there are enough


def test_measurement_has_both_times_and_their_ratio(material: Material) -> None:
    found = measure("fitnet", material, material.channels_last(), rounds=2)
    assert set(found["milliseconds"]) == {"field", "ours"}
    assert found["ratio"]["quartile_low"] <= found["ratio"]["median"] <= found["ratio"]["quartile_high"]
    assert all(leaf.grad is None for leaf in material.leaves())
