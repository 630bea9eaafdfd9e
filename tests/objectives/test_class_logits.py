import pytest
import torch

from soteacher.errors import InputError
from soteacher.objectives.student.class_logits import check_logits, check_positive, other_logits, target_logits


def test_the_targets_and_the_others_are_parted() -> None:
    logits, labels = torch.arange(12.0).reshape(3, 4), torch.tensor([0, 2, 3])
    assert target_logits(logits, labels).tolist() == [0, 6, 11]
    assert other_logits(logits, labels).tolist() == [[1, 2, 3], [4, 5, 7], [8, 9, 10]]
    assert target_logits(logits, labels.int()).tolist() == [0, 6, 11]


def test_every_logit_gets_its_gradient() -> None:
    logits, labels = torch.zeros(2, 3, requires_grad=True), torch.tensor([1, 0])
    (10 * target_logits(logits, labels).sum() + other_logits(logits, labels).sum()).backward()
    torch.testing.assert_close(logits.grad, torch.tensor([[1.0, 10.0, 1.0], [10.0, 1.0, 1.0]]))


def test_what_cannot_be_compared_is_refused() -> None:
    two, labels = torch.zeros(2, 3), torch.zeros(2, dtype=torch.int64)
    check_logits(two, two)
    check_logits(two, two, labels)
    for other in (torch.zeros(2, 4), torch.zeros(3, 3), torch.zeros(3)):
        with pytest.raises(InputError, match=r"one shape \[B, K\], got \[2, 3\] \(student\)"):
            check_logits(two, other)
    with pytest.raises(InputError, match=r"got \[2, 3, 1\] \(student\)"):
        check_logits(two[..., None], two[..., None])
    with pytest.raises(InputError, match=r"labels must be integer class ids \[2\], got \[2\] of torch.float32"):
        check_logits(two, two, labels.float())
    with pytest.raises(InputError, match=r"labels must be integer class ids \[2\], got \[2, 3\] of torch.float32"):
        check_logits(two, two, two)
    with pytest.raises(InputError, match=r"at least 2 are wanted, got logits \[2, 1\]"):
        check_logits(two[:, :1], two[:, :1], labels)


@pytest.mark.parametrize("number", [0.0, -1.0, float("nan"), float("inf")])
def test_numbers_that_are_not_positive_are_named(number: float) -> None:
    with pytest.raises(InputError, match=f"exponent must be positive and finite, got {number}"):
        check_positive(temperature=1.0, exponent=number)
