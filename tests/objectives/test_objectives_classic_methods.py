"""What the classic feature and relation methods share: released values, networks of all kinds, and the edges."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from soteacher.errors import InputError
from soteacher.objective import Objective
from soteacher.objectives.features import FeatureConfig, TapPair
from soteacher.objectives.student import (
    attention,
    correlation,
    fitnet,
    fsp,
    kdsvd,
    nst,
    pkt,
    rkd,
    similarity,
    vid,
)
from soteacher.types import DistillStep, NetworkFacts, Outputs, Task

Golden = dict[str, Tensor]

CONFIGS: dict[str, type[FeatureConfig]] = {
    "fitnet": fitnet.FitNetConfig,
    "attention": attention.AttentionConfig,
    "similarity": similarity.SimilarityConfig,
    "correlation": correlation.CorrelationConfig,
    "vid": vid.VIDConfig,
    "rkd": rkd.RKDConfig,
    "pkt": pkt.PKTConfig,
    "nst": nst.NSTConfig,
    "kdsvd": kdsvd.KDSVDConfig,
    "fsp": fsp.FSPConfig,
}
METHODS = [module.METHOD for module in (fitnet, attention, similarity, correlation, vid, rkd, pkt, nst, kdsvd, fsp)]
EQUAL_CHANNELS = {"kdsvd", "fsp"}
TAPS = {"stem": (4, 8, 8), "stage1": (6, 8, 8), "stage2": (8, 4, 4), "stage3": (10, 2, 2), "pooled": (10,)}
TEACHER_TAPS = {"stem": (4, 4, 4), "stage1": (6, 4, 4), "stage2": (8, 4, 4), "stage3": (10, 4, 4), "pooled": (10,)}


def layers(given: Golden, side: str) -> list[Tensor]:
    return [given[f"{side}_stage{number}"] for number in (1, 2, 3)]


def by_stage(distance: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Golden], Tensor]:
    def total(given: Golden) -> Tensor:
        both = zip(layers(given, "student"), layers(given, "teacher"), strict=True)
        return torch.stack([distance(student, teacher).mean() for student, teacher in both]).sum()

    return total


def vid_from_release(given: Golden) -> Tensor:
    pair = TapPair(student="stage2", teacher="stage2", student_shape=(16, 8, 8), teacher_shape=(24, 4, 4))
    objective = vid.VID(vid.VIDConfig(), [pair])
    names = {"0.0.weight": "conv0_weight", "0.2.weight": "conv1_weight", "0.4.weight": "conv2_weight"}
    objective.regressors.load_state_dict({name: given[key] for name, key in names.items()})
    objective.log_scales[0].data.copy_(given["log_scale"])
    step = DistillStep(
        images=torch.zeros(16, 3, 2, 2),
        labels=torch.zeros(16, dtype=torch.int64),
        indices=torch.arange(16),
        outputs=Outputs(logits=torch.zeros(16, 5), features={"stage2": given["student_stage2"]}),
        teacher=Outputs(logits=torch.zeros(16, 5), features={"stage2": given["teacher_stage2"]}),
        model=nn.Identity(),
        epoch=0,
        num_epochs=1,
        progress=0.0,
    )
    return objective(step)


RELEASED: dict[str, tuple[str, Callable[[Golden], Tensor]]] = {
    "fitnet": ("hint", lambda g: fitnet.hint_distance(g["student_stage2"], g["teacher_stage2"]).mean()),
    "attention": ("attention", by_stage(attention.attention_distance)),
    "similarity": (
        "similarity",
        lambda g: similarity.similarity_distance(g["student_stage3"], g["teacher_stage3"]),
    ),
    "correlation": (
        "correlation",
        lambda g: correlation.correlation_distance(g["student_embedding"], g["teacher_embedding"]),
    ),
    "vid": ("vid", vid_from_release),
    "rkd": (
        "rkd",
        lambda g: rkd.relational_distance(
            g["student_embedding"], g["teacher_embedding"], distance_weight=25, angle_weight=50
        ),
    ),
    "pkt": ("pkt", lambda g: pkt.neighbour_divergence(g["student_embedding"], g["teacher_embedding"])),
    "nst": ("nst", by_stage(nst.selectivity_discrepancy)),
    "fsp": ("fsp", lambda g: fsp.flow_distance(layers(g, "student"), layers(g, "teacher")).mean()),
}


@pytest.fixture(params=CONFIGS)
def name(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def task() -> Task:
    student = NetworkFacts(name="student small", taps=TAPS, num_logits=5)
    return Task(
        num_examples=12,
        num_classes=5,
        network=student,
        teacher=NetworkFacts(name="teacher large", taps=TEACHER_TAPS, num_logits=5),
    )


@pytest.fixture
def objective(name: str, task: Task) -> Objective[DistillStep]:
    torch.manual_seed(0)
    return CONFIGS[name]().build(task)


def random_features(taps: dict[str, tuple[int, ...]], seed: int, batch: int = 4) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {tap: torch.randn(batch, *shape, generator=generator) for tap, shape in taps.items()}


def gradients(objective: nn.Module, loss: Tensor, leaves: dict[str, Tensor]) -> list[Tensor]:
    wanted = [*leaves.values(), *objective.parameters()]
    return list(torch.autograd.grad(loss, wanted, allow_unused=True, materialize_grads=True))


@pytest.mark.parametrize("method", RELEASED)
def test_equals_the_released_code(method: str, golden: Callable[[str], Golden]) -> None:
    file, value = RELEASED[method]
    given = golden(file)
    inputs = [key.removeprefix("grad_") for key in given if key.startswith("grad_")]
    for key in inputs:
        given[key].requires_grad_()
    loss = value(given)
    torch.testing.assert_close(loss, given["value"], rtol=1e-5, atol=0)
    for key, found in zip(inputs, torch.autograd.grad(loss, [given[key] for key in inputs]), strict=True):
        wanted = given[f"grad_{key}"]
        assert (found - wanted).norm() < 1e-4 * wanted.norm(), key


@pytest.mark.parametrize("networks", ["same family", "other family", "transformer teacher", "transformer student"])
def test_builds_on_networks_of_every_kind(name: str, networks: str, make_pair: Callable[[str], Any]) -> None:
    pair = make_pair(networks)
    channels = [(found.student_shape[0], found.teacher_shape[0]) for found in CONFIGS[name]().pairs(pair.task)]
    if name in EQUAL_CHANNELS and any(student != teacher for student, teacher in channels):
        with pytest.raises(InputError, match=f"{name}: tap .* of student .* equal channels are wanted"):
            CONFIGS[name]().build(pair.task)
        return
    torch.manual_seed(0)
    objective = CONFIGS[name]().build(pair.task)
    loss = objective(pair.step(objective))
    assert loss.dtype == torch.float32
    assert 0 < loss < float("inf")
    parameters = [*pair.student.parameters(), *objective.parameters()]
    found = torch.autograd.grad(loss, parameters, allow_unused=True, materialize_grads=True)
    assert all(value.isfinite().all() for value in found)
    assert any(value.abs().sum() > 0 for value in found[: len(list(pair.student.parameters()))])


def test_loss_and_gradients_of_hand_made_features(
    name: str, objective: Objective[DistillStep], network: nn.Module, make_step: Callable[..., DistillStep]
) -> None:
    features = {tap: value.requires_grad_() for tap, value in random_features(TAPS, 0).items()}
    teacher = {tap: value.requires_grad_() for tap, value in random_features(TEACHER_TAPS, 1).items()}
    step = make_step(network, features=features, teacher_features=teacher)
    loss = objective(step)
    assert loss > 0
    assert torch.equal(loss, objective(step))
    assert objective.name == name
    found = dict(zip(features, gradients(objective, loss, features), strict=False))
    assert {tap for tap, value in found.items() if value.abs().sum() > 0} == set(objective.features)
    for value in gradients(nn.Identity(), objective(step), teacher):
        assert not value.any()


@pytest.mark.parametrize("value", [0.0, 1.0])
def test_constant_features_give_finite_gradients(
    objective: Objective[DistillStep], network: nn.Module, make_step: Callable[..., DistillStep], value: float
) -> None:
    features = {tap: torch.full((4, *shape), value).requires_grad_() for tap, shape in TAPS.items()}
    for teacher in (
        {tap: torch.full((4, *shape), value) for tap, shape in TEACHER_TAPS.items()},
        random_features(TEACHER_TAPS, 1),
    ):
        loss = objective(make_step(network, features=features, teacher_features=teacher))
        assert loss.isfinite()
        found = gradients(objective, loss, features)
        assert all(gradient.isfinite().all() and gradient.abs().max() < 1e3 for gradient in found)


def test_one_dead_example_gives_bounded_gradients(
    objective: Objective[DistillStep], network: nn.Module, make_step: Callable[..., DistillStep]
) -> None:
    features = {tap: value.index_fill(0, torch.tensor(2), 0.0) for tap, value in random_features(TAPS, 0).items()}
    leaves = {tap: value.requires_grad_() for tap, value in features.items()}
    teacher = random_features(TEACHER_TAPS, 1)
    loss = objective(make_step(network, features=leaves, teacher_features=teacher))
    assert all(gradient.abs().max() < 1e3 for gradient in gradients(objective, loss, leaves))


def test_a_batch_of_one_gives_a_finite_loss(
    objective: Objective[DistillStep], network: nn.Module, make_step: Callable[..., DistillStep]
) -> None:
    features = {tap: value.requires_grad_() for tap, value in random_features(TAPS, 0, batch=1).items()}
    step = make_step(
        network, indices=(3,), features=features, teacher_features=random_features(TEACHER_TAPS, 1, batch=1)
    )
    loss = objective(step)
    assert loss.isfinite()
    assert all(gradient.isfinite().all() for gradient in gradients(objective, loss, features))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_features_and_autocast_do_not_round(
    objective: Objective[DistillStep], network: nn.Module, make_step: Callable[..., DistillStep], dtype: torch.dtype
) -> None:
    sides = [
        {tap: value.to(dtype) for tap, value in random_features(taps, seed).items()}
        for seed, taps in enumerate((TAPS, TEACHER_TAPS))
    ]
    whole = [{tap: value.float() for tap, value in side.items()} for side in sides]
    expected = objective(make_step(network, features=whole[0], teacher_features=whole[1]))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rounded = objective(make_step(network, features=sides[0], teacher_features=sides[1]))
    assert rounded.dtype == torch.float32
    torch.testing.assert_close(rounded, expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("name", sorted(set(CONFIGS) - {"fitnet", "vid", "correlation"}), indirect=True)
def test_is_zero_at_agreement(
    objective: Objective[DistillStep], network: nn.Module, make_step: Callable[..., DistillStep]
) -> None:
    features = random_features(TAPS, 0)
    same = objective(make_step(network, features=features, teacher_features=features))
    torch.testing.assert_close(same, torch.zeros(()), rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", sorted(set(CONFIGS) - {"correlation"}), indirect=True)
def test_the_order_of_the_batch_does_not_matter(
    objective: Objective[DistillStep], network: nn.Module, make_step: Callable[..., DistillStep]
) -> None:
    order = torch.tensor([2, 0, 3, 1])
    sides = [random_features(TAPS, 0), random_features(TEACHER_TAPS, 1)]
    turned = [{tap: value[order] for tap, value in side.items()} for side in sides]
    losses = [objective(make_step(network, features=s, teacher_features=t)) for s, t in (sides, turned)]
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)
def test_methods_are_labels_and_the_objective_with_published_weights(method: Any) -> None:
    published = {
        "fitnet": 100, "attention": 1000, "similarity": 3000, "correlation": 0.02, "vid": 1, "rkd": 1, "pkt": 30000,
        "nst": 50, "kdsvd": 1, "fsp": 1,
    }  # fmt: skip
    assert method.terms["cross_entropy"] == {"weight": 1.0}
    assert set(method.terms) == {"cross_entropy", method.name}
    config = CONFIGS[method.name].model_validate(method.terms[method.name])
    assert config.weight == published[method.name]
    assert config.stage == ("preparation" if method.name == "fsp" else "training")
    assert config == CONFIGS[method.name](weight=config.weight, stage=config.stage)
    assert config.prepares_alone == (method.name == "fsp")


def test_attention_wants_maps_with_more_than_one_place(make_pair: Callable[..., Any]) -> None:
    task = make_pair("same family").task
    with pytest.raises(InputError, match=r"attention: tap 'pooled' of student wrn_10_1 is \[64, 1, 1\] .* larger maps"):
        attention.AttentionConfig(student_taps=("pooled",), teacher_taps=("pooled",)).build(task)
