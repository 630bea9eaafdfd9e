import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from soteacher.errors import InputError
from soteacher.objectives.student import crd as module
from soteacher.objectives.student import crd_kd
from soteacher.objectives.student.crd import (
    CRD,
    METHOD,
    CRDConfig,
    blended_directions,
    contrast_scores,
    contrastive_negative_log_likelihood,
    log_contrast_normalizer,
)
from soteacher.types import DistillStep, NetworkFacts, Task

EXAMPLES, CLASSES, SIZE = 60, 5, 6
LABELS = torch.arange(EXAMPLES).square() % CLASSES  # unequal classes; two of them are empty


def facts(size: int, name: str) -> NetworkFacts:
    return NetworkFacts(name=name, taps={"stage1": (size, 2, 2), "pooled": (size,)}, num_logits=CLASSES)


def make_task(labels: Tensor | None = LABELS, examples: int = EXAMPLES, size: int = SIZE) -> Task:
    return Task(
        num_examples=examples,
        num_classes=CLASSES,
        labels=labels,
        network=facts(size, "student"),
        teacher=facts(size, "teacher"),
    )


def make_objective(**settings: Any) -> CRD:
    torch.manual_seed(0)
    return CRDConfig.model_validate({"embedding_size": 4, "num_negatives": 20, **settings}).build(make_task())


@pytest.fixture
def batch(make_step: Callable[..., DistillStep]) -> DistillStep:
    torch.manual_seed(1)
    indices = (3, 17, 41, 58)
    student, teacher = torch.randn(4, SIZE).requires_grad_(), torch.randn(4, SIZE)
    step = make_step(
        nn.Identity(),
        logits=torch.randn(4, CLASSES),
        indices=indices,
        features={"pooled": student},
        teacher_features={"pooled": teacher},
    )
    return replace(step, labels=LABELS[list(indices)], seed=7)


@pytest.fixture
def released(golden: Callable[[str], dict[str, Tensor]]) -> dict[str, Tensor]:
    return golden("crd")


def released_objective(given: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch) -> CRD:
    """The objective with the released code's memories and draws, and embeddings that change nothing."""
    examples, size = given["student_memory"].shape
    settings = {
        "embedding_size": size,
        "temperature": float(given["temperature"]),
        "momentum": float(given["momentum"]),
    }
    labels = torch.arange(examples) % CLASSES
    objective = CRDConfig.model_validate(settings).build(make_task(labels, examples, size))
    for layer in (objective.student_embedding, objective.teacher_embedding):
        nn.init.eye_(layer.weight)
        nn.init.zeros_(layer.bias)
    objective.student_memory.copy_(given["student_memory"])
    objective.teacher_memory.copy_(given["teacher_memory"])
    monkeypatch.setattr(objective.others, "draw", lambda *_: given["contrast_indices"][:, 1:])
    return objective


def released_step(given: dict[str, Tensor], make_step: Callable[..., DistillStep], student: Tensor) -> DistillStep:
    return make_step(
        nn.Identity(),
        logits=torch.randn(len(student), CLASSES),
        indices=tuple(given["indices"].tolist()),
        features={"pooled": student},
        teacher_features={"pooled": given["teacher_embedding"]},
    )


def test_crd_equals_released_code(
    released: dict[str, Tensor], make_step: Callable[..., DistillStep], monkeypatch: pytest.MonkeyPatch
) -> None:
    objective = released_objective(released, monkeypatch)
    # Through the normalisation of the embedding no gradient flows along it; the reference stops before that.
    student = released["student_embedding"].clone().requires_grad_()
    step = released_step(released, make_step, student)
    value = objective(step)
    torch.testing.assert_close(value, released["value"], rtol=1e-5, atol=0)
    value.backward()
    assert student.grad is not None
    direction, gradient = released["student_embedding"], released["grad_student_embedding"]
    expected = gradient - (gradient * direction).sum(dim=1, keepdim=True) * direction
    assert (student.grad - expected).norm() / expected.norm() < 1e-4


