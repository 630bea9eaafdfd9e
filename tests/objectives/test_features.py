from collections.abc import Callable
from dataclasses import replace
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

from soteacher.errors import InputError
from soteacher.objective import Objective
from soteacher.objectives.features import (
    FeatureConfig,
    TapPair,
    as_maps,
    as_vectors,
    map_shape,
    mismatch,
    own_generator,
    resize,
    stages,
    student_maps,
    student_parts,
    teacher_maps,
    teacher_parts,
    to_smaller,
    vector_shape,
)
from soteacher.types import NetworkFacts, Task


class Taps(dict[str, tuple[int, ...]]):
    """Shapes by tap, an InputError for an unknown one; modules' paths can be looked up and are not listed."""

    def __missing__(self, tap: str) -> tuple[int, ...]:
        if tap == "block.0":
            return (8, 6, 6)
        if tap == "odd":
            return (1, 2, 3, 4)
        raise InputError(f"unknown tap {tap!r}")


def _facts(name: str, **taps: tuple[int, ...]) -> NetworkFacts:
    return NetworkFacts(name=name, taps=Taps(taps), num_logits=5)


RESNET = _facts(
    "student resnet8", stem=(16, 32, 32), stage1=(16, 32, 32), stage2=(32, 16, 16), stage3=(64, 8, 8),
    preactivation1=(16, 32, 32), preactivation2=(32, 16, 16), preactivation3=(64, 8, 8), maps=(64, 8, 8), pooled=(64,),
)  # fmt: skip
WRN = _facts(
    "teacher wrn_40_2", stem=(16, 32, 32), stage1=(32, 32, 32), stage2=(64, 16, 16), stage3=(128, 8, 8),
    preactivation3=(128, 8, 8), maps=(128, 8, 8), pooled=(128,),
)  # fmt: skip
VGG = _facts(
    "teacher vgg8", stage1=(64, 16, 16), stage2=(128, 8, 8), stage3=(256, 4, 4), stage4=(512, 4, 4),
    preactivation4=(512, 4, 4), maps=(512, 4, 4), pooled=(512,),
)  # fmt: skip
VIT = _facts(
    "teacher timm/test_vit", stage1=(101, 64), stage2=(101, 64), stage3=(101, 64), stage4=(101, 64), pooled=(64,)
)
BARE = _facts("teacher mine", pooled=(7,))


def _task(student: NetworkFacts, teacher: NetworkFacts) -> Task:
    return Task(num_examples=4, num_classes=5, network=student, teacher=teacher)


def _config(taps: str, **settings: Any) -> FeatureConfig:
    class Config(FeatureConfig):
        default_taps: ClassVar[Any] = taps

        def build(self, task: Task) -> Objective[Any]:
            raise NotImplementedError

    return Config(**settings)


def _names(pairs: tuple[TapPair, ...]) -> list[tuple[str, str]]:
    return [(pair.student, pair.teacher) for pair in pairs]


S, P = ("stage1", "stage2", "stage3", "stage4"), ("preactivation1", "preactivation2", "preactivation3")


@pytest.mark.parametrize(
    ("taps", "student", "teacher", "wanted"),
    [
        ("stages", RESNET, WRN, [(S[0], S[0]), (S[1], S[1]), (S[2], S[2])]),
        ("stages", RESNET, VGG, [(S[0], S[1]), (S[1], S[2]), (S[2], S[3])]),
        ("stages", VGG, RESNET, [(S[1], S[0]), (S[2], S[1]), (S[3], S[2])]),
        ("stages", RESNET, VIT, [(S[0], S[1]), (S[1], S[2]), (S[2], S[3])]),
        ("second_stage", RESNET, WRN, [(S[1], S[1])]),
        ("second_stage", RESNET, VGG, [(S[1], S[2])]),
        ("second_stage", VGG, RESNET, [(S[1], S[0])]),
        ("second_stage", _facts("one", stage1=(4, 8, 8)), WRN, [(S[0], S[2])]),
        ("last_stage", RESNET, VGG, [(S[2], S[3])]),
        ("preactivations", RESNET, WRN, [(P[0], S[0]), (P[1], S[1]), (P[2], P[2])]),
        ("preactivations", VGG, VIT, [(S[0], S[0]), (S[1], S[1]), (S[2], S[2]), ("preactivation4", S[3])]),
        ("maps", RESNET, VGG, [("maps", "maps")]),
        ("maps", RESNET, VIT, [("maps", S[3])]),
        ("pooled", RESNET, VIT, [("pooled", "pooled")]),
        ("pooled", RESNET, BARE, [("pooled", "pooled")]),
    ],
)
def test_pairs_by_default(
    taps: str, student: NetworkFacts, teacher: NetworkFacts, wanted: list[tuple[str, str]]
) -> None:
    assert _names(_config(taps).pairs(_task(student, teacher))) == wanted


