from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from soteacher.data.embedded import PATH
from soteacher.errors import InputError
from soteacher.models.composition import Composition
from soteacher.models.zoo import build_network
from soteacher.objectives.teacher.joint_lipschitz import (
    METHOD,
    JointLipschitz,
    JointLipschitzConfig,
    Operator,
    composed_norm,
    filters_of,
    joint_lipschitz_sum,
    meeting_taps,
    network_operators,
)
from soteacher.objectives.teacher.lipschitz import induced_norm, lipschitz_bound_sum
from soteacher.types import DistillStep, NetworkFacts, Task

LAYERS: Mapping[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "1d": (lambda: nn.Conv1d(3, 4, 3, padding=1), (3, 8)),
    "3x3": (lambda: nn.Conv2d(3, 4, 3, padding=1), (3, 6, 5)),
    "5x3": (lambda: nn.Conv2d(2, 4, (5, 3), padding=(2, 1)), (2, 7, 6)),
    "1x1": (lambda: nn.Conv2d(4, 6, 1), (4, 3, 3)),
    "no padding": (lambda: nn.Conv2d(3, 4, 3), (3, 7, 7)),
    "3d": (lambda: nn.Conv3d(2, 3, 2), (2, 4, 4, 4)),
    "dilation": (lambda: nn.Conv2d(2, 4, 3, padding=2, dilation=2), (2, 9, 9)),
    "circular": (lambda: nn.Conv2d(3, 4, 3, padding=1, padding_mode="circular"), (3, 5, 5)),
    "groups": (lambda: nn.Conv2d(4, 6, 3, padding=1, groups=2), (4, 5, 5)),
    "depthwise": (lambda: nn.Conv2d(4, 4, 3, padding=1, groups=4), (4, 5, 5)),
    "depthwise, two channels each": (lambda: nn.Conv2d(3, 6, 3, padding=1, groups=3), (3, 5, 5)),
    "stride": (lambda: nn.Conv2d(3, 4, 3, padding=1, stride=2), (3, 7, 7)),
    "even stride": (lambda: nn.Conv2d(3, 4, 4, padding=1, stride=4), (3, 9, 9)),
    "stride and groups": (lambda: nn.Conv2d(4, 6, 5, padding=2, stride=3, groups=2), (4, 9, 9)),
    "stride and dilation": (lambda: nn.Conv2d(2, 4, 3, stride=(2, 4), dilation=(3, 2)), (2, 13, 13)),
    "1x1 stride": (lambda: nn.Conv2d(3, 4, 1, stride=2), (3, 6, 6)),
    "transposed": (lambda: nn.ConvTranspose2d(3, 4, 3), (3, 4, 4)),
    "transposed, stride and groups": (lambda: nn.ConvTranspose2d(4, 6, 3, stride=2, groups=2), (4, 4, 4)),
    "linear": (lambda: nn.Linear(5, 7), (5,)),
}
BATCH_NORMS = {1: nn.BatchNorm1d, 2: nn.BatchNorm1d, 3: nn.BatchNorm2d, 4: nn.BatchNorm3d}


def pair(name: str, *, affine: bool = True, dtype: torch.dtype = torch.float64) -> tuple[Any, Any, tuple[int, ...]]:
    """Return a layer, its batch norm, both with drawn weights and statistics, and the shape of what they take in."""
    torch.manual_seed(1)
    make, shape = LAYERS[name]
    layer = make().to(dtype)
    channels = filters_of(layer).shape[0] * filters_of(layer).shape[1]
    norm = BATCH_NORMS[len(shape)](channels, eps=0.01, affine=affine).to(dtype).eval()
    for tensor in (*layer.parameters(), *norm.parameters()):
        nn.init.normal_(tensor)
    assert norm.running_var is not None
    norm.running_var.uniform_(0.1, 3.0)
    return layer, norm, shape


def dense_norm(operator: nn.Module, shape: tuple[int, ...]) -> Tensor:
    """The largest absolute column sum of the operator's matrix, built by sending every unit vector through it."""
    units = torch.eye(int(torch.tensor(shape).prod()), dtype=torch.float64).unflatten(1, shape)
    columns = operator(units) - operator(torch.zeros(1, *shape, dtype=torch.float64))
    return columns.abs().flatten(1).sum(dim=1).max().detach()


