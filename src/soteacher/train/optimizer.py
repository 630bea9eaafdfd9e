"""The optimiser, and its learning rate as a pure function of the place in the run."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from soteacher.objective import Term
from soteacher.train.config import AdamWConfig, CosineConfig, MultiStepConfig, SGDConfig, TrainingConfig, epochs_at

Backward = Callable[[Tensor, Sequence[Term[Any]], torch.optim.Optimizer, Callable[[Tensor], None]], None]
"""``(losses [terms], terms, optimiser, backward)``: puts the gradients where the optimiser looks for them."""


def backward_sum(
    losses: Tensor, terms: Sequence[Term[Any]], optimizer: torch.optim.Optimizer, backward: Callable[..., None]
) -> None:
    """Take the gradient of the sum of all terms, as every optimiser of one gradient wants it."""
    del terms, optimizer
    backward(losses.sum())


def build_optimizer(config: SGDConfig | AdamWConfig, parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    """Return the optimiser over the trainable parameters, with the fused kernel (same maths, one pass over memory)."""
    trainable = [parameter for parameter in parameters if parameter.requires_grad]
    if isinstance(config, AdamWConfig):
        return torch.optim.AdamW(
            trainable, lr=config.learning_rate, betas=config.betas, weight_decay=config.weight_decay, fused=True
        )
    return torch.optim.SGD(
        trainable, lr=config.learning_rate, momentum=config.momentum, nesterov=config.nesterov,
        weight_decay=config.weight_decay, fused=True,
    )  # fmt: skip


def learning_rate(config: TrainingConfig, *, epoch: int, step: int, steps_per_epoch: int) -> float:
    """Return the learning rate of one step.

    Nothing is remembered from step to step, so that a resumed run needs no scheduler state.

    Args:
        config: length, highest rate and schedule.
        epoch: from 0.
        step: within the epoch, from 0.
        steps_per_epoch: steps of one pass.
    """
    schedule, highest = config.schedule, config.optimizer.learning_rate
    done = epoch * steps_per_epoch + step
    warmup = schedule.warmup_epochs * steps_per_epoch
    if done < warmup:
        return highest * (done + 1) / warmup
    if isinstance(schedule, MultiStepConfig):
        passed = sum(epoch >= epochs_at(point, config.epochs) for point in schedule.milestones)
        return highest * schedule.factor**passed
    if isinstance(schedule, CosineConfig):
        share = (done - warmup) / (config.epochs * steps_per_epoch - warmup)
        height = schedule.final_share + (1 - schedule.final_share) * (1 + math.cos(math.pi * share)) / 2
        return highest * height
    return highest