def test_crd_gradient_equals_released_code(released: dict[str, Tensor]) -> None:
    student = released["student_embedding"].requires_grad_()
    sides = ((student, released["teacher_memory"]), (released["teacher_embedding"], released["student_memory"]))
    value = torch.zeros(())
    for embedding, memory in sides:
        scores = contrast_scores(embedding, memory, released["contrast_indices"], temperature=0.07)
        normalizer = log_contrast_normalizer(scores, num_examples=len(memory))
        value = value + contrastive_negative_log_likelihood(scores - normalizer, num_examples=len(memory)).mean()
    torch.testing.assert_close(value, released["value"], rtol=1e-5, atol=0)
    value.backward()
    assert student.grad is not None
    error = (student.grad - released["grad_student_embedding"]).norm() / released["grad_student_embedding"].norm()
    assert error < 1e-4


def test_crd_update_equals_released_code(
    released: dict[str, Tensor], make_step: Callable[..., DistillStep], monkeypatch: pytest.MonkeyPatch
) -> None:
    objective = released_objective(released, monkeypatch)
    objective.update(released_step(released, make_step, released["student_embedding"]))
    expected = torch.stack([released["normalizer_student"], released["normalizer_teacher"]])
    torch.testing.assert_close(objective.log_normalizers.exp(), expected, rtol=1e-5, atol=0)
    torch.testing.assert_close(objective.student_memory, released["student_memory_after"], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(objective.teacher_memory, released["teacher_memory_after"], rtol=1e-5, atol=1e-6)


def test_contrastive_likelihood_by_hand() -> None:
    probabilities = np.array([[0.5, 0.1, 0.2]])
    noise = 2 / 10
    expected = -np.log(0.5 / (0.5 + noise)) - np.log(noise / (0.1 + noise)) - np.log(noise / (0.2 + noise))
    value = contrastive_negative_log_likelihood(torch.from_numpy(probabilities).log(), num_examples=10)
    torch.testing.assert_close(value, torch.tensor([expected]), rtol=1e-5, atol=0)


def test_contrastive_likelihood_gradient_and_extremes() -> None:
    torch.manual_seed(0)
    logs = torch.randn(3, 5, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: contrastive_negative_log_likelihood(x, num_examples=9), logs)
    far = torch.tensor([[-900.0, 900.0]]).requires_grad_()
    value = contrastive_negative_log_likelihood(far, num_examples=9)
    value.sum().backward()
    assert value.isfinite().all()
    assert far.grad is not None
    assert far.grad.isfinite().all()


@pytest.mark.parametrize("ratio", [16, 0])
def test_contrast_scores_of_both_ways_equal_numpy(ratio: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "DENSE_RATIO", ratio)
    monkeypatch.setattr(module, "GATHERED_NUMBERS", {"cpu": 2 * 7 * 3})  # two examples at a time
    torch.manual_seed(0)
    embedding, memory = torch.randn(5, 3, dtype=torch.float64).requires_grad_(), torch.randn(11, 3).double()
    rows = torch.randint(11, (5, 7))
    expected = np.einsum("bd,bmd->bm", embedding.detach().numpy(), memory.numpy()[rows.numpy()]) / 0.5
    scores = contrast_scores(embedding, memory, rows, temperature=0.5)
    torch.testing.assert_close(scores.detach(), torch.from_numpy(expected))
    assert torch.autograd.gradcheck(lambda x: contrast_scores(x, memory, rows, temperature=0.5), embedding)


def test_log_contrast_normalizer_by_hand() -> None:
    scores = torch.tensor([[1.0, 2.0], [0.0, -1.0]], requires_grad=True)
    found = log_contrast_normalizer(scores, num_examples=30)
    expected = np.log(np.exp([1.0, 2.0, 0.0, -1.0]).mean() * 30)
    assert not found.requires_grad
    assert float(found) == pytest.approx(expected, rel=1e-6)


def test_blended_directions_by_hand() -> None:
    found = blended_directions(torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0]]), momentum=0.25)
    torch.testing.assert_close(found, torch.tensor([[0.25, 0.75]]) / np.sqrt(0.625))