@pytest.mark.parametrize("affine", [True, False], ids=["affine", "plain"])
@pytest.mark.parametrize("name", LAYERS)
def test_composed_norm_is_that_of_the_dense_matrix(name: str, affine: bool) -> None:
    layer, norm, shape = pair(name, affine=affine)
    expected = dense_norm(nn.Sequential(layer, norm), shape)
    torch.testing.assert_close(composed_norm(layer, norm).detach(), expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize(
    ("layer", "shape"),
    {
        "stride, image smaller than the kernel": (nn.Conv2d(3, 4, 7, padding=3, stride=2), (3, 3, 3)),
        "image smaller than the kernel": (nn.Conv2d(3, 4, 5, padding=2), (3, 2, 2)),
        "cropped transposed": (nn.ConvTranspose2d(3, 4, 3, padding=2), (3, 3, 3)),
    }.values(),
    ids=lambda value: None if isinstance(value, tuple) else str(value),
)
def test_composed_norm_bounds_the_dense_matrix(layer: nn.Module, shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    norm = nn.BatchNorm2d(4).eval()
    operator = nn.Sequential(layer, norm).double()
    for parameter in operator.parameters():
        nn.init.normal_(parameter)
    exact = dense_norm(operator, shape)
    assert composed_norm(layer, norm).item() >= exact.item() * (1 - 1e-12)


@pytest.mark.parametrize("normed", [True, False], ids=["batch norm", "alone"])
@pytest.mark.parametrize("dilation", [1, 2, 3])
@pytest.mark.parametrize("stride", [1, 2, 3, 4])
def test_norms_of_strided_convolutions_are_those_of_dense_matrices(stride: int, dilation: int, normed: bool) -> None:
    torch.manual_seed(stride)
    for layer, norm, shape in (
        (nn.Conv1d(3, 4, 5, stride=stride, dilation=dilation, padding=1), nn.BatchNorm1d(4), (3, 29)),
        (nn.Conv1d(4, 6, 2, stride=stride, dilation=dilation, groups=2), nn.BatchNorm1d(6), (4, 17)),
        (nn.Conv2d(2, 4, (3, 4), stride=(stride, 2), dilation=dilation, groups=2), nn.BatchNorm2d(4), (2, 15, 17)),
    ):
        nn.init.normal_(layer.double().weight)
        nn.init.normal_(norm.double().eval().weight)
        operator = Operator(path="layer", layer=layer, batch_norm=norm if normed else None)
        expected = dense_norm(nn.Sequential(layer, norm) if normed else layer, shape)
        torch.testing.assert_close(operator.norm().detach(), expected, rtol=1e-12, atol=0)
        if not normed:
            assert operator.norm() <= induced_norm(layer) * (1 + 1e-12)


@pytest.mark.parametrize(("stride", "dilation", "taps"), [(2, 1, [[0, 2], [1]]), (4, 2, [[0, 2], [1]]), (4, 1, None)])
def test_taps_that_meet_by_hand(stride: int, dilation: int, taps: list[list[int]] | None) -> None:
    layer = nn.Conv1d(1, 1, 3, stride=stride, dilation=dilation)
    layer.weight.data = torch.tensor([[[1.0, -10.0, 100.0]]])
    sums = [float(sum(10**tap for tap in group)) for group in taps or [[0], [1], [2]]]
    assert meeting_taps(layer).tolist() == [[[sums]]]


def test_composed_norm_by_hand() -> None:
    layer, norm = nn.Conv2d(2, 2, (1, 2), bias=False), nn.BatchNorm2d(2, eps=1.0)
    layer.weight.data = torch.tensor([[[1.0, -2.0], [4.0, 0.0]], [[5.0, 1.0], [0.0, -1.0]]]).unsqueeze(2)
    norm.weight.data = torch.tensor([-3.0, 2.0])
    norm.running_var = torch.tensor([3.0, 15.0])
    # factors 3 / 2 and 2 / 4; first input channel 1.5 * 3 + 0.5 * 6, second 1.5 * 4 + 0.5 * 1
    torch.testing.assert_close(composed_norm(layer, norm).detach(), torch.tensor(7.5))
    assert composed_norm(layer, norm) <= induced_norm(layer) * induced_norm(norm)


@pytest.mark.parametrize("name", LAYERS)
def test_composed_norm_does_not_change_with_the_filters_lengths(name: str) -> None:
    layer, norm, _ = pair(name)
    norm.eps = 0.0
    before = composed_norm(layer, norm).detach()
    factors = torch.rand(len(norm.running_var), dtype=torch.float64) * 9 + 0.1
    by_group = factors.view(filters_of(layer).shape[0], -1, 1, 1)
    scaled = filters_of(layer).detach() * by_group
    if isinstance(layer, nn.ConvTranspose2d):
        layer.weight.data = scaled.transpose(1, 2).reshape(layer.weight.shape)
    else:
        layer.weight.data = scaled.reshape(layer.weight.shape)
    norm.running_var *= factors.square()
    torch.testing.assert_close(composed_norm(layer, norm).detach(), before, rtol=1e-12, atol=0)
    layer.bias.data += 100
    norm.bias.data += 100
    norm.running_mean += 100
    torch.testing.assert_close(composed_norm(layer, norm).detach(), before, rtol=1e-12, atol=0)


@pytest.mark.parametrize("name", LAYERS)
def test_composed_norm_gradient_is_orthogonal_to_each_filter(name: str) -> None:
    layer, norm, _ = pair(name)
    composed_norm(layer, norm).backward()
    gradient = layer.weight.grad
    assert gradient.any()
    layer.weight.data, weight = gradient, layer.weight.detach().clone()
    filters = filters_of(layer).detach()
    layer.weight.data = weight
    along = (filters * filters_of(layer)).sum(dim=(2, 3)).abs()
    assert along.max() < 1e-12 * filters.abs().max()
    assert layer.bias.grad is None
    assert norm.bias.grad is None


def test_composed_norm_gradient_is_that_of_the_formula_whose_variances_follow_the_filters() -> None:
    layer, norm, _ = pair("groups")
    ratio = (norm.running_var + norm.eps).sqrt() / layer.weight.detach().flatten(1).norm(dim=1)

    def formula(weight: Tensor, gamma: Tensor) -> Tensor:
        gain = gamma.abs() / (ratio * weight.flatten(1).norm(dim=1))
        return (gain.view(2, 3, 1) * weight.view(2, 3, 2, 9).abs().sum(3)).sum(1).max()

    wanted = torch.autograd.grad(formula(layer.weight, norm.weight), [layer.weight, norm.weight])
    found = torch.autograd.grad(composed_norm(layer, norm), [layer.weight, norm.weight])
    for mine, reference in zip(found, wanted, strict=True):
        torch.testing.assert_close(mine, reference, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", ["3x3", "groups", "transposed", "linear"])
def test_composed_norm_gradient_of_the_factors(name: str) -> None:
    layer, norm, _ = pair(name)
    assert torch.autograd.gradcheck(lambda _: composed_norm(layer, norm), norm.weight)


def test_a_filter_of_zeros_counts_nothing_and_has_no_gradient() -> None:
    layer, norm, shape = pair("3x3")
    layer.weight.data[2] = 0
    value = composed_norm(layer, norm)
    torch.testing.assert_close(value.detach(), dense_norm(nn.Sequential(layer, norm), shape))
    value.backward()
    assert layer.weight.grad.isfinite().all()
    assert not layer.weight.grad[2].any()


def noise() -> Tensor:
    """Images whose pixels are independent: there a filter's variance depends on nothing but its length."""
    return torch.randn(256, 3, 8, 8, generator=torch.Generator().manual_seed(3))


def photographs() -> Tensor:
    """Images of clothes, whose pixels go with their neighbours, in three colours that go with one another."""
    with np.load(PATH) as arrays:
        grey = torch.from_numpy(arrays["train_images"][:128]).unsqueeze(1) / 255
    return torch.cat([grey, grey.sqrt(), 0.5 * grey], dim=1)


def re_estimated(network: nn.Sequential, images: Tensor) -> Tensor:
    """The sum of composed norms once the statistics are those of the images."""
    for module in network:
        if isinstance(module, nn.BatchNorm2d):
            module.reset_running_stats()
            module.momentum = None
    with torch.no_grad():
        network.train()(images)
    return joint_lipschitz_sum(network.eval(), {"0": "1", "3": "4"})


@pytest.mark.parametrize("images", [noise, photographs])
def test_a_step_against_the_gradient_lowers_the_norm_when_statistics_follow(
    images: Callable[[], Tensor],
) -> None:
    torch.manual_seed(0)
    network = nn.Sequential(
        nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 6, 3, bias=False), nn.BatchNorm2d(6)
    )
    weights = [network.get_parameter("0.weight"), network.get_parameter("3.weight")]
    start = [weight.detach().clone() for weight in weights]
    value = re_estimated(network, images())
    ways = {"joint": torch.autograd.grad(value, weights), "shorter": start}
    after: dict[str, float] = {}
    for way, directions in ways.items():
        length = torch.stack([direction.norm() for direction in directions]).norm()
        for weight, before, direction in zip(weights, start, directions, strict=True):
            weight.data = before - 0.01 * direction / length
        after[way] = re_estimated(network, images()).item() / value.item()
    assert after["joint"] < 0.998
    assert after["shorter"] == pytest.approx(1, abs=1e-4)  # shorter filters make no smoother function


def test_sum_counts_pairs_once_and_the_rest_as_lipschitz_does(network: nn.Sequential) -> None:
    convolution, norm, linear = network[0], network[1], network[5]
    assert [op.path for op in network_operators(network, {"0": "1"})] == ["0", "5"]
    expected = composed_norm(convolution, norm) + induced_norm(linear)
    torch.testing.assert_close(joint_lipschitz_sum(network, {"0": "1"}), expected)
    torch.testing.assert_close(joint_lipschitz_sum(network, {}), lipschitz_bound_sum(network))  # no layer has a stride
    operators = network_operators(network, {"0": "1"})
    assert (operators[0].batch_norm_path, operators[0].batch_norm) == ("1", norm)
    assert (operators[1].batch_norm_path, operators[1].batch_norm) == (None, None)


@pytest.mark.parametrize("name", ["resnet8", "wrn_10_1", "mobilenet_v2", "shufflenet_v1"])
def test_sum_does_not_change_when_filters_and_statistics_are_scaled_together(name: str) -> None:
    torch.manual_seed(0)
    network = build_network(name, num_classes=5).double()
    pairs = Composition(network, torch.rand(2, 3, 16, 16, dtype=torch.float64))
    for norm in pairs.values():
        network.get_submodule(norm).eps = 0.0
    before, plain = joint_lipschitz_sum(network, pairs).detach(), lipschitz_bound_sum(network).detach()
    for layer, norm in pairs.items():
        network.get_parameter(f"{layer}.weight").data *= 0.1
        network.get_buffer(f"{norm}.running_var").mul_(0.01)
    torch.testing.assert_close(joint_lipschitz_sum(network, pairs).detach(), before, rtol=1e-10, atol=0)
    assert (lipschitz_bound_sum(network) - plain).abs() > 0.01 * plain


def test_half_precision_weights_give_float32(network: nn.Module) -> None:
    half = joint_lipschitz_sum(network.bfloat16(), {"0": "1"})
    assert half.dtype == torch.float32
    torch.testing.assert_close(half, joint_lipschitz_sum(network.float(), {"0": "1"}), rtol=1e-6, atol=0)


def test_objective_is_the_sum_of_the_network_in_training(
    network: nn.Module, task: Task, make_step: Callable[..., DistillStep]
) -> None:
    facts = NetworkFacts(name="teacher small", taps={}, num_logits=5, batch_norm_of={"0": "1"})
    objective = JointLipschitzConfig().build(replace(task, network=facts))
    assert isinstance(objective, JointLipschitz)
    assert objective.state_dict() == {}
    step = make_step(network)
    assert torch.equal(objective(step), joint_lipschitz_sum(network, {"0": "1"}))
    with pytest.raises(InputError, match="joint_lipschitz needs the network in training"):
        JointLipschitzConfig().build(task)


@pytest.mark.parametrize("name", ["same family", "transformer student"])
def test_objective_of_real_networks_has_gradients(name: str, make_pair: Callable[..., Any]) -> None:
    real = make_pair(name)
    objective = JointLipschitzConfig().build(real.task)
    step = real.step(objective)
    assert objective.batch_norm_of == dict(real.task.network.batch_norm_of)
    objective(step).backward()
    gradients = [weight.grad for weight in real.student.network.parameters() if weight.grad is not None]
    assert gradients
    assert all(gradient.isfinite().all() for gradient in gradients)


def test_method_is_soteacher_with_the_other_lipschitz_term() -> None:
    assert METHOD.terms == {
        "cross_entropy": {},
        "joint_lipschitz": {"weight": JointLipschitzConfig().weight},
        "consistency": {"weight": 1.0, "ramp": "linear"},
    }


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ((nn.ReLU(), nn.BatchNorm2d(3)), "wanted a convolution or linear layer, got ReLU"),
        ((nn.Conv2d(3, 4, 3), nn.GroupNorm(2, 4)), "wanted a batch norm after Conv2d, got GroupNorm"),
        ((nn.Conv2d(3, 4, 3), nn.BatchNorm2d(3)), "wanted a batch norm of 4 channels after Conv2d, got 3"),
        (
            (nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, track_running_stats=False)),
            "BatchNorm2d keeps no running variance",
        ),
    ],
)
def test_composed_norm_refuses(layers: tuple[nn.Module, nn.Module], message: str) -> None:
    with pytest.raises(InputError, match=message):
        composed_norm(*layers)


def test_sum_refuses_a_network_without_the_layers(network: nn.Module) -> None:
    with pytest.raises(InputError, match="Sequential has no convolution, linear layer or batch norm"):
        joint_lipschitz_sum(nn.Sequential(nn.ReLU()), {})
    with pytest.raises(InputError, match="Sequential has no convolution or batch norm '7'"):
        joint_lipschitz_sum(network, {"0": "7"})
