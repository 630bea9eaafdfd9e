"""The Lipschitz term of SoTeacher's released code, which sums all of a convolution's weights."""

from __future__ import annotations

from typing import ClassVar, final

import torch
from pydantic import Field
from torch import Tensor, nn

from soteacher.objective import Objective, ObjectiveConfig
from soteacher.objectives.teacher.lipschitz import (
    ALL_ENTRIES,
    CONVOLUTIONS,
    TRANSPOSED_CONVOLUTIONS,
    SumOfNorms,
    induced_norm,
    normed_layers,
)
from soteacher.precision import at_least_float32
from soteacher.types import Step, Task


def weight_l1_norm(layer: nn.Module) -> Tensor:
    r"""Entrywise 1-norm of a convolution's weight; the induced norm of every other layer.

    .. math:: \text{convolution: } \sum_{o, i, t} |W_{o i t}|

    Args:
        layer: as for ``induced_norm``, which gives the linear layers' and the batch norms' values.

    Returns:
        A scalar, float32 (float64 from float64 weights); for a convolution at least its induced norm.

    Raises:
        InputError: a layer of another kind, or a batch norm that keeps no running variance.

    Source: released code of Dong, Liu and Shang, ICLR 2024, arXiv:2206.06661.
    """
    if isinstance(layer, (*CONVOLUTIONS, *TRANSPOSED_CONVOLUTIONS)):
        return at_least_float32(layer.weight).abs().sum()
    return induced_norm(layer)


def weight_l1_sum(network: nn.Module) -> Tensor:
    """Sum over a network's layers of :func:`weight_l1_norm`.

    Args:
        network: any network; the layers are those of ``lipschitz_bound_sum``.

    Returns:
        A scalar, float32 (float64 from float64 weights); gradients flow to the weights.

    Raises:
        InputError: no layer has such a norm, or a batch norm keeps no running variance.
    """
    layers = normed_layers(network)
    if torch.compiler.is_compiling():  # as in ``lipschitz_bound_sum``
        return torch.stack([weight_l1_norm(layer) for layer in layers]).sum()
    return SumOfNorms.over(layers, convolutions=ALL_ENTRIES)


class WeightL1Config(ObjectiveConfig):
    """Settings of :class:`WeightL1`."""

    takes_mixtures: ClassVar[bool] = True
    weight: float = Field(default=1e-5, gt=0)
    """Factor of the objective in the training loss; the default is that of the released code's recipe."""

    def build(self, task: Task) -> WeightL1:
        """Return the objective; it needs nothing from the task."""
        del task
        return WeightL1(self)


@final
class WeightL1(Objective[Step]):
    """Keep the weights small as SoTeacher's released code does; see :func:`weight_l1_sum`."""

    name = "weight_l1"

    def __init__(self, config: WeightL1Config) -> None:
        super().__init__()
        self.config = config

    def forward(self, step: Step) -> Tensor:
        """Return the sum over the layers of the network in training; the same for every batch."""
        return weight_l1_sum(step.model)
