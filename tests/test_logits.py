import math

import numpy as np
import pytest
import torch
from scipy.stats import zscore
from torch import Tensor

from soteacher.errors import InputError
from soteacher.functional import standardized_logits


@pytest.fixture
def logits() -> Tensor:
    return torch.randn(4, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def test_standardized_logits_equal_scipy(logits: Tensor) -> None:
    wanted = torch.from_numpy(zscore(logits.numpy(), axis=1, ddof=1))
    torch.testing.assert_close(standardized_logits(logits), wanted, rtol=1e-6, atol=0)


def test_standardized_logits_by_hand() -> None:
    found = standardized_logits(torch.tensor([[1.0, 2.0, 3.0], [0.0, 0.0, 3.0]]))
    wanted = torch.tensor([[-1.0, 0.0, 1.0], [-1 / math.sqrt(3), -1 / math.sqrt(3), 2 / math.sqrt(3)]])
    torch.testing.assert_close(found, wanted)


def test_standardized_logits_have_mean_0_and_deviation_1(logits: Tensor) -> None:
    found = standardized_logits(logits)
    torch.testing.assert_close(found.mean(1), torch.zeros(4, dtype=torch.float64))
    torch.testing.assert_close(found.std(1), torch.ones(4, dtype=torch.float64), rtol=1e-6, atol=0)


def test_standardized_logits_ignore_shift_and_positive_scale(logits: Tensor) -> None:
    shift, scale = torch.randn(4, 1, dtype=torch.float64), torch.tensor([[0.1], [1.0], [3.0], [50.0]])
    torch.testing.assert_close(
        standardized_logits(scale * logits + shift), standardized_logits(logits), rtol=1e-5, atol=0
    )
    torch.testing.assert_close(standardized_logits(-logits), -standardized_logits(logits))


def test_standardized_logits_take_any_leading_shape(logits: Tensor) -> None:
    found = standardized_logits(logits.reshape(2, 2, 6))
    assert torch.equal(found, standardized_logits(logits).reshape(2, 2, 6))
    assert torch.equal(standardized_logits(logits[0]), standardized_logits(logits)[0])


@pytest.mark.parametrize("value", [0.0, 60.0, -3.5, 0.1])  # the mean of a hundred times 0.1 is not 0.1
def test_equal_logits_give_zeros_without_gradient(value: float) -> None:
    logits = torch.stack([torch.full((100,), value), torch.arange(100.0)]).requires_grad_()
    found = standardized_logits(logits)
    assert found[0].tolist() == [0.0] * 100
    (found * torch.arange(100.0).square()).sum().backward()
    assert logits.grad is not None
    assert logits.grad[0].tolist() == [0.0] * 100
    assert logits.grad.isfinite().all()
    assert logits.grad[1].abs().max() > 0


def test_logits_that_are_all_but_equal_have_finite_gradients() -> None:
    for difference in (1e-30, 1e-7):
        logits = torch.tensor([[1.0, 1.0, 1.0], [0.0, 0.0, difference]], requires_grad=True)
        (standardized_logits(logits) * torch.arange(3.0)).sum().backward()
        assert logits.grad is not None
        assert logits.grad.isfinite().all()


def test_standardized_logits_gradient(logits: Tensor) -> None:
    assert torch.autograd.gradcheck(standardized_logits, logits.requires_grad_())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_is_computed_in_single(logits: Tensor, dtype: torch.dtype) -> None:
    rounded = (20 * logits).to(dtype)
    found = standardized_logits(rounded)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, standardized_logits(rounded.float()))
    np.testing.assert_allclose(found.std(1).numpy(), 1, rtol=1e-5)


@pytest.mark.parametrize("shape", [(3, 1), (3, 0), ()])
def test_a_single_class_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(InputError, match="standardised logits need at least 2 classes"):
        standardized_logits(torch.zeros(shape))
