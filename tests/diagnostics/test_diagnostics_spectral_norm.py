import math

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from soteacher.diagnostics.spectral_norm import spectral_norm
from soteacher.errors import InputError
from soteacher.objectives.teacher.joint_lipschitz import Operator


def norm_of(layer: nn.Module, shape: tuple[int, ...], batch_norm: nn.Module | None = None) -> float:
    return spectral_norm(Operator(path="layer", layer=layer, batch_norm=batch_norm), torch.Size((1, *shape)))


def dense(operator: nn.Module, shape: tuple[int, ...]) -> np.ndarray:
    """The operator's matrix, transposed, built by sending every unit vector through it."""
    units = torch.eye(math.prod(shape)).unflatten(1, shape)
    with torch.no_grad():
        columns = operator.eval()(units) - operator(torch.zeros(1, *shape))
    return columns.flatten(1).double().numpy()


def batch_norm(channels: int) -> nn.BatchNorm2d:
    norm = nn.BatchNorm2d(channels, eps=0.1).eval()
    nn.init.normal_(norm.weight)
    assert norm.running_var is not None
    norm.running_var.uniform_(0.2, 3.0)
    return norm


@pytest.mark.parametrize("normalized", [False, True], ids=["alone", "batch norm"])
@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (nn.Conv2d(3, 6, 3, padding=1), (3, 8, 8)),
        (nn.Conv2d(4, 6, 3, padding=1, stride=2), (4, 7, 8)),
        (nn.Conv2d(4, 6, 3, padding=2, dilation=2, groups=2), (4, 6, 6)),
        (nn.Conv2d(6, 6, 5, padding=2, groups=6, bias=False), (6, 6, 6)),
        (nn.Conv2d(4, 6, 1), (4, 5, 5)),
        (nn.Conv2d(2, 6, 3, padding=1, padding_mode="reflect"), (2, 5, 5)),
        (nn.ConvTranspose2d(4, 6, 3, stride=2), (4, 4, 4)),
        (nn.Linear(9, 6), (9,)),
    ],
    ids=str,
)
def test_spectral_norm_is_that_of_the_dense_matrix(layer: nn.Module, shape: tuple[int, ...], normalized: bool) -> None:
    torch.manual_seed(0)
    for parameter in layer.parameters():
        nn.init.normal_(parameter)
    norm = batch_norm(6) if normalized else None
    matrix = dense(layer, shape)
    if norm is not None:
        assert norm.running_var is not None
        scale = (norm.weight / (norm.running_var + norm.eps).sqrt()).detach().double().numpy()
        matrix = (matrix.reshape(len(matrix), 6, -1) * scale[:, None]).reshape(len(matrix), -1)
    exact = np.linalg.svd(matrix, compute_uv=False)[0]
    assert 0.999 * exact <= norm_of(layer, shape, norm) <= exact * (1 + 1e-5)


@pytest.mark.parametrize("normalized", [False, True], ids=["alone", "batch norm"])
@pytest.mark.parametrize("shape", [(40, 60), (60, 40)])
def test_spectral_norm_of_a_large_linear_layer_comes_from_an_iteration(
    shape: tuple[int, int], normalized: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    layer = nn.Linear(shape[1], shape[0])
    nn.init.normal_(layer.weight)
    norm = batch_norm(shape[0]) if normalized else None
    exact = norm_of(layer, (shape[1],), norm)
    monkeypatch.setattr("soteacher.diagnostics.spectral_norm.LARGEST_DECOMPOSED", 39)
    found = norm_of(layer, (shape[1],), norm)
    assert 0.999 * exact <= found <= exact * (1 + 1e-5)
    assert found != exact
    assert layer.weight.grad is None


def test_spectral_norm_of_a_large_random_matrix() -> None:
    layer = nn.Linear(1100, 1100, bias=False)
    nn.init.normal_(layer.weight, generator=torch.Generator().manual_seed(0))
    exact = torch.linalg.svdvals(layer.weight.detach())[0].item()
    assert 0.999 * exact <= norm_of(layer, (1100,)) <= exact * (1 + 1e-5)


def test_spectral_norm_of_a_batch_norm_is_its_largest_factor() -> None:
    norm = nn.BatchNorm2d(2, eps=0.0)
    norm.weight.data = torch.tensor([-3.0, 4.0])
    norm.running_var = torch.tensor([0.25, 4.0])
    assert norm_of(norm, (2, 3, 3)) == 6.0


def test_spectral_norm_of_a_rotation_and_of_zeros_by_hand() -> None:
    torch.manual_seed(0)
    layer = nn.Conv2d(3, 3, 1)
    layer.weight.data = 2 * torch.linalg.qr(torch.randn(3, 3))[0].view(3, 3, 1, 1)
    assert norm_of(layer, (3, 5, 5)) == pytest.approx(2, rel=1e-5)
    nn.init.zeros_(layer.weight)
    assert norm_of(layer, (3, 5, 5)) == 0
    doubled = nn.Conv2d(1, 1, 3, padding=1, padding_mode="circular")
    nn.init.constant_(doubled.weight, 1 / 9)
    assert norm_of(doubled, (1, 6, 6)) == pytest.approx(1, rel=1e-4)  # an average: the constant image is kept


def test_spectral_norm_scales_with_the_weight_ignores_the_bias_and_is_seeded() -> None:
    torch.manual_seed(0)
    layer = nn.Conv2d(3, 4, 3, padding=1)
    before = norm_of(layer, (3, 8, 8))
    torch.manual_seed(1)
    with torch.no_grad():
        assert norm_of(layer, (3, 8, 8)) == before
    layer.weight.data *= -3
    assert layer.bias is not None
    layer.bias.data += 50
    assert norm_of(layer, (3, 8, 8)) == pytest.approx(3 * before, rel=1e-5)
    assert layer.weight.grad is None


def test_spectral_norm_of_half_precision_weights_is_computed_in_float32() -> None:
    torch.manual_seed(0)
    layer, norm = nn.Conv2d(3, 6, 3, padding=1).bfloat16(), batch_norm(6).bfloat16()
    found = norm_of(layer, (3, 6, 6), norm)
    assert found == pytest.approx(norm_of(layer.float(), (3, 6, 6), norm.float()), rel=1e-5)


def test_spectral_norm_counts_the_kernel_that_the_layer_really_uses() -> None:
    class Standardized(nn.Conv2d):
        def forward(self, input: Tensor) -> Tensor:  # noqa: A002 the name of the method that it stands for
            return nn.functional.conv2d(input, self.weight * 5, self.bias, padding=1)

    torch.manual_seed(0)
    layer = Standardized(2, 3, 3, padding=1)
    plain = nn.Conv2d(2, 3, 3, padding=1)
    plain.load_state_dict(layer.state_dict())
    assert norm_of(layer, (2, 6, 6)) == pytest.approx(5 * norm_of(plain, (2, 6, 6)), rel=1e-5)


def test_spectral_norm_needs_running_variances() -> None:
    bare = nn.BatchNorm2d(4, track_running_stats=False)
    for layer, norm in ((bare, None), (nn.Conv2d(3, 4, 3), bare)):
        with pytest.raises(InputError, match="BatchNorm2d keeps no running variance"):
            norm_of(layer, (4 if norm is None else 3, 6, 6), norm)
