"""What holds for all objectives that read a network's last features: norm, itrd, kdpp, srd, wkd_feature."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from soteacher.objective import Method, Objective
from soteacher.objectives.features import FeatureConfig
from soteacher.objectives.student import itrd, kdpp, norm, norm_crd, norm_kd, srd, wkd, wkd_feature
from soteacher.types import DistillStep, NetworkFacts, Task

CONFIGS: dict[str, type[FeatureConfig]] = {
    "norm": norm.NORMConfig,
    "itrd": itrd.ITRDConfig,
    "kdpp": kdpp.KDPPConfig,
    "srd": srd.SRDConfig,
    "wkd_feature": wkd_feature.WKDFeatureConfig,
}
CLASSES, BATCH = 5, 4
STUDENT, TEACHER = {"stage1": (6, 4, 4), "pooled": (6,)}, {"stage1": (8, 3, 3), "pooled": (8,)}


@pytest.fixture(params=CONFIGS)
def name(request: pytest.FixtureRequest) -> str:
    return request.param


def build(name: str, student: dict[str, tuple[int, ...]] = STUDENT, **settings: Any) -> Objective[Any]:
    torch.manual_seed(0)
    task = Task(
        num_examples=12,
        num_classes=CLASSES,
        network=NetworkFacts(name="student", taps=student, num_logits=CLASSES),
        teacher=NetworkFacts(name="teacher", taps=TEACHER, num_logits=CLASSES),
    )
    return CONFIGS[name].model_validate(settings).build(task)


def features(taps: dict[str, tuple[int, ...]], make: Callable[..., Tensor], batch: int) -> dict[str, Tensor]:
    return {tap: make(batch, *shape).requires_grad_() for tap, shape in taps.items()}


@pytest.fixture
def step_of(make_step: Callable[..., DistillStep]) -> Callable[..., DistillStep]:
    def step(make: Callable[..., Tensor] = torch.randn, batch: int = BATCH) -> DistillStep:
        torch.manual_seed(1)
        return make_step(
            nn.Identity(),
            logits=torch.randn(batch, CLASSES),
            indices=tuple(range(batch)),
            features=features(STUDENT, make, batch),
            teacher_features=features(TEACHER, torch.randn, batch),
        )

    return step


def gradients(step: DistillStep, objective: Objective[Any]) -> list[Tensor]:
    student = [step.outputs.features[tap] for tap in objective.features]
    return list(torch.autograd.grad(objective(step), [*student, *objective.parameters()], materialize_grads=True))


@pytest.mark.parametrize("pair", ["same family", "other family", "transformer teacher", "transformer student"])
def test_objective_works_on_every_pair(name: str, make_pair: Callable[[str], Any], pair: str) -> None:
    made = make_pair(pair)
    torch.manual_seed(0)
    objective = CONFIGS[name]().build(made.task)
    assert objective.name == name
    value = objective(made.step(objective))
    value.backward()
    assert value.dtype == torch.float32
    assert value.shape == ()
    assert value.isfinite()
    assert value > 0
    assert any(weight.grad is not None and weight.grad.abs().sum() > 0 for weight in made.student.parameters())


def test_forward_changes_nothing_and_gradients_reach_the_student_only(name: str, step_of: Any) -> None:
    objective, step = build(name), step_of()
    before = {key: value.clone() for key, value in objective.state_dict().items()}
    random = torch.get_rng_state()
    first, second = objective(step), objective(step)
    assert torch.equal(first, second)
    assert torch.equal(torch.get_rng_state(), random)
    assert all(torch.equal(value, before[key]) for key, value in objective.state_dict().items())
    assert all(gradient.isfinite().all() for gradient in gradients(step, objective))
    first.backward()
    assert all(feature.grad is None for feature in step.teacher.features.values())


@pytest.mark.parametrize("make", [torch.zeros, torch.ones], ids=["zero", "equal"])
def test_constant_features_give_finite_gradients(name: str, step_of: Any, make: Callable[..., Tensor]) -> None:
    objective, step = build(name), step_of(make)
    step = replace(step, teacher=replace(step.teacher, features=features(TEACHER, make, BATCH)))
    assert objective(step).isfinite()
    assert all(gradient.isfinite().all() for gradient in gradients(step, objective))


def test_one_example_gives_finite_gradients(name: str, step_of: Any) -> None:
    objective, step = build(name), step_of(batch=1)
    assert objective(step).isfinite()
    assert all(gradient.isfinite().all() for gradient in gradients(step, objective))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_features_are_computed_with_in_single(name: str, step_of: Any, dtype: torch.dtype) -> None:
    objective, step = build(name), step_of()
    half = {tap: (60 * value).to(dtype) for tap, value in step.outputs.features.items()}
    value = objective(replace(step, outputs=replace(step.outputs, features=half)))
    single = {tap: value.float() for tap, value in half.items()}
    assert value.dtype == torch.float32
    expected = objective(replace(step, outputs=replace(step.outputs, features=single)))
    torch.testing.assert_close(value, expected, rtol=1e-6, atol=0)


def test_autocast_changes_nothing(name: str, step_of: Any) -> None:
    objective, step = build(name), step_of()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = objective(step)
    torch.testing.assert_close(mixed, objective(step), rtol=1e-6, atol=0)


def test_the_order_of_the_batch_does_not_matter(name: str, step_of: Any) -> None:
    objective, step = build(name), step_of()
    turned = [3, 1, 0, 2]

    def turn(values: dict[str, Tensor]) -> dict[str, Tensor]:
        return {tap: value[turned] for tap, value in values.items()}

    other = replace(
        step,
        labels=step.labels[turned],
        outputs=replace(step.outputs, features=turn(step.outputs.features)),
        teacher=replace(step.teacher, features=turn(step.teacher.features)),
    )
    torch.testing.assert_close(objective(other), objective(step), rtol=1e-5, atol=1e-6)


def test_a_few_steps_lower_the_loss(name: str, step_of: Any) -> None:
    objective, step = build(name), step_of()
    student = [step.outputs.features[tap] for tap in objective.features]
    optimizer = torch.optim.SGD([*student, *objective.parameters()], lr=1e-3)
    first = objective(step)
    for _ in range(2):
        optimizer.zero_grad()
        objective(step).backward()
        optimizer.step()
    assert objective(step) < first


@pytest.mark.parametrize(
    "method", [norm, norm_kd, norm_crd, itrd, kdpp, srd, wkd, wkd_feature], ids=lambda m: m.__name__
)
def test_methods_are_named_as_their_files_and_their_settings_fit(method: Any) -> None:
    found: Method = method.METHOD
    assert found.name == method.__name__.rpartition(".")[2]
    for term, settings in found.terms.items():
        if term in CONFIGS:
            CONFIGS[term].model_validate(settings)


def test_more_pairs_are_summed_by_the_objectives_on_maps(step_of: Any) -> None:
    step = step_of()
    for name in ("norm", "wkd_feature"):
        taps = {"student_taps": ("stage1", "stage1"), "teacher_taps": ("stage1", "stage1")}
        both, one = build(name, **taps), build(name)
        layers = next(both.children())
        for layer in layers.children():
            layer.load_state_dict(next(next(one.children()).children()).state_dict())
        torch.testing.assert_close(both(step), 2 * one(step))


def test_two_pairs_are_refused_by_the_objectives_on_vectors() -> None:
    for name in ("itrd", "kdpp", "srd"):
        with pytest.raises(ValueError, match=f"{name} compares one pair of features, got 2"):
            build(name, student_taps=("stage1", "pooled"), teacher_taps=("stage1", "pooled"))
