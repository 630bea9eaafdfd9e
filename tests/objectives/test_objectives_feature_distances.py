"""Distances of maps: FitNet's hints, attention, VID, neuron selectivity, and flow matrices."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from scipy.stats import norm
from torch import Tensor, nn

from soteacher.errors import InputError
from soteacher.objectives.student.attention import attention_distance, attention_map
from soteacher.objectives.student.fitnet import FitNetConfig, hint_distance
from soteacher.objectives.student.fsp import FSPConfig, flow_distance, flow_matrix
from soteacher.objectives.student.nst import selectivity_discrepancy
from soteacher.objectives.student.vid import VIDConfig, variational_information_loss
from soteacher.objectives.unit_vectors import unit_vectors
from soteacher.types import DistillStep, NetworkFacts, Task


def maps(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def facts(name: str, **taps: tuple[int, ...]) -> NetworkFacts:
    return NetworkFacts(name=name, taps=taps, num_logits=5)


def test_unit_vectors_have_length_one_and_zeros_stay() -> None:
    vectors = maps(0, 3, 4)
    vectors[1] = 0
    vectors.requires_grad_()
    found = unit_vectors(vectors)
    torch.testing.assert_close(found.norm(dim=1), torch.tensor([1.0, 0, 1], dtype=torch.float64))
    (gradient,) = torch.autograd.grad(found.sum(), vectors)
    torch.testing.assert_close(gradient[1], torch.ones(4, dtype=torch.float64))
    assert torch.autograd.gradcheck(lambda x: unit_vectors(x, dim=0), maps(1, 3, 4).requires_grad_())


def test_hint_distance_by_hand() -> None:
    found = hint_distance(torch.tensor([[1.0, 2.0], [0.0, 0.0]]), torch.tensor([[3.0, 2.0], [1.0, -1.0]]))
    torch.testing.assert_close(found, torch.tensor([2.0, 1.0]))


def test_hint_distance_refuses_other_shapes() -> None:
    with pytest.raises(
        InputError, match=r"maps of .* one shape .* got \[2, 3, 4, 4\] \(student\) and \[2, 5, 4, 4\] \(teacher\)"
    ):
        hint_distance(torch.zeros(2, 3, 4, 4), torch.zeros(2, 5, 4, 4))


def test_fitnet_regressor_makes_the_teachers_maps() -> None:
    student = facts("student", stage1=(4, 8, 8), stage2=(6, 4, 4), stage3=(8, 2, 2))
    teacher = facts("teacher", stage1=(5, 8, 8), stage2=(7, 8, 8), stage3=(9, 4, 4))
    objective = FitNetConfig().build(Task(num_examples=4, num_classes=5, network=student, teacher=teacher))
    assert (objective.features, objective.teacher_features) == (("stage2",), ("stage2",))
    (regressor,) = objective.regressors
    assert regressor(torch.randn(3, 6, 4, 4)).shape == (3, 7, 8, 8)


def test_attention_map_by_hand() -> None:
    found = attention_map(torch.tensor([[[[1.0, 2.0]], [[-1.0, 0.0]]]]))  # mean squares 1 and 2
    torch.testing.assert_close(found, torch.tensor([[1.0, 2.0]]) / 5**0.5)


def test_attention_distance_pools_the_larger_maps_and_ignores_factors_and_channels() -> None:
    student, teacher = maps(0, 2, 3, 8, 8), maps(1, 2, 5, 4, 4)
    pooled = student.numpy().reshape(2, 3, 4, 2, 4, 2).mean(axis=(3, 5))
    sides = [(side**2).mean(axis=1).reshape(2, -1) for side in (pooled, teacher.numpy())]
    sides = [side / np.linalg.norm(side, axis=1, keepdims=True) for side in sides]
    expected = torch.from_numpy(((sides[0] - sides[1]) ** 2).mean(axis=1))
    torch.testing.assert_close(attention_distance(student, teacher), expected)
    torch.testing.assert_close(attention_distance(-3 * student, 7 * teacher.flip(1)), expected)
    assert torch.autograd.gradcheck(lambda x: attention_distance(x, teacher), student.requires_grad_())


@pytest.mark.parametrize("distance", [attention_distance, selectivity_discrepancy])
def test_distances_of_maps_refuse_what_is_not_maps_of_one_batch(distance: Callable[[Tensor, Tensor], Tensor]) -> None:
    with pytest.raises(InputError, match=r"maps of .* must be \[B, C, H, W\] with one B, got \[2, 3\] \(student\) and"):
        distance(torch.zeros(2, 3), torch.zeros(2, 3))
    with pytest.raises(InputError, match="with one B"):
        distance(torch.zeros(2, 3, 4, 4), torch.zeros(3, 3, 4, 4))


def test_variational_information_loss_is_a_gaussian_log_likelihood() -> None:
    mean, teacher, log_scale = maps(0, 3, 2, 4, 4), maps(1, 3, 2, 4, 4), torch.tensor([-1.0, 2.0]).double()
    deviation = np.sqrt(np.log1p(np.exp(log_scale.numpy())) + 1e-5)[:, None, None]
    expected = -norm.logpdf(teacher.numpy(), loc=mean.numpy(), scale=deviation) - 0.5 * np.log(2 * np.pi)
    found = variational_information_loss(mean, teacher, log_scale)
    torch.testing.assert_close(found, torch.from_numpy(expected.mean(axis=(1, 2, 3))))
    inputs = (mean.requires_grad_(), log_scale.requires_grad_())
    assert torch.autograd.gradcheck(lambda m, s: variational_information_loss(m, teacher, s), inputs)


def test_variational_information_loss_refuses_shapes() -> None:
    with pytest.raises(InputError, match="one shape"):
        variational_information_loss(torch.zeros(2, 3, 4, 4), torch.zeros(2, 3, 2, 2), torch.zeros(3))
    with pytest.raises(InputError, match=r"one log_scale for each channel .* got \[2\] and maps \[2, 3, 4, 4\]"):
        variational_information_loss(torch.zeros(2, 3, 4, 4), torch.zeros(2, 3, 4, 4), torch.zeros(2))


def test_vid_starts_with_the_variance_of_its_settings() -> None:
    network = facts("network", stage1=(4, 8, 8), stage2=(6, 4, 4))
    task = Task(num_examples=4, num_classes=5, network=network, teacher=network)
    for variance in (1e-3, 5.0, 100.0):
        objective = VIDConfig(initial_variance=variance).build(task)
        found = nn.functional.softplus(objective.log_scales[1].detach().double()) + 1e-5
        torch.testing.assert_close(found, torch.full((6,), variance).double(), rtol=1e-5, atol=0)
    with pytest.raises(ValidationError):
        VIDConfig(initial_variance=0.0)


def discrepancy_by_pairs(student: np.ndarray, teacher: np.ndarray) -> np.ndarray:
    """Sum over all pairs of channels, one by one."""
    sides = [side.reshape(*side.shape[:2], -1) for side in (student, teacher)]
    sides = [side / np.linalg.norm(side, axis=2, keepdims=True) for side in sides]
    means = [
        (np.einsum("bcp,bdp->bcd", first, second) ** 2).mean(axis=(1, 2))
        for first, second in ((sides[0], sides[0]), (sides[1], sides[1]), (sides[0], sides[1]))
    ]
    return means[0] + means[1] - 2 * means[2]


@pytest.mark.parametrize("channels", [(2, 3), (40, 30)], ids=["by channels", "by pixels"])
def test_selectivity_discrepancy_equals_the_sum_over_pairs(channels: tuple[int, int]) -> None:
    student, teacher = maps(0, 2, channels[0], 4, 4), maps(1, 2, channels[1], 4, 4)
    expected = torch.from_numpy(discrepancy_by_pairs(student.numpy(), teacher.numpy()))
    torch.testing.assert_close(selectivity_discrepancy(student, teacher), expected)
    torch.testing.assert_close(selectivity_discrepancy(student.flip(1) * 2, -teacher), expected)
    zero = selectivity_discrepancy(student, student)
    torch.testing.assert_close(zero, torch.zeros(2, dtype=torch.float64), rtol=0, atol=1e-12)
    few = student[:, :3].clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: selectivity_discrepancy(x, teacher), few)


def test_flow_matrix_by_hand() -> None:
    lower = torch.tensor([[[[1.0, 3.0]], [[0.0, 2.0]]]])
    upper = torch.tensor([[[[2.0, -1.0]]]])
    torch.testing.assert_close(flow_matrix(lower, upper), torch.tensor([[[-0.5], [-1.0]]]))


def test_flow_matrix_pools_the_larger_maps() -> None:
    lower, upper = maps(0, 2, 3, 4, 4), maps(1, 2, 5, 2, 2)
    pooled = lower.numpy().reshape(2, 3, 2, 2, 2, 2).mean(axis=(3, 5))
    expected = torch.from_numpy(np.einsum("bcij,bdij->bcd", pooled, upper.numpy()) / 4)
    torch.testing.assert_close(flow_matrix(lower, upper), expected)
    torch.testing.assert_close(flow_matrix(upper, lower), expected.mT)
    with pytest.raises(InputError, match=r"maps of two layers must be .* got \[2, 3\] and \[2, 5, 2, 2\]"):
        flow_matrix(torch.zeros(2, 3), upper)


def test_flow_distance_of_maps_of_other_sizes() -> None:
    students, teachers = [maps(0, 2, 3, 4, 4), maps(1, 2, 5, 2, 2)], [maps(2, 2, 3, 2, 2), maps(3, 2, 5, 2, 2)]
    difference = flow_matrix(*students).numpy() - flow_matrix(*teachers).numpy()
    expected = torch.from_numpy((difference**2).mean(axis=(1, 2)))
    torch.testing.assert_close(flow_distance(students, teachers), expected)
    inputs = tuple(value.requires_grad_() for value in students)
    assert torch.autograd.gradcheck(lambda *s: flow_distance(s, teachers), inputs)


def test_flow_distance_refuses_other_layers() -> None:
    one, other = torch.zeros(2, 3, 4, 4), torch.zeros(2, 5, 4, 4)
    with pytest.raises(InputError, match=r"same \[B, C\] are wanted, got \[\[2, 3\], \[2, 3\]\] \(student\)"):
        flow_distance([one, one], [one, other])
    with pytest.raises(InputError, match="two or more layers"):
        flow_distance([one], [one])


def test_fsp_begins_at_the_stems_where_both_have_one(network: nn.Module, make_step: Callable[..., DistillStep]) -> None:
    student = facts("student wrn", stem=(2, 4, 4), stage1=(3, 4, 4), stage2=(4, 2, 2))
    bare = facts("teacher", stage1=(3, 4, 4), stage2=(4, 2, 2))
    task = Task(num_examples=4, num_classes=5, network=student, teacher=student)
    objective = FSPConfig().build(task)
    assert objective.features == objective.teacher_features == ("stem", "stage1", "stage2")
    sides = [{tap: maps(seed, 4, *shape) for tap, shape in student.taps.items()} for seed in (0, 1)]
    step = make_step(network, features=sides[0], teacher_features=sides[1])
    expected = flow_distance(list(sides[0].values()), list(sides[1].values())).mean()
    torch.testing.assert_close(objective(step), expected)
    without = Task(num_examples=4, num_classes=5, network=student, teacher=bare)
    assert FSPConfig().build(without).features == ("stage1", "stage2")
    taps = FSPConfig(student_taps=("stage1", "stage2"), teacher_taps=("stage1", "stage2"))
    assert taps.build(task).features == ("stage1", "stage2")


def test_fsp_refuses_other_widths_and_a_single_layer() -> None:
    student = facts("student wrn", stem=(2, 4, 4), stage1=(3, 4, 4))
    teacher = facts("teacher wrn", stem=(2, 4, 4), stage1=(6, 4, 4))
    task = Task(num_examples=4, num_classes=5, network=student, teacher=teacher)
    with pytest.raises(InputError, match=r"fsp: tap 'stage1' of student wrn is \[3, 4, 4\] and .* \[6, 4, 4\]; two or"):
        FSPConfig().build(task)
    with pytest.raises(InputError, match="two or more taps of equal channels"):
        FSPConfig(student_taps=("stem",), teacher_taps=("stem",)).build(task)
