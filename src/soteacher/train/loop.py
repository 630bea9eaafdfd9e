"""The training loop: every number of a network passes through here.

Images -> network -> outputs -> objectives -> one scalar -> optimiser. Nothing is carried from step to step but the
weights, the optimiser's memory and the objectives' buffers; order, augmentation, learning rate, ramps and random
numbers are functions of (seed, epoch, step). That is why a killed run goes on bit for bit.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from lightning_fabric import Fabric
from torch import Tensor, nn

from soteacher.errors import InputError, InterruptedRunError
from soteacher.objective import Term, weighted_losses
from soteacher.randomness import derive_seed
from soteacher.train.averaging import WeightAverage
from soteacher.train.checkpoint import Checkpoint, Position
from soteacher.train.config import TrainingConfig
from soteacher.train.optimizer import Backward, backward_sum, learning_rate
from soteacher.train.teacher_signal import TeacherSchedule
from soteacher.types import Batch, DistillStep, NetworkParts, Outputs, Step

CHECK_EVERY = 50
SECONDS_BETWEEN_LOOKS = 0.5
"""The losses are looked at after so many steps or seconds: each look makes the host wait for the device."""


class BatchSource(Protocol):
    """The training set, batch by batch, from any place of any epoch."""

    @property
    def steps_per_epoch(self) -> int:
        """Batches of one pass."""
        ...

    def epoch(self, epoch: int, *, start: int = 0) -> Iterator[Batch]:
        """Yield the batches of a pass from batch ``start`` on."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Trainee:
    """A network in training, with all that a step touches."""

    network: nn.Module
    """The bare network: what objectives on weights see, and what is saved."""
    forward: nn.Module
    """The same network as it is called: it returns ``(logits, features)`` under precision and compilation."""
    terms: Sequence[Term[Any]]
    optimizer: Any
    """As the fabric has set it up."""
    teacher: TeacherSchedule | None
    fabric: Fabric
    config: TrainingConfig
    seed: int
    parts: NetworkParts | None = None
    """Pieces of the network, for objectives that send features through them."""
    backward: Backward = backward_sum
    """How the losses of the terms become gradients."""
    channels_last: bool = False
    """Whether images lie in memory with the channels last, as the weights then do."""
    graphs: bool = False
    """Whether the networks are replayed as CUDA graphs."""
    average: WeightAverage | None = None
    """The average of the weights over the run, where one is wanted; the training itself never sees it."""

    def state(self) -> dict[str, Any]:
        """Return what a training goes on from, as a checkpoint takes it."""
        return {
            "network": self.network, "optimizer": self.optimizer.optimizer, "terms": self.terms,
            "average": self.average,
        }  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class StepReport:
    """Where a training stands, for progress displays."""

    epoch: int
    step: int
    steps_per_epoch: int
    loss: float
    accuracy: float
    """Share of this epoch's examples predicted right so far, while they were trained on."""
    images_per_second: float


