"""Lipschitz regularisation: the layers' operator norms induced by the 1-norm, summed."""

from __future__ import annotations

from typing import ClassVar, final

import torch
from pydantic import Field
from torch import Tensor, nn

from soteacher.errors import InputError
from soteacher.objective import Objective, ObjectiveConfig
from soteacher.precision import at_least_float32
from soteacher.types import Step, Task

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
TRANSPOSED_CONVOLUTIONS = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
NORMED_LAYERS = (*CONVOLUTIONS, *TRANSPOSED_CONVOLUTIONS, nn.Linear, *BATCH_NORMS)


def induced_norm(layer: nn.Module) -> Tensor:
    r"""Operator norm of a layer's linear part, induced by the 1-norm: the largest absolute column sum of its matrix.

    .. math::
        \text{convolution: } \max_{i} \sum_{o, t} |W_{o i t}|, \qquad
        \text{linear: } \max_i \sum_o |W_{o i}|, \qquad
        \text{batch norm: } \max_c |\gamma_c| / \sqrt{v_c + \epsilon}

    with :math:`i` input channels, :math:`o` the output channels joined to :math:`i` (those of its group), :math:`t` the
    taps of the kernel and :math:`v` the running variance. Biases do not change the norm.

    A convolution reaches its value where an input pixel meets every tap: inside the image, with stride 1. With a larger
    stride the value is an upper bound. Copies of border pixels (``reflect`` or ``replicate`` padding) are not counted.

    Args:
        layer: a convolution (1-3 dimensions, transposed or not), a linear layer or a batch norm, as it acts in eval
            mode; a batch norm without ``affine`` has :math:`\gamma = 1`.

    Returns:
        A scalar, float32 (float64 from float64 weights); gradients flow to the weight, not to the running variance.

    Raises:
        InputError: a layer of another kind, or a batch norm that keeps no running variance.

    Source: Gouk, Frank, Pfahringer and Cree 2021, arXiv:1804.04368, section 3.
    """
    if isinstance(layer, BATCH_NORMS):
        return _batch_norm_norm(layer)
    if isinstance(layer, nn.Linear):
        return _absolute_sum(layer.weight, dim=(0,)).amax()
    if isinstance(layer, TRANSPOSED_CONVOLUTIONS):  # weight [in, out / groups, *taps]
        return _absolute_sum(layer.weight.flatten(1), dim=(1,)).amax()
    if isinstance(layer, CONVOLUTIONS):  # weight [out, in / groups, *taps]
        grouped = layer.weight.unflatten(0, (layer.groups, -1)).flatten(3)  # [groups, out / groups, in / groups, taps]
        return _absolute_sum(grouped, dim=(1, 3)).amax()
    raise InputError(
        f"no induced norm for a layer of type {type(layer).__name__}; wanted a convolution, linear layer or batch norm"
    )


def normed_layers(network: nn.Module) -> list[nn.Module]:
    """Return the layers of a network that have an induced norm, each once, in the order of ``network.modules()``.

    Frozen layers are among them; they add a constant to a sum of norms. Layers of other kinds (layer norms, the input
    projection of an attention) are left out, and a layer that derives its kernel from ``weight`` only in its forward
    (weight standardisation) counts with ``weight``.

    Raises:
        InputError: the network has no such layer.
    """
    layers: list[nn.Module] = [module for module in network.modules() if isinstance(module, NORMED_LAYERS)]
    if not layers:
        raise InputError(f"{type(network).__name__} has no convolution, linear layer or batch norm to regularise")
    return layers


def lipschitz_bound_sum(network: nn.Module) -> Tensor:
    r"""Sum over a network's layers of the Lipschitz bound of each, in the 1-norm.

    .. math:: \sum_\ell \lVert W_\ell \rVert_1

    Args:
        network: any network; see :func:`normed_layers` for what counts and :func:`induced_norm` for the norms.

    Returns:
        A scalar, float32 (float64 from float64 weights); gradients flow to the weights.

    Raises:
        InputError: no layer has such a norm, or a batch norm keeps no running variance.

    Source: Dong, Liu and Shang, ICLR 2024, arXiv:2206.06661, Lipschitz regularisation. The authors' code computes
    something else for convolutions: see ``weight_l1``. A convolution followed by a batch norm is scale-invariant, so a
    smaller sum does not by itself mean a smaller Lipschitz constant of the network.
    """
    return torch.stack([induced_norm(layer) for layer in normed_layers(network)]).sum()


def _absolute_sum(weight: Tensor, *, dim: tuple[int, ...]) -> Tensor:
    return torch.linalg.vector_norm(at_least_float32(weight), ord=1, dim=dim)


def _batch_norm_norm(layer: nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d | nn.SyncBatchNorm) -> Tensor:
    if layer.running_var is None:
        raise InputError(f"{type(layer).__name__} keeps no running variance (track_running_stats=False), so no norm")
    scale = torch.rsqrt(at_least_float32(layer.running_var) + layer.eps)
    return (at_least_float32(layer.weight).abs() * scale).amax() if layer.affine else scale.amax()


class LipschitzConfig(ObjectiveConfig):
    """Settings of :class:`Lipschitz`."""

    takes_mixtures: ClassVar[bool] = True
    weight: float = Field(default=1e-5, gt=0)
    """Factor of the objective in the training loss; the default is that of the released code's recipe."""

    def build(self, task: Task) -> Lipschitz:
        """Return the objective; it needs nothing from the task."""
        del task
        return Lipschitz(self)


@final
class Lipschitz(Objective[Step]):
    """Keep the layers' Lipschitz constants small; see :func:`lipschitz_bound_sum`."""

    name = "lipschitz"

    def __init__(self, config: LipschitzConfig) -> None:
        super().__init__()
        self.config = config

    def forward(self, step: Step) -> Tensor:
        """Return the sum over the layers of the network in training; the same for every batch."""
        return lipschitz_bound_sum(step.model)
