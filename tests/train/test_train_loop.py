import copy
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from soteacher.errors import InputError, InterruptedRunError
from soteacher.objective import Objective
from soteacher.randomness import derive_seed
from soteacher.train.loop import fabric_for
from soteacher.types import Step

SGD = {"name": "sgd", "learning_rate": 0.1, "momentum": 0.9, "weight_decay": 0.01}
CONSTANT = {"name": "constant"}
CROSS_ENTROPY = {"cross_entropy": {}}
SOTEACHER = {"cross_entropy": {}, "lipschitz": {"weight": 1e-3}, "consistency": {"weight": 2.0, "ramp": "linear"}}
KD = {"cross_entropy": {"weight": 0.3}, "kd": {"weight": 0.7, "temperature": 3.0}}


class Memory(Objective[Step]):
    """An objective with everything that a resumed run must bring back: a buffer, a counter and a trained layer."""

    name = "memory"
    mean: Tensor
    count: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 3)
        self.register_buffer("mean", torch.zeros(3))
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))

    def forward(self, step: Step) -> Tensor:
        return (self.layer(step.outputs.logits) - self.mean).square().mean()

    @torch.no_grad()
    def update(self, step: Step) -> None:
        self.mean.lerp_(step.outputs.logits.mean(0), 0.1)
        self.count += 1


def _memory() -> Memory:
    torch.manual_seed(5)
    return Memory()


def _plain_losses(
    training: Any, terms: dict[str, dict[str, Any]], *, clip: float | None = None
) -> list[dict[str, float]]:
    """Train a copy of the network by a loop written out by hand; return each epoch's mean of every term."""
    network, teacher = copy.deepcopy(training.classifier), training.teacher
    network.train()
    parameters = list(network.parameters())
    velocity = [torch.zeros_like(parameter) for parameter in parameters]
    seen: dict[int, list[Tensor]] = {}
    epochs = []
    for epoch in range(2):
        sums = dict.fromkeys(terms, 0.0)
        for step, batch in enumerate(training.batches.epoch(epoch)):
            torch.manual_seed(derive_seed(0, "step", epoch, step))
            logits = network(batch.images)
            parts = {"cross_entropy": F.cross_entropy(logits, batch.labels)}
            if "kd" in terms:
                hot = terms["kd"]["temperature"]
                target, own = (teacher(batch.images) / hot).softmax(1), (logits / hot).softmax(1)
                parts["kd"] = hot**2 * (target * (target.log() - own.log())).sum(1).mean()
            if "lipschitz" in terms:
                inner = network.network
                parts["lipschitz"] = (
                    inner.convolution.weight.abs().sum((0, 2, 3)).max()
                    + (inner.norm.weight.abs() / (inner.norm.running_var + inner.norm.eps).sqrt()).max()
                    + inner.head.weight.abs().sum(0).max()
                )
            if "consistency" in terms:
                rows = zip(batch.indices.tolist(), logits.softmax(1), strict=True)
                distances = [((p - torch.stack(seen[i]).mean(0)) ** 2).sum() for i, p in rows if i in seen]
                parts["consistency"] = torch.stack([*distances, torch.zeros(())]).sum() / len(batch.labels)
                for index, own in zip(batch.indices.tolist(), logits.detach().softmax(1), strict=True):
                    seen.setdefault(index, []).append(own)
            weights = {name: terms[name].get("weight", 1.0) for name in terms}
            if "consistency" in terms:
                weights["consistency"] *= (epoch + 1) / 2
            weighted = {name: weights[name] * parts[name] for name in terms}
            gradients = torch.autograd.grad(sum(weighted.values()), parameters)
            norm = torch.stack([gradient.square().sum() for gradient in gradients]).sum().sqrt()
            factor = 1.0 if clip is None else min(1.0, clip / (norm.item() + 1e-6))
            with torch.no_grad():
                for parameter, speed, gradient in zip(parameters, velocity, gradients, strict=True):
                    speed.mul_(0.9).add_(factor * gradient + 0.01 * parameter)
                    parameter -= 0.1 * speed
            for name, value in weighted.items():
                sums[name] += value.item() * len(batch.labels)
        epochs.append({name: value / 40 for name, value in sums.items()})
    training.plain = network
    return epochs