def train_step(trainee: Trainee, batch: Batch, *, epoch: int, progress: float, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Make one step; return each term's weighted loss ``[terms]`` and how many predictions were right, detached."""
    if trainee.graphs:
        torch.compiler.cudagraph_mark_step_begin()  # they may now write over what the last step has returned
    if trainee.channels_last:
        batch = _channels_last(batch)
    step = _step(trainee, batch, epoch=epoch, progress=progress, seed=seed)
    losses = weighted_losses(trainee.terms, step)
    trainee.optimizer.zero_grad(set_to_none=True)
    trainee.backward(losses, trainee.terms, trainee.optimizer.optimizer, trainee.fabric.backward)
    if trainee.config.gradient_clip is not None:
        parameters = [p for group in trainee.optimizer.param_groups for p in group["params"] if p.grad is not None]
        nn.utils.clip_grad_norm_(parameters, trainee.config.gradient_clip)
    # Before the optimiser moves anything: an objective with layers of its own takes in what its loss has seen.
    for term in trainee.terms:
        term.objective.update(step)
    trainee.optimizer.step()
    if trainee.average is not None:
        trainee.average.after_step(epoch)
    return torch.stack(losses).detach(), (step.outputs.logits.detach().argmax(dim=-1) == batch.labels).sum()


def _step(trainee: Trainee, batch: Batch, *, epoch: int, progress: float, seed: int) -> Step:
    """Run the network, and the teacher if there is one, on all views of a batch."""
    facts: dict[str, Any] = {
        "images": batch.images, "labels": batch.labels, "indices": batch.indices,
        "outputs": _outputs(trainee, batch.images), "model": trainee.network, "parts": trainee.parts,
        "views": {view: _outputs(trainee, images) for view, images in batch.views.items()},
        "epoch": epoch, "num_epochs": trainee.config.epochs, "progress": progress, "seed": seed,
        "mixture": batch.mixture,
    }  # fmt: skip
    if trainee.teacher is None:
        return Step(**facts)
    # Who teaches when goes by the epochs that are run, and not by those of the schedule.
    teacher = trainee.teacher.at(progress * trainee.config.epochs / trainee.config.epochs_run())
    facts["teacher_views"] = {view: teacher(batch, view) for view in batch.views}
    return DistillStep(**facts, teacher=teacher(batch), teacher_parts=teacher.parts)


def _outputs(trainee: Trainee, images: Tensor) -> Outputs:
    logits, features = trainee.forward(images)
    return Outputs(logits=logits, features=features)


def _channels_last(batch: Batch) -> Batch:
    views = {view: images.contiguous(memory_format=torch.channels_last) for view, images in batch.views.items()}
    return replace(batch, images=batch.images.contiguous(memory_format=torch.channels_last), views=views)


def fit(
    trainee: Trainee,
    batches: BatchSource,
    *,
    measure: Callable[[], dict[str, float]],
    checkpoint: Checkpoint,
    on_epoch: Callable[[dict[str, Any]], None],
    on_step: Callable[[StepReport], None],
    should_stop: Callable[[], bool],
) -> list[dict[str, Any]]:
    """Train to the end, from the start or from where the checkpoint stands.

    Args:
        trainee: the network and all that a step touches; changed in place.
        batches: the training set.
        measure: called after every epoch; its figures join the epoch's line.
        checkpoint: where the state is kept after every epoch and when stopped.
        on_epoch: called with every new epoch's line, before the checkpoint is written.
        on_step: called now and then with the current standing.
        should_stop: asked after every step; when it says yes the state is saved and training leaves.

    Returns:
        A line of figures for each epoch of the run: ``epoch``, ``learning_rate``, ``train_loss``, ``train_accuracy``,
        ``losses`` by term, ``seconds``, ``images_per_second`` and what ``measure`` returned.

    Raises:
        InterruptedRunError: ``should_stop`` said yes; the state is saved.
        InputError: a loss or a measured figure is not finite; the step, the term and the last good state are named.
    """
    position = checkpoint.load(**trainee.state()) or Position()
    while position.epoch < trainee.config.epochs_run():
        line = _train_epoch(trainee, batches, position, checkpoint, on_step=on_step, should_stop=should_stop)
        line |= _finite(measure(), epoch=position.epoch, checkpoint=checkpoint)
        if trainee.average is not None:
            trainee.average.after_epoch(position.epoch + 1)
        position = Position(epoch=position.epoch + 1, history=[*position.history, line])
        on_epoch(line)
        _save(trainee, position, checkpoint)
    return position.history


def _train_epoch(
    trainee: Trainee,
    batches: BatchSource,
    position: Position,
    checkpoint: Checkpoint,
    *,
    on_step: Callable[[StepReport], None],
    should_stop: Callable[[], bool],
) -> dict[str, Any]:
    """Train through the rest of the epoch that ``position`` stands in and return its line of figures."""
    config, epoch, steps = trainee.config, position.epoch, batches.steps_per_epoch
    sums = _sums(position, len(trainee.terms))  # on the host: losses of each term, loss, right ones, examples
    started, seconds_before = time.perf_counter(), position.seconds
    images_before, rate, looked = sums[-1].item(), 0.0, started
    pending: list[Tensor] = []  # on the device: the same figures of the steps not yet added
    trainee.forward.train()
    for step, batch in enumerate(batches.epoch(epoch, start=position.step), start=position.step):
        # Dropout and whatever else draws by itself: a function of the place, like all randomness here.
        seed = derive_seed(trainee.seed, "step", epoch, step)
        torch.manual_seed(seed)
        rate = learning_rate(config, epoch=epoch, step=step, steps_per_epoch=steps)
        for group in trainee.optimizer.param_groups:
            group["lr"] = rate
        progress = (epoch + step / steps) / config.epochs
        losses, right = train_step(trainee, batch, epoch=epoch, progress=progress, seed=seed)
        size = len(batch.labels)  # known to the host: nothing here makes it wait for the device
        pending.append(torch.cat([losses.double() * size, torch.stack([right, torch.full_like(right, size)]).double()]))
        stopping, waited = should_stop(), time.perf_counter() - looked
        if stopping or len(pending) == CHECK_EVERY or waited > SECONDS_BETWEEN_LOOKS or step + 1 == steps:
            # One addition after the other, so that the sums do not depend on where a run was cut.
            for number, figures in enumerate(torch.stack(pending).cpu(), start=step + 1 - len(pending)):
                _check_finite(figures, trainee, epoch=epoch, step=number, checkpoint=checkpoint)
                sums += figures
            pending.clear()
            looked = time.perf_counter()
            if stopping and step + 1 < steps:
                position.step, position.sums = step + 1, sums.tolist()
                position.seconds = seconds_before + looked - started
                _save(trainee, position, checkpoint)
                raise InterruptedRunError(f"stopped after step {step + 1} of epoch {epoch}; the state is saved")
            speed = (sums[-1].item() - images_before) / max(looked - started, 1e-9)
            on_step(_report(sums, epoch=epoch, step=step + 1, steps=steps, speed=speed))
    seconds = seconds_before + time.perf_counter() - started
    return _line(sums, trainee, epoch=epoch, rate=rate, seconds=seconds)


def _save(trainee: Trainee, position: Position, checkpoint: Checkpoint) -> None:
    """Keep the state, unless the last step has broken the weights: a resumed run could only fail."""
    if not all(bool(torch.isfinite(parameter).all()) for parameter in trainee.network.parameters()):
        raise _not_finite(f"after step {position.step} of epoch {position.epoch}, in the weights", checkpoint)
    checkpoint.save(position, **trainee.state())


def _sums(position: Position, num_terms: int) -> Tensor:
    return torch.tensor(position.sums or [0.0] * (num_terms + 2), dtype=torch.float64)


def _check_finite(figures: Tensor, trainee: Trainee, *, epoch: int, step: int, checkpoint: Checkpoint) -> None:
    """Stop where a step's loss is not a finite number."""
    if torch.isfinite(figures).all():
        return
    names = [term.objective.name for term in trainee.terms]
    broken = [name for name, value in zip(names, figures.tolist(), strict=False) if not math.isfinite(value)]
    raise _not_finite(f"at step {step} of epoch {epoch}, in the term {' and '.join(broken)}", checkpoint)


def _finite(measured: dict[str, float], *, epoch: int, checkpoint: Checkpoint) -> dict[str, float]:
    """Return what was measured after an epoch; its last step may have made weights that no loss has shown yet."""
    broken = [name for name, value in measured.items() if not math.isfinite(value)]
    if broken:
        raise _not_finite(f"after epoch {epoch}, in {' and '.join(broken)}", checkpoint)
    return measured


def _not_finite(where: str, checkpoint: Checkpoint) -> InputError:
    good = f"the last good state is {checkpoint.path}" if checkpoint.path.exists() else "no epoch was finished before"
    return InputError(f"the loss is not finite {where}; {good}; a lower learning rate, gradient_clip or fp32 may help")


def _report(sums: Tensor, *, epoch: int, step: int, steps: int, speed: float) -> StepReport:
    values = sums.tolist()
    return StepReport(
        epoch=epoch, step=step, steps_per_epoch=steps, images_per_second=speed,
        loss=sum(values[:-2]) / values[-1], accuracy=values[-2] / values[-1],
    )  # fmt: skip


def _line(sums: Tensor, trainee: Trainee, *, epoch: int, rate: float, seconds: float) -> dict[str, Any]:
    """Return the figures of a finished epoch."""
    values = sums.tolist()
    examples = values[-1]
    names = [term.objective.name for term in trainee.terms]
    return {
        "epoch": epoch,
        "learning_rate": rate,
        "train_loss": sum(values[:-2]) / examples,
        "train_accuracy": values[-2] / examples,
        "losses": {name: value / examples for name, value in zip(names, values, strict=False)},
        "seconds": seconds,
        "images_per_second": examples / seconds,
    }


def fabric_for(device: str, precision: str) -> Fabric:
    """Return the fabric of one network on one device.

    On a GPU, PyTorch is asked for its deterministic algorithms, so that two runs of one seed give the same weights.

    Args:
        device: ``cpu`` or ``cuda``.
        precision: ``fp32`` or ``bf16-mixed``.
    """
    if device == "cuda":
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when cuBLAS starts
        torch.use_deterministic_algorithms(True, warn_only=True)
    return Fabric(accelerator=device, devices=1, precision="32-true" if precision == "fp32" else "bf16-mixed")
