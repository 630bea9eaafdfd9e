import math

import numpy as np
import pytest
import torch
from torch import nn

from soteacher.errors import InputError
from soteacher.train.config import AdamWConfig, SGDConfig, TrainingConfig, epochs_at
from soteacher.train.optimizer import build_optimizer, learning_rate


def _config(epochs: int, schedule: dict[str, object], rate: float = 0.05) -> TrainingConfig:
    return TrainingConfig.model_validate({"epochs": epochs, "optimizer": {"learning_rate": rate}, "schedule": schedule})


def _rates(config: TrainingConfig, steps: int = 1) -> list[float]:
    places = [(epoch, step) for epoch in range(config.epochs) for step in range(steps)]
    return [learning_rate(config, epoch=epoch, step=step, steps_per_epoch=steps) for epoch, step in places]


def test_multistep_falls_at_epochs_150_180_and_210_of_240() -> None:
    rates = _rates(TrainingConfig())
    assert rates[:150] == [0.05] * 150
    assert rates[150:180] == pytest.approx([0.005] * 30)
    assert rates[180:210] == pytest.approx([0.0005] * 30)
    assert rates[210:] == pytest.approx([0.00005] * 30)


def test_multistep_scales_with_the_run() -> None:
    rates = _rates(TrainingConfig(epochs=24))
    assert rates == pytest.approx([0.05] * 15 + [0.005] * 3 + [0.0005] * 3 + [0.00005] * 3)


def test_multistep_takes_whole_epochs_and_a_factor() -> None:
    rates = _rates(_config(6, {"name": "multistep", "milestones": [2, 5], "factor": 0.5}, rate=1.0))
    assert rates == [1, 1, 0.5, 0.5, 0.5, 0.25]


def test_multistep_without_milestones_is_constant() -> None:
    assert _rates(_config(3, {"name": "multistep", "milestones": []}, rate=1.0)) == [1, 1, 1]


def test_cosine_falls_step_by_step_to_its_share() -> None:
    config = _config(2, {"name": "cosine", "final_share": 0.1}, rate=2.0)
    wanted = [2 * (0.1 + 0.9 * (1 + math.cos(math.pi * done / 8)) / 2) for done in range(8)]
    assert _rates(config, steps=4) == pytest.approx(wanted)
    assert _rates(config, steps=4)[0] == 2.0


def test_cosine_is_that_of_torch() -> None:
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=12)
    wanted = []
    for _ in range(12):
        wanted.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    assert _rates(_config(3, {"name": "cosine"}, rate=0.3), steps=4) == pytest.approx(wanted)


@pytest.mark.parametrize("name", ["multistep", "cosine", "constant"])
def test_warmup_rises_step_by_step(name: str) -> None:
    rates = _rates(_config(8, {"name": name, "warmup_epochs": 2}, rate=0.8), steps=2)
    assert rates[:4] == pytest.approx([0.2, 0.4, 0.6, 0.8])
    assert rates[4] == pytest.approx(0.8)
    assert max(rates) == pytest.approx(0.8)


def test_constant_stays() -> None:
    assert _rates(_config(3, {"name": "constant"}, rate=0.7)) == [0.7] * 3


@pytest.mark.parametrize(
    ("point", "num_epochs", "epochs"),
    [(0.5, 7, 4), (0.625, 240, 150), (0.001, 5, 1), (0.999, 5, 5), (1, 5, 1), (5, 5, 5), (3.0, 5, 3)],
)
def test_epochs_at_takes_shares_and_whole_epochs(point: float, num_epochs: int, epochs: int) -> None:
    assert epochs_at(point, num_epochs) == epochs


@pytest.mark.parametrize(
    ("point", "message"),
    [(6, "6 is past the end of 5 epochs"), (2.5, "2.5 is neither"), (0, "0 is neither"), (-1, "-1 is neither")],
)
def test_epochs_at_refuses(point: float, message: str) -> None:
    with pytest.raises(InputError, match=message):
        epochs_at(point, 5)