@pytest.mark.parametrize(
    ("terms", "distil", "clip"),
    [(CROSS_ENTROPY, False, None), (CROSS_ENTROPY, False, 0.5), (SOTEACHER, False, None), (KD, True, None)],
    ids=["cross_entropy", "gradient_clip", "soteacher", "kd"],
)
def test_fit_is_the_loop_written_by_hand(make_training, terms, distil, clip) -> None:
    training = make_training(terms=terms, distil=distil, optimizer=SGD, schedule=CONSTANT, gradient_clip=clip)
    wanted = _plain_losses(training, terms, clip=clip)
    history = training.run()
    for line, losses in zip(history, wanted, strict=True):
        assert line["losses"] == pytest.approx(losses, rel=1e-4, abs=1e-7)
        assert line["train_loss"] == pytest.approx(sum(losses.values()), rel=1e-5)
    for name, value in training.plain.state_dict().items():
        assert torch.allclose(training.classifier.state_dict()[name], value, rtol=1e-4, atol=1e-6), name


def test_gradient_clip_changes_the_weights(make_training) -> None:
    states = [
        make_training(f"clip{clip}", terms=CROSS_ENTROPY, optimizer=SGD, gradient_clip=clip) for clip in (None, 0.01)
    ]
    for training in states:
        training.run()
    assert not torch.equal(states[0].state()["network.head.weight"], states[1].state()["network.head.weight"])


def test_fit_leaves_a_line_for_each_epoch(make_training) -> None:
    training = make_training(terms=SOTEACHER, optimizer=SGD)
    history = training.run(measured={"test_accuracy": 0.25, "test_nll": 1.5})
    assert [line["epoch"] for line in history] == [0, 1]
    first = history[0]
    assert set(first["losses"]) == set(SOTEACHER)
    assert 0 <= first["train_accuracy"] <= 1
    assert first["train_accuracy"] * 40 == pytest.approx(round(first["train_accuracy"] * 40))
    assert (first["learning_rate"], first["test_accuracy"], first["test_nll"]) == (0.1, 0.25, 1.5)
    assert first["images_per_second"] == pytest.approx(40 / first["seconds"])
    assert [(report.epoch, report.step) for report in training.reports] == [(0, 3), (1, 3)]
    assert training.reports[-1].loss == pytest.approx(history[-1]["train_loss"])
    assert training.reports[-1].accuracy == pytest.approx(history[-1]["train_accuracy"])


