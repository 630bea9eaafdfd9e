from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from scipy.special import rel_entr, softmax
from torch import Tensor, nn

from soteacher.errors import InputError
from soteacher.objectives.student import mlkd, mlkd_relations, mlkd_standardized
from soteacher.objectives.student.mlkd import MLKDConfig, below_median_share, multi_temperature_divergence
from soteacher.objectives.student.mlkd_relations import MLKDRelationsConfig, batch_gram_distance, class_gram_distance
from soteacher.types import DistillStep, Outputs, Task

TEMPERATURES = (2.0, 3.0, 4.0, 5.0, 6.0)
PAIRS = ["same family", "other family", "transformer teacher", "transformer student"]


@pytest.fixture
def logits() -> list[Tensor]:
    """Student and teacher, weak and strong: ``[4, 5]`` each."""
    torch.manual_seed(0)
    return [2 * torch.randn(4, 5, dtype=torch.float64) for _ in range(4)]


@pytest.fixture
def step(network: nn.Module, make_step: Callable[..., DistillStep], logits: list[Tensor]) -> DistillStep:
    student, teacher, student_strong, teacher_strong = (Outputs(logits=z, features={}) for z in logits)
    step = make_step(network, views={"strong": student_strong}, teacher_views={"strong": teacher_strong})
    object.__setattr__(step, "outputs", student)
    object.__setattr__(step, "teacher", teacher)
    return step


def divergence(student: Tensor, teacher: Tensor, temperature: float) -> np.ndarray[Any, Any]:
    p_s, p_t = (softmax(z.numpy() / temperature, axis=1) for z in (student, teacher))
    return temperature**2 * rel_entr(p_t, p_s).sum(axis=1)


def test_multi_temperature_divergence_equals_scipy(logits: list[Tensor]) -> None:
    expected = sum(divergence(logits[0], logits[1], value) for value in TEMPERATURES)
    found = multi_temperature_divergence(logits[0], logits[1], temperatures=TEMPERATURES)
    torch.testing.assert_close(found, torch.from_numpy(expected))


def test_gram_distances_equal_numpy(logits: list[Tensor]) -> None:
    student, teacher = (softmax(z.numpy() / 3, axis=1) for z in logits[:2])
    batch = ((teacher @ teacher.T - student @ student.T) ** 2).sum() / 4
    classes = ((teacher.T @ teacher - student.T @ student) ** 2).sum() / 5
    torch.testing.assert_close(batch_gram_distance(*logits[:2], temperature=3.0), torch.tensor(batch))
    torch.testing.assert_close(class_gram_distance(*logits[:2], temperature=3.0), torch.tensor(classes))


@pytest.mark.parametrize("distance", [batch_gram_distance, class_gram_distance])
def test_gram_distances_are_zero_at_agreement_and_ignore_the_order(
    distance: Callable[..., Tensor], logits: list[Tensor]
) -> None:
    student, teacher = logits[:2]
    order = torch.tensor([2, 0, 3, 1])
    torch.testing.assert_close(
        distance(student, student + 1, temperature=2.0), torch.zeros((), dtype=torch.float64), rtol=0, atol=1e-30
    )
    torch.testing.assert_close(
        distance(student[order], teacher[order], temperature=2.0), distance(student, teacher, temperature=2.0)
    )
    assert torch.autograd.gradcheck(lambda z: distance(z, teacher, temperature=2.0), student.requires_grad_())


def test_below_median_share() -> None:
    assert below_median_share(torch.tensor([0.1, 0.4, 0.2, 0.9])) == 0.5
    assert below_median_share(torch.tensor([0.1, 0.4, 0.9])) == pytest.approx(2 / 3)
    assert below_median_share(torch.tensor([0.7])) == 1.0
    assert below_median_share(torch.tensor([0.3, 1.0, 1.0, 1.0])) == 1.0


def test_mlkd_weighs_the_own_view_by_the_share(step: DistillStep, logits: list[Tensor], task: Task) -> None:
    student, teacher, student_strong, teacher_strong = logits
    weak = sum(divergence(student, teacher, value).mean() for value in TEMPERATURES)
    strong = sum(divergence(student_strong, teacher_strong, value).mean() for value in TEMPERATURES)
    objective = MLKDConfig().build(task)
    assert objective.views == ("strong",)
    assert objective(step).item() == pytest.approx(0.5 * weak + strong)


def test_mlkd_relations_weigh_both_levels(step: DistillStep, logits: list[Tensor], task: Task) -> None:
    batch = sum(batch_gram_distance(*logits[:2], temperature=value) for value in TEMPERATURES)
    classes = sum(class_gram_distance(*logits[:2], temperature=value) for value in TEMPERATURES)
    expected = 2 / 4 * batch + 3 / 5 * classes  # two of four examples, three of five classes
    torch.testing.assert_close(MLKDRelationsConfig().build(task)(step), expected)


def test_both_are_zero_at_agreement(step: DistillStep, task: Task) -> None:
    object.__setattr__(step, "outputs", step.teacher)
    object.__setattr__(step, "views", step.teacher_views)
    for config in (MLKDConfig(), MLKDRelationsConfig()):
        assert config.build(task)(step).abs() < 1e-12


def test_mlkd_gradcheck(logits: list[Tensor]) -> None:
    def value(student: Tensor) -> Tensor:
        return multi_temperature_divergence(student, logits[1], temperatures=TEMPERATURES)

    assert torch.autograd.gradcheck(value, logits[0].requires_grad_())


@pytest.mark.parametrize("pair_name", PAIRS)
def test_both_train_every_pair(make_pair: Callable[[str], Any], pair_name: str) -> None:
    pair = make_pair(pair_name)
    for config in (MLKDConfig(), MLKDRelationsConfig()):
        objective = config.build(pair.task)
        step = pair.step(objective)
        loss = objective(step)
        assert loss.isfinite()
        assert loss > 0
        gradient = torch.autograd.grad(loss, step.outputs.logits)[0]
        assert gradient.isfinite().all()
        assert gradient.abs().sum() > 0


def test_methods_take_the_released_weights() -> None:
    terms = mlkd.METHOD.terms
    assert {name: settings["weight"] for name, settings in terms.items()} == {
        "cross_entropy": 0.1, "view_cross_entropy": 0.1, "mlkd": 0.9, "mlkd_relations": 0.9,
    }  # fmt: skip
    standardized = mlkd_standardized.METHOD.terms
    assert MLKDConfig.model_validate(standardized["mlkd"]).standardize
    assert not MLKDRelationsConfig.model_validate(standardized["mlkd_relations"]).standardize


def test_impossible_input_is_refused(logits: list[Tensor]) -> None:
    with pytest.raises(InputError, match="at least one temperature"):
        multi_temperature_divergence(*logits[:2], temperatures=())
    with pytest.raises(InputError, match=r"values \[N\], at least one, got \[0\]"):
        below_median_share(torch.zeros(0))
    for distance in (batch_gram_distance, class_gram_distance):
        with pytest.raises(InputError, match="temperature must be positive"):
            distance(*logits[:2], temperature=0.0)
        with pytest.raises(InputError, match="one shape"):
            distance(logits[0], logits[1][:, :3], temperature=1.0)
    for config in (MLKDConfig, mlkd_relations.MLKDRelationsConfig):
        for temperatures in ([], [0.0], [-1.0]):
            with pytest.raises(ValidationError):
                config.model_validate({"temperatures": temperatures})
