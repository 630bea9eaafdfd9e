from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from soteacher.errors import InputError
from soteacher.objectives.student.kdpp import KDPP, METHOD, KDPPConfig, class_means, norm_direction_gap
from soteacher.types import DistillStep, NetworkFacts, Task

CLASSES, SIZE = 4, 3


def build(student: int = SIZE) -> KDPP:
    task = Task(
        num_examples=9,
        num_classes=CLASSES,
        network=NetworkFacts(name="student", taps={"stage1": (1, 2, 2), "pooled": (student,)}, num_logits=CLASSES),
        teacher=NetworkFacts(name="teacher", taps={"stage1": (1, 2, 2), "pooled": (SIZE,)}, num_logits=CLASSES),
    )
    return KDPPConfig().build(task)


@pytest.fixture
def step(make_step: Callable[..., DistillStep]) -> DistillStep:
    torch.manual_seed(0)
    made = make_step(
        nn.Identity(),
        logits=torch.randn(4, CLASSES),
        features={"pooled": torch.randn(4, SIZE)},
        teacher_features={"pooled": torch.randn(4, SIZE)},
    )
    return replace(made, labels=torch.tensor([0, 2, 2, 3]))


def with_teacher(step: DistillStep, feature: Tensor) -> DistillStep:
    return replace(step, teacher=replace(step.teacher, features={"pooled": feature}))


def test_norm_direction_gap_equals_numpy() -> None:
    rng = np.random.default_rng(0)
    student, teacher, centers = (rng.standard_normal((5, 3)) * scale for scale in (2.0, 1.0, 3.0))
    expected = [
        1 - s @ (c / np.linalg.norm(c)) / max(np.linalg.norm(s), np.linalg.norm(t))
        for s, t, c in zip(student, teacher, centers, strict=True)
    ]
    found = norm_direction_gap(*(torch.from_numpy(x) for x in (student, teacher, centers)))
    torch.testing.assert_close(found, torch.tensor(expected), rtol=1e-6, atol=1e-7)


def test_norm_direction_gap_is_zero_for_long_features_along_the_center() -> None:
    center, teacher = torch.tensor([[3.0, 4.0]]), torch.tensor([[1.0, 0.0]])
    for length, expected in ((2.0, 0.0), (1.0, 0.0), (0.5, 0.5)):  # half as long as the teacher: half of it lacks
        found = norm_direction_gap(length * center / 5, teacher, center)
        torch.testing.assert_close(found, torch.tensor([expected]), rtol=1e-6, atol=1e-6)


def test_norm_direction_gap_gradient_reaches_the_student_only() -> None:
    torch.manual_seed(0)
    student, teacher, centers = (torch.randn(4, 3, dtype=torch.float64).requires_grad_() for _ in range(3))
    fixed = teacher.detach(), centers.detach()
    assert torch.autograd.gradcheck(lambda x: norm_direction_gap(x, *fixed), student)
    norm_direction_gap(student, teacher, centers).sum().backward()
    assert teacher.grad is None
    assert centers.grad is None


def test_class_means_equal_numpy() -> None:
    torch.manual_seed(0)
    features, labels = torch.randn(7, 2), torch.tensor([0, 3, 3, 1, 0, 3, 1])
    means, counts = class_means(features, labels, num_classes=5)
    assert counts.tolist() == [2, 2, 0, 3, 0]
    for label in (0, 1, 3):
        torch.testing.assert_close(means[label], torch.as_tensor(features.numpy()[labels.numpy() == label].mean(0)))
    assert means[[2, 4]].abs().sum() == 0


def test_kdpp_uses_the_means_of_the_batch_before_the_first_update(step: DistillStep) -> None:
    teacher = step.teacher.features["pooled"]
    centers = torch.stack([teacher[0], teacher[1:3].mean(0), teacher[1:3].mean(0), teacher[3]])
    expected = norm_direction_gap(step.outputs.features["pooled"], teacher, centers).mean()
    torch.testing.assert_close(build()(step), expected)


def test_kdpp_means_are_those_of_all_features_so_far(step: DistillStep) -> None:
    objective, seen = build(), torch.randn(3, 4, SIZE)
    labels = [torch.tensor([0, 2, 2, 3]), torch.tensor([2, 2, 0, 0]), torch.tensor([3, 0, 2, 0])]
    for feature, label in zip(seen, labels, strict=True):
        objective.update(replace(with_teacher(step, feature), labels=label))
    everything, label = seen.flatten(0, 1), torch.cat(labels)
    assert objective.counts.tolist() == label.bincount(minlength=CLASSES).tolist()
    for known in (0, 2, 3):
        torch.testing.assert_close(objective.means[known], everything[label == known].mean(0))
    # A class that has come up uses its stored mean, one that has not the batch's.
    mixed = replace(step, labels=torch.tensor([0, 1, 1, 3]))
    teacher = step.teacher.features["pooled"]
    own = teacher[1:3].mean(0)
    centers = torch.stack([objective.means[0], own, own, objective.means[3]])
    expected = norm_direction_gap(step.outputs.features["pooled"], teacher, centers).mean()
    torch.testing.assert_close(objective(mixed), expected)


def test_kdpp_state_resumes(step: DistillStep) -> None:
    torch.manual_seed(0)
    objective = build(student=5)
    step = replace(step, outputs=replace(step.outputs, features={"pooled": torch.randn(4, 5)}))
    objective.update(step)
    resumed = build(student=5)
    resumed.load_state_dict(objective.state_dict())
    assert torch.equal(resumed(step), objective(step))


def test_kdpp_embeds_students_of_another_size_only() -> None:
    assert list(build().parameters()) == []
    assert len(list(build(student=5).parameters())) == 4


def test_functions_refuse_what_does_not_fit() -> None:
    with pytest.raises(InputError, match=r"got \[4, 3\], \[4, 3\] and \[4, 2\]"):
        norm_direction_gap(torch.zeros(4, 3), torch.zeros(4, 3), torch.zeros(4, 2))
    with pytest.raises(InputError, match=r"got \[4, 3\] and \[3\]"):
        class_means(torch.zeros(4, 3), torch.zeros(3).long(), num_classes=2)


def test_kdpp_has_the_released_weights() -> None:
    assert {term: settings["weight"] for term, settings in METHOD.terms.items()} == {
        "cross_entropy": 1.0, "kd": 1.0, "kdpp": 2.0,
    }  # fmt: skip
