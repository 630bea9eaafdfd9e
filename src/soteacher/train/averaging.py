"""Averages of a network's weights over its training."""

from __future__ import annotations

from collections.abc import Iterable
from typing import final

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn, get_swa_multi_avg_fn, update_bn

from soteacher.train.config import AveragingConfig, EMAConfig, epochs_at


@final
class WeightAverage:
    r"""The running average of a network's trained weights.

    .. math::
        \text{swa: } \bar\theta_n = \bar\theta_{n-1} + (\theta_n - \bar\theta_{n-1}) / n, \qquad
        \text{ema: } \bar\theta_n = d \, \bar\theta_{n-1} + (1 - d) \, \theta_n

    Both begin with the weights at the end of the epoch ``start``; ``swa`` takes in those after every later epoch,
    ``ema`` those after every later step.

    Args:
        network: whose weights are averaged.
        config: which average, and from when on.
        num_epochs: length of the run.

    Source: Izmailov et al., UAI 2018, arXiv:1803.05407 (SWA), section 3; the exponential average as in Polyak and
    Juditsky 1992 and Tarvainen and Valpola 2017, arXiv:1703.01780.
    """

    def __init__(self, network: nn.Module, config: AveragingConfig, *, num_epochs: int) -> None:
        self._network = network
        self._every_step = isinstance(config, EMAConfig)
        self._update = get_ema_multi_avg_fn(config.decay) if isinstance(config, EMAConfig) else get_swa_multi_avg_fn()
        self._start = epochs_at(config.start, num_epochs)
        self._average: dict[str, Tensor] = {}
        self._count = 0

    def after_step(self, epoch: int) -> None:
        """Take in the weights after a step of an epoch, counted from 0, where every step counts."""
        if self._every_step and epoch >= self._start:
            self._take()

    def after_epoch(self, finished: int) -> None:
        """Take in the weights after so many finished epochs, where epochs count."""
        if finished == self._start or (finished > self._start and not self._every_step):
            self._take()

    @torch.no_grad()
    def _take(self) -> None:
        weights = {name: parameter.detach() for name, parameter in self._network.named_parameters()}
        if self._count:
            self._update(list(self._average.values()), list(weights.values()), torch.tensor(self._count))
        else:
            self._average = {name: weight.clone() for name, weight in weights.items()}
        self._count += 1

    def state(self) -> dict[str, Tensor]:
        """Return what a resumed training needs: the average, and how many weights it holds."""
        return {**self._average, "": torch.tensor(self._count)}

    def load(self, state: dict[str, Tensor]) -> None:
        """Go on from a state."""
        self._count = int(state[""])
        devices = {name: parameter.device for name, parameter in self._network.named_parameters()}
        self._average = {name: state[name].to(device) for name, device in devices.items() if name in state}

    @torch.no_grad()
    def put_into(self, network: nn.Module, called: nn.Module, images: Iterable[Tensor]) -> None:
        """Give a network the average as its weights, and estimate its batch normalisation anew on images.

        Args:
            network: the network; changed in place.
            called: the same network as it takes images.
            images: batches ``[B, C, H, W]``; the statistics are the plain mean over the batches.
        """
        for name, parameter in network.named_parameters():
            parameter.copy_(self._average[name])
        update_bn(images, called)
