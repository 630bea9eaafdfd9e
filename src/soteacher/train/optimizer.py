"""The optimiser, and its learning rate as a pure function of the place in the run."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, final

import torch
from torch import Tensor, nn
from torch.optim.sgd import sgd

from soteacher.objective import Term
from soteacher.train.config import AdamWConfig, CosineConfig, MultiStepConfig, SGDConfig, TrainingConfig, epochs_at

Backward = Callable[[Sequence[Tensor], Sequence[Term[Any]], torch.optim.Optimizer, Callable[..., None]], None]
"""``(loss of each term, terms, optimiser, backward)``: puts the gradients where the optimiser looks for them."""


def backward_sum(
    losses: Sequence[Tensor],
    terms: Sequence[Term[Any]],
    optimizer: torch.optim.Optimizer,
    backward: Callable[..., None],
) -> None:
    """Take the gradient of the sum of all terms, as every optimiser of one gradient wants it."""
    del terms, optimizer
    backward(torch.stack(list(losses)).sum())


def backward_apart(
    losses: Sequence[Tensor],
    terms: Sequence[Term[Any]],
    optimizer: torch.optim.Optimizer,
    backward: Callable[..., None],
) -> None:
    """Take the gradients of distillation and task one after the other, for :class:`TwoMomentaSGD`."""
    assert isinstance(optimizer, TwoMomentaSGD)
    pairs = list(zip(losses, terms, strict=True))
    distillation = [loss for loss, term in pairs if term.distils and loss.requires_grad]
    task = [loss for loss, term in pairs if not term.distils and loss.requires_grad]
    if distillation:
        backward(torch.stack(distillation).sum(), retain_graph=bool(task))
        optimizer.take_distillation()
    if task:
        backward(torch.stack(task).sum())


def backward_for(config: SGDConfig | AdamWConfig) -> Backward:
    """Return how an optimiser with these settings wants its gradients."""
    return backward_apart if isinstance(config, SGDConfig) and config.momentum_difference else backward_sum


@final
class TwoMomentaSGD(torch.optim.Optimizer):
    r"""Stochastic gradient descent whose momentum is larger for the distillation's gradient than for the task's.

    .. math::

        v_t \leftarrow (\mu - \Delta) \, v_t + g_t + \lambda \theta, \quad
        v_d \leftarrow (\mu + \Delta) \, v_d + g_d, \quad
        \theta \leftarrow \theta - \eta \, (v_t + v_d)

    A parameter that only one of the two losses reaches has the ordinary momentum :math:`\mu` and its weight decay. With
    :math:`\Delta = 0` it is stochastic gradient descent with momentum.

    Args:
        parameters: :math:`\theta`.
        lr: :math:`\eta`.
        momentum: :math:`\mu`.
        momentum_difference: :math:`\Delta`.
        weight_decay: :math:`\lambda`.

    Source: Zhao et al., ICCV 2023, arXiv:2307.08436. The weight decay goes with the task's gradient and
    parameters of one gradient have the ordinary momentum as in the authors' code; there, one that only the distillation
    reaches is not decayed in its first step.
    """

    def __init__(
        self,
        parameters: Iterable[nn.Parameter],
        *,
        lr: float,
        momentum: float,
        momentum_difference: float,
        weight_decay: float,
    ) -> None:
        defaults: dict[str, Any] = {
            "lr": lr, "momentum": momentum, "momentum_difference": momentum_difference, "weight_decay": weight_decay,
        }  # fmt: skip
        super().__init__(parameters, defaults)
        self._distillation: dict[Tensor, Tensor] = {}

    def take_distillation(self) -> None:
        """Take the gradients that are there for the distillation's, and make room for the task's."""
        parameters = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
        self._distillation = {parameter: parameter.grad for parameter in parameters}
        for parameter in parameters:
            parameter.grad = None

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """Make one step with the gradients that were taken and those that are there."""
        assert closure is None
        for group in self.param_groups:
            # The task's moves come first, so that the weight decay sees the weights as they were.
            for parameters, gradients, name, momentum, weight_decay in self._moves(group):
                sgd(
                    parameters, gradients, [self._velocity(parameter, name) for parameter in parameters], fused=True,
                    lr=group["lr"], momentum=momentum, weight_decay=weight_decay,
                    dampening=0.0, nesterov=False, maximize=False,
                )  # fmt: skip
        self._distillation = {}

    def _velocity(self, parameter: Tensor, name: str) -> Tensor:
        """Return a parameter's direction so far, zero at the start."""
        state: dict[str, Tensor] = self.state[parameter]
        if name not in state:
            state[name] = torch.zeros_like(parameter)
        return state[name]

    def _moves(self, group: dict[str, Any]) -> Iterator[tuple[list[Tensor], list[Tensor], str, float, float]]:
        """Yield parameters, their gradients, the direction that takes these in, its momentum, and the weight decay."""
        task: dict[Tensor, Tensor] = {p: p.grad for p in group["params"] if p.grad is not None}
        taken = {p: self._distillation[p] for p in group["params"] if p in self._distillation}
        both, task_only = [p for p in task if p in taken], [p for p in task if p not in taken]
        taken_only = [p for p in taken if p not in task]
        momentum, difference, weight_decay = (group[key] for key in ("momentum", "momentum_difference", "weight_decay"))
        yield both, [task[p] for p in both], "task", momentum - difference, weight_decay
        yield both, [taken[p] for p in both], "distillation", momentum + difference, 0.0
        yield task_only, [task[p] for p in task_only], "task", momentum, weight_decay
        yield taken_only, [taken[p] for p in taken_only], "distillation", momentum, weight_decay


def build_optimizer(config: SGDConfig | AdamWConfig, parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    """Return the optimiser over the trainable parameters, fused where PyTorch has it (same maths, one pass)."""
    trainable = [parameter for parameter in parameters if parameter.requires_grad]
    if isinstance(config, AdamWConfig):
        return torch.optim.AdamW(
            trainable, lr=config.learning_rate, betas=config.betas, weight_decay=config.weight_decay, fused=True
        )
    if config.momentum_difference:
        return TwoMomentaSGD(
            trainable, lr=config.learning_rate, momentum=config.momentum,
            momentum_difference=config.momentum_difference, weight_decay=config.weight_decay,
        )  # fmt: skip
    optimizer = torch.optim.SGD(
        trainable, lr=config.learning_rate, momentum=config.momentum, nesterov=config.nesterov,
        weight_decay=config.weight_decay, fused=True,
    )  # fmt: skip
    if config.momentum:
        optimizer.register_step_pre_hook(_begin_momenta)
    return optimizer


def _begin_momenta(optimizer: torch.optim.Optimizer, *call: Any) -> None:
    """Let weights that get their first gradient now start with no momentum.

    PyTorch's fused kernel wants the momenta of all weights to begin in the same step; the layers of an objective that
    draws its way may not. From zero the first step is what it would have been.
    """
    del call
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if parameter.grad is not None and "momentum_buffer" not in optimizer.state[parameter]:
                optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)


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
