import pytest
import torch

from soteacher.objectives.gram import gram_matrix


@pytest.fixture
def rows() -> torch.Tensor:
    return torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64).requires_grad_()


def test_gram_matrix_has_all_scalar_products(rows: torch.Tensor) -> None:
    found = gram_matrix(rows)
    for batch, i, j in [(0, 0, 0), (0, 1, 2), (1, 2, 0)]:
        assert found[batch, i, j].item() == pytest.approx((rows[batch, i] * rows[batch, j]).sum().item())


def test_gram_matrix_has_two_gradients(rows: torch.Tensor) -> None:
    weights = torch.randn(3, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)  # not symmetric
    assert torch.autograd.gradcheck(lambda x: gram_matrix(x) * weights, rows)
    assert torch.autograd.gradgradcheck(lambda x: gram_matrix(x) * weights, rows)


def test_autocast_rounds_neither_the_products_nor_their_gradient() -> None:
    rows = torch.randn(5, 7, generator=torch.Generator().manual_seed(0)).requires_grad_()
    (expected,) = torch.autograd.grad(gram_matrix(rows).square().sum(), rows)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        (found,) = torch.autograd.grad(gram_matrix(rows).square().sum(), rows)
    assert torch.equal(found, expected)
