"""Lipschitz regularisation: the layers' operator norms induced by the 1-norm, summed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, NamedTuple, TypeAlias, final

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from soteacher.errors import InputError
from soteacher.objective import Objective, ObjectiveConfig
from soteacher.precision import at_least_float32
from soteacher.types import Step, Task

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
TRANSPOSED_CONVOLUTIONS = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
BatchNorm: TypeAlias = nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d | nn.SyncBatchNorm
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
    layers = normed_layers(network)
    if torch.compiler.is_compiling():  # it joins small operators by itself, and warns of a gradient written by hand
        return torch.stack([induced_norm(layer) for layer in layers]).sum()
    return SumOfNorms.over(layers)


def _absolute_sum(weight: Tensor, *, dim: tuple[int, ...]) -> Tensor:
    return torch.linalg.vector_norm(at_least_float32(weight), ord=1, dim=dim)


def _batch_norm_norm(layer: BatchNorm) -> Tensor:
    scale = torch.rsqrt(at_least_float32(_variance(layer)) + layer.eps)
    return (at_least_float32(layer.weight).abs() * scale).amax() if layer.affine else scale.amax()


class Columns(NamedTuple):
    """Which entries of a weight make a column of its layer's matrix."""

    groups: int
    """Into how many the first dimension is split, before anything else; 1 leaves the weight as it is."""
    kept: tuple[int, ...]
    """The dimensions that tell the columns apart. Over all others the absolute values are summed."""


ALL_ENTRIES = Columns(groups=1, kept=())
"""The whole weight taken for one column."""