def test_negatives_are_never_of_the_own_class_and_reach_every_other_example() -> None:
    others = make_objective().others
    labels = torch.tensor([0, 1, 4, 1])
    rows = others.draw(labels, 4000, torch.Generator().manual_seed(0))
    for label, drawn in zip(labels, rows, strict=True):
        assert set(drawn.tolist()) == set(torch.nonzero(label != LABELS).flatten().tolist())


def test_negatives_are_uniform() -> None:
    others = make_objective().others
    rows = others.draw(torch.zeros(1, dtype=torch.int64), 200_000, torch.Generator().manual_seed(0))
    counts = rows[0].bincount(minlength=EXAMPLES)[LABELS != 0].double()
    expected = 200_000 / len(counts)
    assert ((counts - expected).square() / expected).sum() < 2 * len(counts)  # chi-squared, mean len - 1


def test_negatives_depend_on_the_seed_of_the_step_only(batch: DistillStep) -> None:
    objective = make_objective()
    random = torch.get_rng_state()
    first, second = objective(batch), objective(batch)
    assert torch.equal(first, second)
    assert torch.equal(torch.get_rng_state(), random)
    assert not torch.equal(first, objective(replace(batch, seed=8)))


def test_forward_changes_no_state_and_normalizers_stay(batch: DistillStep) -> None:
    objective = make_objective()
    before = copy.deepcopy(objective.state_dict())
    objective(batch)
    for key, value in objective.state_dict().items():
        torch.testing.assert_close(value, before[key], rtol=0, atol=0, equal_nan=True)
    first = objective(batch)
    objective.update(batch)
    set_once = objective.log_normalizers.clone()
    assert set_once.isfinite().all()
    objective.update(replace(batch, seed=9))
    assert torch.equal(objective.log_normalizers, set_once)
    assert first.isfinite()


def test_normalizers_of_the_first_step_are_those_that_update_keeps(batch: DistillStep) -> None:
    objective = make_objective()
    first = objective(batch)
    memories = objective.student_memory.clone(), objective.teacher_memory.clone()
    objective.update(batch)
    objective.student_memory.copy_(memories[0])
    objective.teacher_memory.copy_(memories[1])
    torch.testing.assert_close(objective(batch), first, rtol=1e-6, atol=0)


def test_update_touches_only_the_rows_of_the_batch(batch: DistillStep) -> None:
    objective = make_objective()
    before = objective.student_memory.clone()
    objective.update(batch)
    changed = (objective.student_memory != before).any(dim=1)
    assert torch.equal(changed.nonzero().flatten(), batch.indices)
    torch.testing.assert_close(objective.student_memory[batch.indices].norm(dim=1), torch.ones(4))
    assert not objective.student_memory.requires_grad


def test_saved_state_resumes(batch: DistillStep) -> None:
    objective = make_objective()
    objective.update(batch)
    resumed = CRDConfig(embedding_size=4, num_negatives=20).build(make_task())
    resumed.load_state_dict(objective.state_dict())
    assert torch.equal(resumed(batch), objective(batch))


def test_memories_start_about_as_long_as_embeddings() -> None:
    torch.manual_seed(0)
    memory = CRDConfig().build(make_task()).student_memory
    assert memory.abs().max() <= np.sqrt(3 / 128)
    torch.testing.assert_close(memory.square().sum(dim=1).mean(), torch.tensor(1.0), rtol=0.03, atol=0)


def test_gradients_reach_student_and_both_embeddings_but_no_teacher(batch: DistillStep) -> None:
    objective = make_objective()
    objective(batch).backward()
    for value in (batch.outputs.features["pooled"], *objective.parameters()):
        assert value.grad is not None
        assert value.grad.isfinite().all()
        assert value.grad.abs().sum() > 0


def test_fewer_others_than_negatives_are_drawn_more_than_once(batch: DistillStep) -> None:
    assert make_objective(num_negatives=500)(batch).isfinite()


