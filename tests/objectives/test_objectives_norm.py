import numpy as np
import pytest
import torch

from soteacher.errors import InputError
from soteacher.objectives.student.norm import METHOD, NORMConfig, segment_distance
from soteacher.types import NetworkFacts, Task


def test_segment_distance_equals_numpy() -> None:
    torch.manual_seed(0)
    expanded, teacher = torch.randn(2, 6, 3, 4), torch.randn(2, 2, 3, 4)
    segments = np.split(expanded.numpy(), 3, axis=1)
    expected = sum(((segment - teacher.numpy()) ** 2).mean(axis=(1, 2, 3)) for segment in segments)
    torch.testing.assert_close(segment_distance(expanded, teacher), torch.as_tensor(expected))


def test_segment_distance_is_zero_where_each_segment_is_the_teacher() -> None:
    teacher = torch.rand(2, 3, 4, 4)
    assert segment_distance(teacher.repeat(1, 5, 1, 1), teacher).abs().sum() == 0


def test_segment_distance_gradient_reaches_the_student_only() -> None:
    torch.manual_seed(0)
    expanded, teacher = torch.randn(2, 4, 2, 2, dtype=torch.float64), torch.randn(2, 2, 2, 2, dtype=torch.float64)
    expanded, teacher = expanded.requires_grad_(), teacher.requires_grad_()
    assert torch.autograd.gradcheck(lambda x: segment_distance(x, teacher.detach()), expanded)
    segment_distance(expanded, teacher).sum().backward()
    assert teacher.grad is None


@pytest.mark.parametrize("shape", [(2, 5, 4, 4), (2, 4, 3, 4), (3, 4, 4, 4), (2, 4)], ids=str)
def test_segment_distance_refuses_what_does_not_fit(shape: tuple[int, ...]) -> None:
    with pytest.raises(InputError, match="segments need expanded maps"):
        segment_distance(torch.zeros(shape), torch.zeros(2, 2, 4, 4))


def test_norm_expands_to_the_segments_of_the_smaller_size() -> None:
    task = Task(
        num_examples=3,
        num_classes=2,
        network=NetworkFacts(name="student", taps={"stage1": (4, 8, 8)}, num_logits=2),
        teacher=NetworkFacts(name="teacher", taps={"stage1": (6, 4, 16)}, num_logits=2),
    )
    (transform,) = NORMConfig(num_segments=3).build(task).transforms
    assert transform(torch.randn(2, 4, 8, 8)).shape == (2, 18, 4, 8)


def test_norm_has_the_released_settings() -> None:
    assert NORMConfig().num_segments == 8
    assert METHOD.terms["cross_entropy"]["weight"] == 0.1
    assert METHOD.terms["norm"]["weight"] == 1.0
