import pytest
import torch

from soteacher.objectives.squares import mean_square, squared_norm


@pytest.fixture
def values() -> torch.Tensor:
    return torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64).requires_grad_()


def test_squares_by_hand() -> None:
    values = torch.tensor([[1.0, 2.0, 3.0], [0.0, -1.0, 2.0]])
    torch.testing.assert_close(squared_norm(values), torch.tensor([14.0, 5.0]))
    torch.testing.assert_close(mean_square(values, 0), torch.tensor([0.5, 2.5, 6.5]))


def test_squares_have_two_gradients(values: torch.Tensor) -> None:
    for function in (squared_norm, lambda x: mean_square(x, 1), lambda x: mean_square(x, 0)):
        assert torch.autograd.gradcheck(function, values)
        assert torch.autograd.gradgradcheck(function, values)


def test_autocast_does_not_round_squares() -> None:
    values = torch.randn(5, 7, generator=torch.Generator().manual_seed(0))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = squared_norm(values), mean_square(values, 0)
    assert torch.equal(found[0], squared_norm(values))
    assert torch.equal(found[1], mean_square(values, 0))