@pytest.mark.parametrize("feature", [torch.zeros(4, SIZE), torch.ones(4, SIZE)], ids=["zero", "equal"])
def test_constant_features_give_finite_gradients(batch: DistillStep, feature: Tensor) -> None:
    student = feature.clone().requires_grad_()
    outputs = replace(batch.outputs, features={"pooled": student})
    value = make_objective()(replace(batch, outputs=outputs))
    value.backward()
    assert value.isfinite()
    assert student.grad is not None
    assert student.grad.isfinite().all()


def test_one_example_is_enough(make_pair: Callable[[str], Any]) -> None:
    made = make_pair("same family")
    objective = CRDConfig(num_negatives=16).build(made.task)
    value = objective(made.step(objective, batch=1))
    value.backward()
    assert value.isfinite()


def test_two_steps_lower_the_loss(batch: DistillStep) -> None:
    objective = make_objective()
    student = batch.outputs.features["pooled"]
    optimizer = torch.optim.SGD([student, *objective.parameters()], lr=0.01)
    first = objective(batch)
    for _ in range(2):
        optimizer.zero_grad()
        objective(batch).backward()
        optimizer.step()
    assert objective(batch) < first


def test_autocast_changes_nothing(batch: DistillStep) -> None:
    objective = make_objective()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = objective(batch)
    torch.testing.assert_close(mixed, objective(batch), rtol=1e-6, atol=0)


@pytest.mark.parametrize("pair", ["same family", "other family", "transformer teacher", "transformer student"])
def test_crd_works_on_every_pair(make_pair: Callable[[str], Any], pair: str) -> None:
    made = make_pair(pair)
    objective = CRDConfig(num_negatives=64).build(made.task)
    step = made.step(objective)
    step = replace(step, labels=made.task.labels[step.indices])
    value = objective(step)
    value.backward()
    assert value.isfinite()
    assert value > 0
    assert any(weight.grad is not None and weight.grad.abs().sum() > 0 for weight in made.student.parameters())


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (None, r"needs labels \[60\], got none"),
        (torch.zeros(3, dtype=torch.int64), r"needs labels \[60\], got \[3\]"),
        (torch.zeros(EXAMPLES, dtype=torch.int64), "at least two"),
    ],
    ids=["none", "too few", "one class"],
)
def test_data_without_other_classes_are_refused(labels: Tensor | None, message: str) -> None:
    with pytest.raises(InputError, match=message):
        CRDConfig().build(make_task(labels))


def test_two_pairs_are_refused() -> None:
    config = CRDConfig(student_taps=("stage1", "pooled"), teacher_taps=("stage1", "pooled"))
    with pytest.raises(InputError, match="crd compares one pair of features, got 2 taps a side: stage1, pooled"):
        config.build(make_task())


def test_functions_refuse_what_does_not_fit() -> None:
    with pytest.raises(InputError, match=r"got \[4, 1\] and 9 examples"):
        contrastive_negative_log_likelihood(torch.zeros(4, 1), num_examples=9)
    with pytest.raises(InputError, match=r"got \[4, 3\], \[9, 2\] and \[4, 5\]"):
        contrast_scores(torch.zeros(4, 3), torch.zeros(9, 2), torch.zeros(4, 5).long(), temperature=1.0)
    with pytest.raises(InputError, match="temperature must be positive and finite, got 0"):
        contrast_scores(torch.zeros(4, 3), torch.zeros(9, 3), torch.zeros(4, 5).long(), temperature=0.0)


def test_methods_have_the_published_weights() -> None:
    assert METHOD.terms == {"cross_entropy": {"weight": 1.0}, "crd": {"weight": 0.8}}
    assert crd_kd.METHOD.terms["kd"] == {"weight": 1.0, "temperature": 4.0}
    config = CRDConfig()
    assert (config.embedding_size, config.num_negatives, config.temperature, config.momentum) == (128, 16384, 0.07, 0.5)