def test_pairs_hold_the_shapes_as_objectives_see_them() -> None:
    pairs = _config("stages").pairs(_task(RESNET, VIT))
    assert pairs[0] == TapPair(
        student="stage1", teacher="stage2", student_shape=(16, 32, 32), teacher_shape=(64, 10, 10)
    )
    (pooled,) = _config("pooled").pairs(_task(RESNET, VGG))
    assert (pooled.student_shape, pooled.teacher_shape) == ((64,), (512,))


def test_pairs_by_the_users_choice() -> None:
    task = _task(RESNET, WRN)
    chosen = _config("stages", student_taps=("stem", "block.0"), teacher_taps=("stage1", "stage3")).pairs(task)
    assert _names(chosen) == [("stem", "stage1"), ("block.0", "stage3")]
    assert chosen[1].student_shape == (8, 6, 6)
    one_side = _config("last_stage", teacher_taps=("block.0",)).pairs(task)
    assert _names(one_side) == [("stage3", "block.0")]
    other_side = _config("maps", student_taps=("stage2",)).pairs(task)
    assert _names(other_side) == [("stage2", "maps")]
    vectors = _config("pooled", student_taps=("stage3",), teacher_taps=("pooled",)).pairs(_task(RESNET, WRN))
    assert (vectors[0].student_shape, vectors[0].teacher_shape) == ((64,), (128,))


def test_taps_of_both_sides_need_no_stages() -> None:
    chosen = _config("stages", student_taps=("block.0",), teacher_taps=("block.0",)).pairs(_task(BARE, BARE))
    assert _names(chosen) == [("block.0", "block.0")]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"student_taps": ("stage1",)},
            "as many taps of the student as of the teacher are wanted, at least one: got stage1 of student resnet8 and "
            "stage1, stage2, stage3 of teacher wrn_40_2; set student_taps and teacher_taps",
        ),
        ({"student_taps": (), "teacher_taps": ()}, "at least one: got none of student resnet8 and none of"),
        ({"student_taps": ("stage1",), "teacher_taps": ("stage7",)}, "unknown tap 'stage7'"),
        (
            {"student_taps": ("odd",), "teacher_taps": ("stage1",)},
            "student resnet8, tap 'odd': wanted maps (C, H, W) or",
        ),
    ],
)
def test_pairs_refuse_taps(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError) as caught:
        _config("stages", **settings).pairs(_task(RESNET, WRN))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("student", "teacher", "named"),
    [(RESNET, BARE, "teacher mine"), (BARE, RESNET, "teacher mine"), (BARE, BARE, "teacher mine")],
)
def test_pairs_refuse_networks_without_stages(student: NetworkFacts, teacher: NetworkFacts, named: str) -> None:
    with pytest.raises(InputError, match=f"^{named} names no stages; set student_taps and teacher_taps to paths"):
        _config("stages").pairs(_task(student, teacher))


def test_pairs_refuse_a_task_without_networks() -> None:
    with pytest.raises(InputError, match="an objective on features needs to know both networks"):
        _config("stages").pairs(Task(num_examples=4, num_classes=5))


def test_stages_are_those_of_the_network() -> None:
    assert stages(RESNET) == ["stage1", "stage2", "stage3"]
    assert stages(BARE) == []


def test_shapes_of_maps_tokens_and_vectors() -> None:
    assert map_shape(RESNET, "stage2") == (32, 16, 16)
    assert map_shape(VIT, "stage1") == (64, 10, 10)
    assert map_shape(VIT, "pooled") == (64, 1, 1)
    assert vector_shape(RESNET, "stage2") == (32,)
    assert vector_shape(VIT, "stage1") == (64,)
    assert vector_shape(VIT, "pooled") == (64,)
    assert map_shape(_facts("teacher odd", stage1=(24, 8)), "stage1") == (8, 4, 4)
    with pytest.raises(InputError, match=r"^teacher odd, tap 'stage1': 34 tokens form no square of patches"):
        map_shape(_facts("teacher odd", stage1=(34, 8)), "stage1")