@final
class SumOfNorms(torch.autograd.Function):
    r"""Sum over many weights of the largest of each one's column sums, with the gradient written out.

    .. math:: f = \sum_\ell \max_c s_{\ell c}, \quad s_{\ell c} = \sum_{j \in c} |W_{\ell j}|, \qquad
        \frac{\partial f}{\partial W_{\ell j}} =
        \operatorname{sgn}(W_{\ell j}) \frac{[s_{\ell c(j)} = \max s_\ell]}{|\{c : s_{\ell c} = \max s_\ell\}|}

    A network has many small layers: left to autograd, the term costs what it takes to start hundreds of operators and
    their backwards, and each kernel's gradient is written twice. Here batch norms are taken together, so are the maxima
    of layers with equally many columns, and a gradient is written once. Columns that tie share evenly, as with
    ``amax``. The gradient is not differentiable in turn; where that is wanted, the sum of :func:`induced_norm` is.
    """

    @staticmethod
    def over(layers: Sequence[nn.Module], *, convolutions: Columns | None = None) -> Tensor:
        """Return the sum over layers, each of one of ``NORMED_LAYERS``.

        Args:
            layers: at least one. A batch norm has a diagonal matrix, so each of its factors is a column.
            convolutions: what counts as a column of the convolutions, if not a column of their matrix.

        Returns:
            A scalar, float32 (float64 from float64 weights); gradients flow to the weights.

        Raises:
            InputError: a batch norm keeps no running variance.
        """
        batch_norms = [layer for layer in layers if isinstance(layer, BATCH_NORMS)]
        kernels: list[Any] = [layer for layer in layers if not isinstance(layer, BATCH_NORMS)]
        factors = [norm.weight if norm.affine else torch.ones_like(_variance(norm)) for norm in batch_norms]
        columns = [_columns(kernel, convolutions) for kernel in kernels]
        weights = [*(kernel.weight for kernel in kernels), *factors]
        total: Any = SumOfNorms.apply(columns, _scales(batch_norms), *weights)
        return total

    @staticmethod
    def forward(ctx: Any, columns: Sequence[Columns], scales: Tensor | None, *weights: Tensor) -> Tensor:
        """Return the sum for kernels, as many as ``columns``, and after them the factors of batch norms.

        ``scales`` has what each factor is multiplied by, one batch norm after the other.
        """
        kernels, factors = weights[: len(columns)], weights[len(columns) :]
        sums = [_column_sums(kernel, form) for kernel, form in zip(kernels, columns, strict=True)]
        if scales is not None:
            scaled = at_least_float32(torch.cat(factors)).abs() * scales
            sums.extend(scaled.split([len(factor) for factor in factors]))
        places: dict[int, list[int]] = {}
        for place, found in enumerate(sums):
            places.setdefault(len(found), []).append(place)
        tables = [torch.stack([sums[place] for place in equally_long]) for equally_long in places.values()]
        ctx.columns, ctx.places = columns, list(places.values())
        ctx.save_for_backward(scales, *tables, *weights)
        return torch.cat([table.amax(dim=1) for table in tables]).sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Return the gradients of the weights; scales are constants."""
        scales, *saved = ctx.saved_tensors
        tables, weights = saved[: len(ctx.places)], saved[len(ctx.places) :]
        shares: dict[int, Tensor] = {}
        for places, table in zip(ctx.places, tables, strict=True):
            largest = table == table.amax(dim=1, keepdim=True)
            share = largest * gradient / largest.sum(dim=1, keepdim=True)
            shares.update(zip(places, share.unbind(), strict=True))
        wanted = ctx.needs_input_grad[2:]
        found: list[Tensor | None] = [
            _spread(shares[place], weights[place], form) if wanted[place] else None
            for place, form in enumerate(ctx.columns)
        ]
        kernels, factors = len(ctx.columns), weights[len(ctx.columns) :]
        if any(wanted[kernels:]):
            scaled = torch.cat([shares[place] for place in range(kernels, len(weights))]) * scales
            # Not plain views: what becomes a parameter's gradient must be free to change in place.
            found.extend(torch.cat(factors).sgn().mul_(scaled).unsafe_split_with_sizes([len(one) for one in factors]))
        else:
            found.extend([None] * len(factors))
        return None, None, *found


def _columns(layer: nn.Module, convolutions: Columns | None) -> Columns:
    if isinstance(layer, nn.Linear):  # weight [out, in]
        return Columns(groups=1, kept=(1,))
    if convolutions is not None:
        return convolutions
    if isinstance(layer, TRANSPOSED_CONVOLUTIONS):  # weight [in, out / groups, *taps]
        return Columns(groups=1, kept=(0,))
    groups: Any = layer.groups  # weight [out, in / groups, *taps]
    return Columns(groups=1, kept=(1,)) if groups == 1 else Columns(groups=groups, kept=(0, 2))


def _column_sums(weight: Tensor, columns: Columns) -> Tensor:
    """Return the sums of the absolute values of each column, as a vector."""
    absolute = _grouped(at_least_float32(weight.abs()), columns)
    first, *rest = (dim for dim in range(absolute.ndim) if dim not in columns.kept)
    # One dimension first: a sum over whole rows is several times faster than one over all dimensions at once.
    sums = absolute.sum(dim=first)
    if rest:
        sums = sums.sum(dim=[dim - 1 for dim in rest])
    return sums.flatten()


def _spread(share: Tensor, weight: Tensor, columns: Columns) -> Tensor:
    """Return the signs of a weight, times its columns' shares."""
    signs = weight.sgn()
    grouped = _grouped(signs, columns)
    grouped.mul_(share.view([size if dim in columns.kept else 1 for dim, size in enumerate(grouped.shape)]))
    return signs


def _grouped(weight: Tensor, columns: Columns) -> Tensor:
    return weight if columns.groups == 1 else weight.unflatten(0, (columns.groups, -1))


def _scales(batch_norms: Sequence[BatchNorm]) -> Tensor | None:
    """Return what batch norms multiply their factors by, one after the other; ``None`` for no batch norm."""
    if not batch_norms:
        return None
    variances = at_least_float32(torch.cat([_variance(norm) for norm in batch_norms]))
    epsilons = [norm.eps for norm in batch_norms]
    if len(set(epsilons)) == 1:
        return torch.rsqrt(variances + epsilons[0])
    sizes = [norm.num_features for norm in batch_norms]
    pieces = zip(variances.split(sizes), epsilons, strict=True)
    return torch.rsqrt(torch.cat([piece + epsilon for piece, epsilon in pieces]))


def _variance(batch_norm: BatchNorm) -> Tensor:
    if batch_norm.running_var is None:
        kept = "keeps no running variance (track_running_stats=False), so no norm"
        raise InputError(f"{type(batch_norm).__name__} {kept}")
    return batch_norm.running_var.detach()


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
