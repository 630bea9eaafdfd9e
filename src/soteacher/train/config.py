"""How a network is trained: length, optimiser, schedule, precision."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Annotated, Any, Literal, cast

from pydantic import Field, model_validator

from soteacher.errors import InputError
from soteacher.mixing import MixingConfig
from soteacher.settings import Settings

Point = Annotated[float, Field(gt=0)]
"""A point of a run: a share of it when below 1, otherwise a whole number of finished epochs."""


Criterion = Literal["nll", "accuracy", "brier", "ece"]
"""A figure on held-out training images: the highest accuracy, or the lowest of the others."""


def epochs_at(point: float, num_epochs: int) -> int:
    """Return how many epochs are finished at a point of a run.

    Args:
        point: a share of the run in (0, 1), or a whole number of epochs from 1 to ``num_epochs``.
        num_epochs: length of the run.

    Raises:
        InputError: the point is past the end, or neither a share nor a whole number.
    """
    if 0 < point < 1:
        return max(1, math.floor(point * num_epochs + 0.5))
    if point != int(point) or point < 1:
        raise InputError(f"{point:g} is neither a share of the run below 1 nor a whole number of epochs")
    if point > num_epochs:
        raise InputError(f"{point:g} is past the end of {num_epochs} epochs")
    return int(point)


class SGDConfig(Settings):
    """Stochastic gradient descent with momentum."""

    name: Literal["sgd"] = "sgd"
    learning_rate: float = Field(default=0.05, gt=0)
    """Highest learning rate of the run."""
    momentum: float = Field(default=0.9, ge=0, lt=1)
    """Share of the earlier direction that is kept, in [0, 1)."""
    momentum_difference: float = Field(default=0.0, ge=0)
    """By how much the momentum of the distillation's gradient is above, and that of the task's below, ``momentum``;
    0: one momentum for their sum."""
    nesterov: bool = False
    """Whether to look ahead along the momentum."""
    weight_decay: float = Field(default=5e-4, ge=0)
    """Factor of the weights that is added to their gradient."""

    @model_validator(mode="after")
    def _nesterov_needs_momentum(self) -> SGDConfig:
        if self.nesterov and self.momentum == 0:
            raise InputError("nesterov needs a momentum above 0, got 0")
        return self

    @model_validator(mode="after")
    def _two_momenta_lie_in_range(self) -> SGDConfig:
        momentum, difference = self.momentum, self.momentum_difference
        if difference and (momentum + difference >= 1 or momentum - difference < 0):
            raise InputError(
                f"momentum_difference must leave both momenta in [0, 1), got {momentum:g} - {difference:g} and "
                f"{momentum:g} + {difference:g}"
            )
        if difference and self.nesterov:
            raise InputError(f"nesterov needs one momentum, got momentum_difference {difference:g}; leave one out")
        return self


class AdamWConfig(Settings):
    """Adam with decoupled weight decay."""

    name: Literal["adamw"]
    learning_rate: float = Field(default=1e-3, gt=0)
    """Highest learning rate of the run."""
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = (0.9, 0.999)
    """Decay of the averages of the gradient and of its square."""
    weight_decay: float = Field(default=0.05, ge=0)
    """Factor of the weights taken off in every step, times the learning rate."""


class MultiStepConfig(Settings):
    """The learning rate falls by a factor at each milestone."""

    name: Literal["multistep"] = "multistep"
    milestones: tuple[Point, ...] = (150 / 240, 180 / 240, 210 / 240)
    """When it falls: shares of the run (below 1) or whole epochs, rising."""
    factor: float = Field(default=0.1, gt=0, le=1)
    """What it is multiplied by."""
    warmup_epochs: int = Field(default=0, ge=0)
    """Epochs at the start during which it rises linearly, step by step."""


class CosineConfig(Settings):
    """The learning rate falls along half a cosine, step by step."""

    name: Literal["cosine"]
    final_share: float = Field(default=0.0, ge=0, le=1)
    """Share of the highest learning rate that is left at the end."""
    warmup_epochs: int = Field(default=0, ge=0)
    """Epochs at the start during which it rises linearly, step by step."""


class ConstantConfig(Settings):
    """The learning rate stays."""

    name: Literal["constant"]
    warmup_epochs: int = Field(default=0, ge=0)
    """Epochs at the start during which it rises linearly, step by step."""


class SWAConfig(Settings):
    """Stochastic weight averaging: the mean of the weights after every epoch from a point of the run on."""

    name: Literal["swa"]
    start: Point = 150 / 240
    """The first epoch whose weights count is the one that ends after this: a share of the run (below 1), or epochs."""


class EMAConfig(Settings):
    """Exponential moving average of the weights over the steps."""

    name: Literal["ema"]
    decay: float = Field(default=0.999, gt=0, lt=1)
    """Share of the average that a step keeps; its memory is about 1 / (1 - decay) steps long."""
    start: Point = 150 / 240
    """The average begins with the weights at this point: a share of the run (below 1), or epochs."""


AveragingConfig = Annotated[SWAConfig | EMAConfig, Field(discriminator="name")]
OptimizerConfig = Annotated[SGDConfig | AdamWConfig, Field(discriminator="name")]
ScheduleConfig = Annotated[MultiStepConfig | CosineConfig | ConstantConfig, Field(discriminator="name")]


class TrainingConfig(Settings):
    """How a network is trained. The defaults are the standard CIFAR-100 recipe."""

    epochs: int = Field(default=240, ge=1)
    """Passes over the training set."""
    batch_size: int = Field(default=64, ge=1)
    """Examples in a step."""
    optimizer: OptimizerConfig = SGDConfig()
    """The optimiser and its settings, by ``name``: ``sgd`` or ``adamw``."""
    schedule: ScheduleConfig = MultiStepConfig()
    """The learning rate over the run, by ``name``: ``multistep``, ``cosine`` or ``constant``."""
    gradient_clip: float | None = Field(default=None, gt=0)
    """Largest norm of the whole gradient; larger ones are scaled down to it."""
    precision: Literal["fp32", "bf16-mixed"] = "fp32"
    """Arithmetic of the networks; the losses are always computed in float32."""
    channels_last: bool | Literal["auto"] = "auto"
    """Whether images and weights lie in memory with the channels last; ``auto``: for networks with convolutions, none
    of them grouped (on a GPU: in ``bf16-mixed``)."""
    compile: bool | Literal["auto"] = "auto"
    """Whether the networks go through ``torch.compile``; ``auto``: in trainings of 50,000 steps and more where a C++
    compiler is there, but no grouped convolutions on a CPU."""
    preparation_epochs: Point = 30 / 240
    """Length of the stage before the training, for methods that have one: a share of ``epochs`` (below 1), or epochs.
    It goes at the highest learning rate throughout."""
    save_every: int | None = Field(default=None, ge=1)
    """Keep the weights of every so-manyth epoch, so that an earlier network can be the teacher."""
    held_out: float = Field(default=0.0, ge=0, le=0.5)
    """Share of the training images that the network is not trained on but judged by after every epoch; the classes keep
    their proportions, and all networks of one seed leave out the same images."""
    stop_after: Point | None = None
    """Stop here, although learning rate and ramps are those of all ``epochs``: a share of the run (below 1), or
    epochs."""
    keep_best: Criterion | None = None
    """Keep the epoch that is best by this figure on the held-out images, instead of the last one."""
    averaging: AveragingConfig | None = None
    """Whether the weights become an average over the run, by ``name``: ``swa`` or ``ema``; the statistics of batch
    normalisation are estimated anew for it."""
    mixing: MixingConfig | None = None
    """Whether images are blended with one another, by ``name``: ``mixup`` or ``cutmix``."""
    calibrate: bool = False
    """Whether the logits are divided, in the end, by the temperature that fits the held-out images best."""
    route: tuple[Point, ...] = ()
    """Points of the teacher's run, rising, whose weights teach one after the other before the finished teacher does,
    each for an equal part of this run; none: the finished teacher throughout, as in a preparation."""

    @model_validator(mode="before")
    @classmethod
    def _default_names(cls, value: Any) -> Any:
        """Fill in the name of an optimiser or schedule of which only other settings are given."""
        if isinstance(value, Mapping):
            value = dict(cast("Mapping[str, Any]", value))
            for key, name in (("optimizer", "sgd"), ("schedule", "multistep")):
                if isinstance(value.get(key), Mapping):
                    value[key] = {"name": name, **value[key]}
        return value

    def preparation(self) -> TrainingConfig:
        """Return how the stage before the training is run."""
        epochs = epochs_at(self.preparation_epochs, self.epochs)
        changes = {
            "epochs": epochs, "schedule": ConstantConfig(name="constant"), "stop_after": None, "averaging": None,
            "mixing": None, "save_every": None,
        }  # fmt: skip
        return self.model_copy(update=changes)

    @property
    def finishes(self) -> bool:
        """Whether the network that is kept is made of the last epoch's and more."""
        return bool(self.averaging or self.keep_best or self.calibrate)

    def epochs_run(self) -> int:
        """Return how many epochs are trained: all, unless ``stop_after`` says fewer."""
        return self.epochs if self.stop_after is None else epochs_at(self.stop_after, self.epochs)

    @model_validator(mode="after")
    def _two_gradients_can_be_had(self) -> TrainingConfig:
        difference = self.optimizer.momentum_difference if isinstance(self.optimizer, SGDConfig) else 0
        for name, value, wants in (
            ("gradient_clip", self.gradient_clip, "one gradient"),
            ("compile", self.compile, "one backward pass in a step"),  # the compiled one writes over what it has read
        ):
            if difference and value and value != "auto":
                raise InputError(
                    f"{name} wants {wants}, and optimizer.momentum_difference {difference:g} makes two; leave one out"
                )
        return self

    @model_validator(mode="after")
    def _held_out_images_are_there(self) -> TrainingConfig:
        for name, value in (("keep_best", self.keep_best), ("calibrate", self.calibrate)):
            if value and not self.held_out:
                raise InputError(f"{name} is judged on held-out training images: set held_out above 0, for example 0.1")
        if self.keep_best and self.averaging:
            raise InputError("keep_best keeps one epoch's weights, and averaging makes them of several; leave one out")
        return self

    @model_validator(mode="after")
    def _points_lie_in_the_run(self) -> TrainingConfig:
        if list(self.route) != sorted(set(self.route)):
            raise InputError(f"route must rise, got {list(self.route)}")
        points = {"preparation_epochs": self.preparation_epochs, "stop_after": self.stop_after}
        for name, point in points.items():
            try:
                epochs_at(point or 1, self.epochs)
            except InputError as error:
                raise InputError(f"{name}: {error}") from None
        if self.averaging is not None:
            try:
                start = epochs_at(self.averaging.start, self.epochs)
            except InputError as error:
                raise InputError(f"averaging.start: {error}") from None
            if start > self.epochs_run():
                raise InputError(f"averaging.start: {start} epochs are past the end of {self.epochs_run()} epochs")
        if isinstance(self.schedule, MultiStepConfig):
            try:
                milestones = [epochs_at(point, self.epochs) for point in self.schedule.milestones]
            except InputError as error:
                raise InputError(f"schedule.milestones: {error}") from None
            if milestones != sorted(milestones):
                raise InputError(f"schedule.milestones must rise, got {list(self.schedule.milestones)}")
        if self.schedule.warmup_epochs >= self.epochs and self.schedule.warmup_epochs > 0:
            raise InputError(
                f"schedule.warmup_epochs must be below epochs ({self.epochs}), got {self.schedule.warmup_epochs}"
            )
        return self