def _randn(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def test_as_maps_leaves_maps_and_widens_vectors() -> None:
    maps = _randn(2, 3, 4, 5)
    assert as_maps(maps) is maps
    assert torch.equal(as_maps(_randn(2, 3)), _randn(2, 3)[:, :, None, None])
    assert as_maps(maps.bfloat16()).dtype == torch.float32
    assert as_maps(maps.double()).dtype == torch.float64


@pytest.mark.parametrize("prefix", [0, 1, 2, 5])
def test_as_maps_lays_patches_out_and_leaves_class_and_register_tokens_out(prefix: int) -> None:
    tokens = _randn(2, prefix + 16, 3)
    maps = as_maps(tokens)
    assert maps.shape == (2, 3, 4, 4)
    for row in range(4):
        for column in range(4):
            assert torch.equal(maps[:, :, row, column], tokens[:, prefix + 4 * row + column])


@pytest.mark.parametrize("num_tokens", [34, 45, 109])
def test_as_maps_refuses_tokens_that_form_no_square(num_tokens: int) -> None:
    with pytest.raises(InputError, match=f"tokens: {num_tokens} tokens form no square of patches; choose another tap"):
        as_maps(torch.zeros(2, num_tokens, 3))


@pytest.mark.parametrize("shape", [(2,), (2, 3, 4, 5, 6)])
def test_as_maps_refuses_other_shapes(shape: tuple[int, ...]) -> None:
    with pytest.raises(InputError, match=r"wanted maps \[B, C, H, W\], tokens \[B, N, D\] or vectors \[B, D\], got"):
        as_maps(torch.zeros(shape))


def test_as_vectors_averages() -> None:
    maps, tokens = _randn(2, 3, 4, 4), _randn(2, 17, 3)
    torch.testing.assert_close(as_vectors(maps), maps.mean((2, 3)))
    torch.testing.assert_close(as_vectors(tokens), tokens[:, 1:].mean(1))
    vectors = _randn(2, 3)
    assert as_vectors(vectors) is vectors
    assert as_vectors(vectors.half()).dtype == torch.float32


def test_resize_averages_down_and_interpolates_up() -> None:
    maps = _randn(2, 3, 8, 8)
    assert resize(maps, (8, 8)) is maps
    torch.testing.assert_close(resize(maps, (4, 4)), nn.functional.avg_pool2d(maps, 2))
    torch.testing.assert_close(resize(maps, (1, 1)), maps.mean((2, 3), keepdim=True))
    up = resize(maps, (16, 16))
    assert up.shape == (2, 3, 16, 16)
    # Bilinear at half steps: three quarters of the nearer, one of the further pixel, in each direction.
    near, right, below, across = (maps[:, :, i, j] for i, j in ((3, 3), (3, 4), (4, 3), (4, 4)))
    torch.testing.assert_close(up[:, :, 7, 7], (9 * near + 3 * right + 3 * below + across) / 16)
    assert resize(maps, (4, 16)).shape == (2, 3, 4, 16)
    torch.testing.assert_close(resize(torch.full((1, 1, 5, 5), 2.0), (7, 3)), torch.full((1, 1, 7, 3), 2.0))


def test_to_smaller_takes_the_smaller_of_each_side() -> None:
    first, second = _randn(2, 3, 8, 4), _randn(2, 5, 4, 6)
    one, two = to_smaller(first, second)
    assert one.shape == (2, 3, 4, 4)
    assert two.shape == (2, 5, 4, 4)
    torch.testing.assert_close(one, nn.functional.adaptive_avg_pool2d(first, (4, 4)))
    same = to_smaller(first, first)
    assert same[0] is same[1] is first


def test_mismatch_names_both_sides_and_the_way_out() -> None:
    (pair,) = _config("last_stage").pairs(_task(RESNET, VGG))
    error = mismatch("fsp", _task(RESNET, VGG), pair, "equal sizes are wanted: set teacher_taps")
    assert isinstance(error, InputError)
    assert str(error) == (
        "fsp: tap 'stage3' of student resnet8 is [64, 8, 8] and tap 'stage4' of teacher vgg8 is [512, 4, 4]; equal "
        "sizes are wanted: set teacher_taps"
    )


@pytest.fixture
def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(108, 5))


def test_maps_of_a_step(network: nn.Module, make_step: Callable[..., Any]) -> None:
    own, tokens = _randn(4, 3, 2, 2).requires_grad_(), _randn(4, 10, 6).requires_grad_()
    step = make_step(network, features={"stage1": own}, teacher_features={"stage2": tokens})
    pairs = [TapPair(student="stage1", teacher="stage2", student_shape=(3, 2, 2), teacher_shape=(6, 3, 3))]
    (student,), (teacher,) = student_maps(step, pairs), teacher_maps(step, pairs)
    assert student is own
    assert teacher.shape == (4, 6, 3, 3)
    assert not teacher.requires_grad  # the teacher is a constant


def test_parts_that_are_missing_are_an_error(network: nn.Module, make_step: Callable[..., Any]) -> None:
    step = make_step(network)
    with pytest.raises(InputError, match=r"through the student: the step must have parts=\.\.\."):
        student_parts(step)
    with pytest.raises(InputError, match=r"through the teacher: it needs a live one, teacher_parts=\.\.\."):
        teacher_parts(step)


def test_parts_are_those_of_the_step(make_pair: Callable[[str], Any]) -> None:
    step = make_pair("same family").step(batch=2)
    assert student_parts(step) is step.parts
    assert teacher_parts(step) is step.teacher_parts


def test_own_draws_repeat_within_a_step_and_change_with_its_seed(
    network: nn.Module, make_step: Callable[..., Any]
) -> None:
    draws = []
    for seed in (3, 3, 4):
        step = replace(make_step(network), seed=seed)
        before = torch.get_rng_state()
        draws.append(torch.rand(4, generator=own_generator(step, torch.device("cpu"))))
        assert torch.equal(before, torch.get_rng_state())
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])