def test_sgd_takes_its_settings_and_leaves_frozen_parameters_out() -> None:
    network = nn.Linear(2, 2)
    network.bias.requires_grad_(False)
    config = SGDConfig(learning_rate=0.3, momentum=0.8, nesterov=True, weight_decay=0.02)
    (group,) = build_optimizer(config, network.parameters()).param_groups
    assert [parameter is network.weight for parameter in group["params"]] == [True]
    assert (group["lr"], group["momentum"], group["nesterov"], group["weight_decay"]) == (0.3, 0.8, True, 0.02)


def test_adamw_takes_its_settings() -> None:
    config = AdamWConfig(name="adamw", learning_rate=0.3, betas=(0.8, 0.9), weight_decay=0.02)
    optimizer = build_optimizer(config, nn.Linear(2, 2).parameters())
    assert isinstance(optimizer, torch.optim.AdamW)
    (group,) = optimizer.param_groups
    assert (group["lr"], group["betas"], group["weight_decay"]) == (0.3, (0.8, 0.9), 0.02)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"epochs": 0}, "epochs: should be greater than or equal to 1, got 0"),
        ({"epochs": "many"}, "epochs: wanted a whole number, got 'many'"),
        ({"batch_size": 0}, "batch_size: should be greater than or equal to 1, got 0"),
        ({"optimizer": {"learning_rate": -1}}, "optimizer.learning_rate: should be greater than 0, got -1"),
        ({"optimizer": {"learning_rate": float("nan")}}, "optimizer.learning_rate: should be"),
        ({"optimizer": {"name": "sgb"}}, "optimizer: unknown name 'sgb'; did you mean sgd?"),
        ({"optimizer": {"momentum": 0, "nesterov": True}}, "optimizer: nesterov needs a momentum above 0, got 0"),
        ({"optimizer": {"betas": [0.9, 0.99]}}, "optimizer: unknown key 'betas'; known:"),
        ({"optimizer": {"name": "adamw", "betas": [0.9, 1]}}, "optimizer.betas.1: should be less than 1, got 1"),
        ({"schedule": {"name": "cosin"}}, "schedule: unknown name 'cosin'; did you mean cosine?"),
        (
            {"epochs": 20, "schedule": {"milestones": [10, 25]}},
            "schedule.milestones: 25 is past the end of 20 epochs",
        ),
        ({"schedule": {"milestones": [20, 10]}}, "schedule.milestones must rise, got [20.0, 10.0]"),
        ({"schedule": {"milestones": [0.5, 2.5]}}, "schedule.milestones: 2.5 is neither a share of the run below 1"),
        ({"schedule": {"milestones": [0]}}, "schedule.milestones.0: should be greater than 0, got 0"),
        (
            {"epochs": 3, "schedule": {"warmup_epochs": 3}},
            "schedule.warmup_epochs must be below epochs (3), got 3",
        ),
        ({"gradient_clip": 0}, "gradient_clip: should be greater than 0, got 0"),
        ({"precision": "fp16"}, "precision: should be 'fp32' or 'bf16-mixed', got 'fp16'"),
        ({"save_every": 0}, "save_every: should be greater than or equal to 1, got 0"),
        ({"epoch": 3}, "unknown key 'epoch'; did you mean epochs"),
    ],
)
def test_training_settings_say_what_came_and_what_was_wanted(settings: dict[str, object], message: str) -> None:
    from soteacher.settings import parse

    with pytest.raises(InputError) as caught:
        parse(TrainingConfig, settings)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_weights_may_get_their_first_gradient_late(momentum: float) -> None:
    weights = [nn.Parameter(torch.tensor([1.0, 2.0])) for _ in range(3)]
    config = SGDConfig(learning_rate=0.1, momentum=momentum, weight_decay=0.01)
    optimizer = build_optimizer(config, weights)
    expected, velocities = [np.array([1.0, 2.0]) for _ in weights], [np.zeros(2) for _ in weights]
    for step, trained in enumerate([(0,), (0, 1), (1,), (0, 2)]):
        for place, weight in enumerate(weights):
            weight.grad = torch.full((2,), step + 1.0) if place in trained else None
        optimizer.step()
        for place in trained:
            velocities[place] = momentum * velocities[place] + (step + 1.0) + 0.01 * expected[place]
            expected[place] = expected[place] - 0.1 * velocities[place]
    for weight, value in zip(weights, expected, strict=True):
        np.testing.assert_allclose(weight.detach().numpy(), value, rtol=1e-6)