def test_fit_asks_for_a_display_in_long_epochs(make_training, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("soteacher.train.loop.CHECK_EVERY", 2)
    training = make_training(terms=CROSS_ENTROPY)
    history = training.run()
    assert [report.step for report in training.reports] == [2, 3, 2, 3]
    assert training.reports[1].loss == pytest.approx(history[0]["train_loss"])


def test_fit_learns(make_training) -> None:
    history = make_training(terms=CROSS_ENTROPY, epochs=12, optimizer=SGD, schedule={"name": "cosine"}).run()
    assert history[-1]["train_loss"] < 0.8 * history[0]["train_loss"]


def test_objectives_see_where_the_step_stands(make_training) -> None:
    steps: list[Step] = []

    class Watches(Objective[Step]):
        name = "watches"

        def forward(self, step: Step) -> Tensor:
            steps.append(step)
            return step.outputs.logits.sum() * 0

    training = make_training(terms=CROSS_ENTROPY, objectives=(Watches(),))
    training.run()
    assert [step.epoch for step in steps] == [0, 0, 0, 1, 1, 1]
    assert [step.progress for step in steps] == pytest.approx([0, 1 / 6, 2 / 6, 3 / 6, 4 / 6, 5 / 6])
    assert {step.num_epochs for step in steps} == {2}
    assert all(step.model is training.trainee.network for step in steps)
    for epoch in (0, 1):
        indices = torch.cat([step.indices for step in steps if step.epoch == epoch])
        assert sorted(indices.tolist()) == list(range(40))


def test_two_trainings_are_equal_bit_for_bit(make_training) -> None:
    trainings = [make_training(f"run{number}", terms=SOTEACHER) for number in (0, 1)]
    histories = [_without_times(training.run()) for training in trainings]
    assert histories[0] == histories[1]
    _assert_same(trainings[0].state(), trainings[1].state())


def test_another_seed_is_another_training(make_training) -> None:
    trainings = [make_training(f"seed{seed}", terms=CROSS_ENTROPY, seed=seed) for seed in (0, 1)]
    assert _without_times(trainings[0].run()) != _without_times(trainings[1].run())


@pytest.mark.parametrize(
    "settings",
    [
        {"terms": SOTEACHER, "optimizer": SGD},
        {"terms": SOTEACHER, "optimizer": {"name": "adamw"}, "schedule": {"name": "cosine", "warmup_epochs": 1}},
        {"terms": KD, "distil": True, "gradient_clip": 0.5, "precision": "bf16-mixed"},
        {"terms": SOTEACHER, "channels_last": True},
        {"terms": CROSS_ENTROPY, "optimizer": {"name": "sgd", "momentum": 0.0}},
    ],
    ids=["sgd", "adamw", "kd bf16", "channels_last", "no momentum"],
)
@pytest.mark.parametrize("steps", [1, 2, 3, 4, 5, 6])
def test_a_training_stopped_after_any_step_goes_on_bit_for_bit(make_training, settings, steps) -> None:
    whole = make_training("whole", **settings)
    wanted = _without_times(whole.run())
    stopped = make_training("stopped", **settings)
    if steps < 6:
        with pytest.raises(InterruptedRunError, match=r"^stopped after step \d of epoch \d; the state is saved$"):
            stopped.run(stop_after=steps)
    else:  # after its last step a training is as good as finished
        stopped.run(stop_after=steps)
    resumed = make_training("stopped", **settings)
    with torch.no_grad():  # whatever it starts from is of no account
        for parameter in resumed.classifier.parameters():
            parameter.add_(1)
    assert _without_times(resumed.run()) == wanted
    _assert_same(resumed.state(), whole.state())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", ["sgd", "adamw"])
@pytest.mark.parametrize("settings", [{"terms": SOTEACHER}, {"terms": KD, "distil": True, "precision": "bf16-mixed"}])
def test_a_training_on_a_gpu_goes_on_bit_for_bit(make_training, settings, name) -> None:
    settings = settings | {"device": "cuda", "channels_last": True, "optimizer": {"name": name}}
    whole = make_training("whole", **settings)
    wanted = _without_times(whole.run())
    with pytest.raises(InterruptedRunError):
        make_training("stopped", **settings).run(stop_after=2)
    resumed = make_training("stopped", **settings)
    assert _without_times(resumed.run()) == wanted
    _assert_same(resumed.state(), whole.state())


def test_a_training_stopped_again_and_again_goes_on_bit_for_bit(make_training) -> None:
    def make(folder: str) -> Any:
        return make_training(folder, terms=CROSS_ENTROPY, objectives=(_memory(),), optimizer=SGD)

    whole = make("whole")
    wanted = _without_times(whole.run())
    for _ in range(4):
        with pytest.raises(InterruptedRunError):
            make("stopped").run(stop_after=1)
    resumed = make("stopped")
    assert _without_times(resumed.run()) == wanted
    _assert_same(resumed.state(), whole.state())
    assert resumed.state()["memory.count"] == 6
    assert not torch.equal(resumed.state()["memory.layer.weight"], _memory().layer.weight)


def test_a_stop_at_the_end_of_an_epoch_keeps_the_epoch(make_training) -> None:
    training = make_training(terms=CROSS_ENTROPY)
    with pytest.raises(InterruptedRunError, match="after step 1 of epoch 1"):
        training.run(stop_after=3)
    assert len(training.checkpoint.history()) == 1


def test_seconds_go_on_after_a_stop(make_training) -> None:
    with pytest.raises(InterruptedRunError):
        make_training(terms=CROSS_ENTROPY).run(stop_after=1)
    training = make_training(terms=CROSS_ENTROPY)
    before = training.checkpoint.load(
        network=training.trainee.network, optimizer=training.trainee.optimizer.optimizer, terms=training.trainee.terms
    )
    assert before is not None
    assert before.seconds > 0
    assert training.run()[0]["seconds"] > before.seconds


def test_a_finished_training_takes_no_step(make_training) -> None:
    first = make_training(terms=CROSS_ENTROPY)
    history = first.run()
    again = make_training(terms=CROSS_ENTROPY)
    assert again.run() == history
    assert again.reports == []
    _assert_same(again.state(), first.state())


def test_channels_last_gives_close_numbers(make_training) -> None:
    histories = [
        make_training(f"run{last}", terms=SOTEACHER, optimizer=SGD, channels_last=last).run() for last in (False, True)
    ]
    for usual, last in zip(*histories, strict=True):
        assert usual["losses"] == pytest.approx(last["losses"], rel=1e-3)


def test_bf16_trains_in_bf16_and_keeps_losses_and_weights_in_float32(make_training) -> None:
    seen: set[torch.dtype] = set()
    training = make_training(terms=KD, distil=True, optimizer=SGD, precision="bf16-mixed")
    convolution = training.trainee.network.convolution
    convolution.register_forward_hook(lambda *call: seen.add(call[2].dtype))
    history = training.run()
    assert seen == {torch.bfloat16}
    assert convolution.weight.dtype == torch.float32
    precise = make_training("precise", terms=KD, distil=True, optimizer=SGD).run()
    assert history[0]["losses"] == pytest.approx(precise[0]["losses"], rel=0.03)
    assert history[0]["losses"] != precise[0]["losses"]


def test_the_teacher_stays_as_it_is_and_sees_the_students_images(make_training) -> None:
    training = make_training(terms=KD, distil=True, optimizer=SGD)
    before = copy.deepcopy(training.teacher.state_dict())
    seen: list[Tensor] = []
    training.teacher.register_forward_pre_hook(lambda *call: seen.append(call[1][0]))
    training.run()
    _assert_same(training.teacher.state_dict(), before)
    assert not training.teacher.training
    assert torch.equal(seen[0], next(iter(training.batches.epoch(0))).images)


@pytest.mark.parametrize(
    ("stop_after", "good"), [(None, "no epoch was finished before"), (2, "the last good state is")]
)
def test_a_loss_that_is_not_finite_names_step_term_and_state(make_training, stop_after, good) -> None:
    class Breaks(Objective[Step]):
        name = "breaks"

        def forward(self, step: Step) -> Tensor:
            return step.outputs.logits.sum() * (math.nan if step.epoch == 0 and len(step.labels) == 8 else 1)

    if stop_after:
        with pytest.raises(InterruptedRunError):
            make_training(terms=CROSS_ENTROPY, objectives=(Breaks(),)).run(stop_after=stop_after)
    training = make_training(terms=CROSS_ENTROPY, objectives=(Breaks(),))
    with pytest.raises(InputError) as caught:
        training.run()
    message = str(caught.value)
    assert "not finite at step 2 of epoch 0, in the term breaks;" in message
    assert good in message
    assert "learning rate" in message
    assert "\n" not in message
    assert training.checkpoint.path.exists() == bool(stop_after)  # nothing broken is kept


def test_a_step_that_breaks_the_weights_is_noticed_before_they_are_kept(make_training) -> None:
    training = make_training(terms=CROSS_ENTROPY)
    with pytest.raises(InputError, match="not finite after epoch 0, in test_nll; no epoch was finished before"):
        training.run(measured={"test_accuracy": 0.5, "test_nll": math.nan})
    assert not training.checkpoint.path.exists()


def test_weights_that_a_step_has_broken_are_not_kept_by_a_stop(make_training) -> None:
    class Shakes(Objective[Step]):
        name = "shakes"

        def forward(self, step: Step) -> Tensor:
            return step.outputs.logits.sum()

        def update(self, step: Step) -> None:
            with torch.no_grad():
                next(step.model.parameters()).fill_(math.inf)

    training = make_training(terms=CROSS_ENTROPY, objectives=(Shakes(),))
    with pytest.raises(InputError, match="not finite after step 1 of epoch 0, in the weights; no epoch was finished"):
        training.run(stop_after=1)
    assert not training.checkpoint.path.exists()


def test_update_sees_the_weights_that_the_loss_has_seen(make_training) -> None:
    seen: list[float] = []

    class Watches(Objective[Step]):
        name = "watches"

        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(3, 1)

        def forward(self, step: Step) -> Tensor:
            loss = self.layer(step.outputs.logits).mean()
            seen.append(loss.item())
            return loss

        def update(self, step: Step) -> None:
            seen.append(self.layer(step.outputs.logits).mean().item())

    make_training(terms=CROSS_ENTROPY, objectives=(Watches(),)).run()
    assert seen[::2] == seen[1::2]
    assert len(set(seen)) > 2  # it is trained


def test_fabric_for_takes_device_and_precision() -> None:
    assert fabric_for("cpu", "fp32").device == torch.device("cpu")
    assert fabric_for("cpu", "bf16-mixed")._precision.precision == "bf16-mixed"


def _without_times(history: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{k: v for k, v in line.items() if k not in ("seconds", "images_per_second")} for line in history]


def _assert_same(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    for name, value in one.items():
        assert torch.equal(value, other[name]), name
