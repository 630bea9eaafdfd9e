"""How much of a network is there for nothing: weights near zero, and channels that pass nothing on."""

from __future__ import annotations

from collections.abc import Container, Mapping

import torch
from torch import Tensor, nn

from soteacher.objectives.teacher.joint_lipschitz import Operator, filters_of, network_operators
from soteacher.objectives.teacher.lipschitz import BATCH_NORMS
from soteacher.precision import at_least_float32

NEAR_ZERO = 1e-3
"""Of the root mean square of a layer's weights or channels: below it counts as nothing.

Of normally distributed weights 0.08 % are that small.
"""


@torch.no_grad()
def weight_figures(
    network: nn.Module, batch_norm_of: Mapping[str, str], *, running: Container[nn.Module] | None = None
) -> dict[str, float | None]:
    r"""Return the share of weights that are near zero and of output channels that pass nothing on.

    ``near_zero`` is the share of the weights of all convolutions and linear layers with :math:`|w| \le 10^{-3} r`,
    where :math:`r` is the root mean square of the layer's own weights: so it does not depend on the layer's scale.

    ``dead_channels`` is the share of the output channels of all linear operators whose strength is at most
    :math:`10^{-3}` of the root mean square over the operator's channels. The strength :math:`s_o` is the standard
    deviation with which the channel leaves a batch norm by its running statistics, and the filter's length where there
    is no batch norm:

    .. math:: s_o = [W_o \ne 0] \, |\gamma_o| \sqrt{\frac{v_o}{v_o + \epsilon}}, \qquad s_o = \lVert W_o \rVert_2

    So a channel of a batch norm is dead if its factor is near zero, if the filter before it is all zeros, or if what it
    takes in hardly varies; how short the filter is does not matter, because batch norm undoes it. Where the factors of
    all channels are 0, all are dead. A channel that some later rectifier never lets pass is not found by its weights.

    Args:
        network: the bare network.
        batch_norm_of: path of a convolution to that of its batch norm, as ``NetworkFacts.batch_norm_of`` has it; the
            two are one operator.
        running: the modules that take part in the forward pass; only their weights and channels count. ``None``: all.

    Returns:
        The two shares in [0, 1]; ``near_zero`` is ``None`` for a network of batch norms alone, and both where no layer
        takes part.

    Raises:
        InputError: the network has no convolution, linear layer or batch norm, or not those that belong together.
    """
    operators = [
        operator
        for operator in network_operators(network, batch_norm_of)
        if running is None or operator.layer in running
    ]
    weights = [_weak(filters_of(op.layer).flatten()) for op in operators if not isinstance(op.layer, BATCH_NORMS)]
    channels = [_weak(_strengths(operator)) for operator in operators]
    return {"near_zero": _share(weights), "dead_channels": _share(channels)}


def _weak(values: Tensor) -> Tensor:
    """Say which values are near zero beside the others."""
    return values.abs() <= NEAR_ZERO * values.square().mean().sqrt()


def _share(found: list[Tensor]) -> float | None:
    if not found:
        return None
    return sum(int(part.sum()) for part in found) / sum(part.numel() for part in found)


def _strengths(operator: Operator) -> Tensor:
    """Return how strongly each output channel of an operator varies."""
    if isinstance(operator.layer, BATCH_NORMS):
        return _deviations(operator.layer)
    lengths = torch.linalg.vector_norm(filters_of(operator.layer), dim=(2, 3)).flatten()
    return lengths if operator.batch_norm is None else (lengths > 0) * _deviations(operator.batch_norm).to(lengths)


def _deviations(batch_norm: nn.Module) -> Tensor:
    """Return the standard deviation of each channel behind a batch norm; 1 for its input where it is not kept."""
    assert isinstance(batch_norm, BATCH_NORMS)  # the operators are made of nothing else
    factors = torch.ones(batch_norm.num_features)
    if batch_norm.affine:
        factors = at_least_float32(batch_norm.weight).abs()
    if batch_norm.running_var is None:
        return factors
    variances = at_least_float32(batch_norm.running_var)
    return factors.to(variances) * (variances / (variances + batch_norm.eps)).sqrt()
