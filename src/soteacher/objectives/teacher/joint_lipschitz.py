"""Lipschitz regularisation of what a convolution and its batch norm are together."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import ClassVar, final

import torch
from pydantic import Field
from torch import Tensor, nn

from soteacher.errors import InputError
from soteacher.objective import Method, Objective, ObjectiveConfig
from soteacher.objectives.teacher.lipschitz import (
    BATCH_NORMS,
    CONVOLUTIONS,
    NORMED_LAYERS,
    TRANSPOSED_CONVOLUTIONS,
    induced_norm,
)
from soteacher.precision import at_least_float32
from soteacher.types import Step, Task

WEIGHT = 1e-4
"""Of the term in the training loss, chosen by measurements on CIFAR-100 (one seed, short runs).

On resnet8, resnet20 and wrn_16_2, new and after some hundred steps, the gradient of the convolutions from the term with
this weight has 0.6 to 2.7 % of the length of that from cross-entropy. That is ten times the share of ``lipschitz`` with
1e-5: without weights the two terms' gradients across the filters differ in length by factors of 0.7 to 1.4. In 1,200
steps of resnet8 the sum ended at 177 without the term, at 168 with 1e-4 and at 156 with 1e-3, with accuracies of 0.156,
0.152 and 0.154 on 4,000 test images (standard error 0.006). With 1e-2 the factors of the batch norms collapsed and
nothing was learnt; deeper networks have larger sums, so the default keeps away from that.

In all of that a convolution with a stride still counted with all its taps. Without those that cannot meet, the sum of
these networks is 6 to 15 % smaller when they are new, and its gradient 4 to 11 % shorter.
"""


def composed_norm(convolution: nn.Module, batch_norm: nn.Module) -> Tensor:
    r"""Operator norm of a convolution followed by its batch norm, induced by the 1-norm.

    .. math:: \max_{i, r} \sum_o \frac{|\gamma_o|}{\sqrt{v_o + \epsilon}} \sum_{t \in M_r} |W_{o i t}|

    with :math:`i` input channels, :math:`o` the output channels joined to :math:`i` (those of its group), :math:`M_r`
    the taps of the kernel that one input pixel meets (all of them with stride 1, see :func:`meeting_taps`), and
    :math:`\gamma` and :math:`v` the batch norm's factors and running variances. Biases and means do not change it.

    The value is that of the linear part in evaluation mode. It is reached inside the image; for one too small to hold
    the taps that meet it is an upper bound. Copies of pixels at a border are not counted (``reflect`` or ``replicate``
    padding, and ``circular`` padding with a stride).

    **The gradient** is not that of the formula. In training the variances follow the filters: halving :math:`W_o`
    halves :math:`\sqrt{v_o}` and changes nothing in what the network computes, but by the formula's own gradient, with
    :math:`v_o` a constant, it is the cheapest way to a smaller norm. So :math:`\sqrt{v_o + \epsilon}` is taken to be
    :math:`r_o \lVert W_o \rVert_2` with a constant ratio :math:`r_o`. Then each filter's gradient is orthogonal to the
    filter: it asks for another direction, never for another length. :math:`\gamma` has its plain gradient.

    What this leaves out: with its direction, a filter's variance changes too where its inputs are correlated or of
    different variance, and :math:`\epsilon` does not shrink with the filter. The alternative, the gradient through the
    batch's own variances, has both; it needs every convolution's output and is as noisy as the batch is small. On
    photographs, whose pixels go with their neighbours, the two differ: their cosine was 0.60 on resnet8 and 0.71 on
    wrn_10_2 (256 images of CIFAR-100, new weights). A small step lowers the norm with the statistics taken anew by
    about half of what the alternative reaches; a large step gains little.

    Args:
        convolution: a convolution (1-3 dimensions, transposed or not) or a linear layer.
        batch_norm: what takes in its outputs; without ``affine`` it has :math:`\gamma = 1`.

    Returns:
        A scalar, float32 (float64 from float64 weights); gradients flow to the weights of both, not to the variances.

    Raises:
        InputError: layers of other kinds or that do not fit together, or no running variance is kept.

    Source: the operator is our own choice, as is its gradient; the norm of a convolution is that of Gouk, Frank,
    Pfahringer and Cree 2021, arXiv:1804.04368, section 3, who bound both layers one by one.
    """
    if not isinstance(batch_norm, BATCH_NORMS):
        raise InputError(f"wanted a batch norm after {type(convolution).__name__}, got {type(batch_norm).__name__}")
    filters = filters_of(convolution)
    groups, channels = filters.shape[:2]
    if batch_norm.running_var is None:
        raise InputError(
            f"{type(batch_norm).__name__} keeps no running variance (track_running_stats=False), so no norm"
        )
    if len(batch_norm.running_var) != groups * channels:
        wanted = f"wanted a batch norm of {groups * channels} channels after {type(convolution).__name__}"
        raise InputError(f"{wanted}, got {len(batch_norm.running_var)}")
    lengths = torch.linalg.vector_norm(filters, dim=(2, 3))
    gain = lengths.detach() * torch.rsqrt(at_least_float32(batch_norm.running_var) + batch_norm.eps).view(groups, -1)
    if batch_norm.affine:
        gain = gain * at_least_float32(batch_norm.weight).abs().view(groups, -1)
    # A filter of zeros has length 0: its direction is taken to be 0, and its gradient with it.
    directions = meeting_taps(convolution) / _positive(lengths)[:, :, None, None]
    return (gain[:, :, None, None] * directions).sum(dim=1).amax()


def meeting_taps(layer: nn.Module) -> Tensor:
    r"""Sum the absolute values of the taps that one input pixel meets, for each way in which it can lie.

    .. math:: \sum_{t \in M_r} |W_{o i t}|, \qquad M_r = \{t : t_j d_j \equiv r_j \pmod{s_j}
        \text{ in each dimension } j\}

    Place :math:`p` of a convolution's output sees the pixel :math:`p s + t d`, less the padding, by tap :math:`t`, with
    stride :math:`s` and dilation :math:`d`. So a pixel meets only taps whose offsets leave the same remainder. With
    stride 1, and in a transposed convolution or a linear layer, it meets them all.

    Args:
        layer: a convolution (1-3 dimensions, transposed or not) or a linear layer.

    Returns:
        ``[groups, output channels of each, input channels of each, remainders]``, at least float32, without remainders
        that no tap has; gradients flow.

    Raises:
        InputError: a layer of another kind.
    """
    filters = filters_of(layer)
    if not isinstance(layer, CONVOLUTIONS):
        return torch.linalg.vector_norm(filters, ord=1, dim=3, keepdim=True)
    taps = filters.unflatten(3, layer.kernel_size)
    periods = [
        stride // math.gcd(stride, dilation) for stride, dilation in zip(layer.stride, layer.dilation, strict=True)
    ]
    starts = [range(min(period, size)) for period, size in zip(periods, layer.kernel_size, strict=True)]
    sums: list[Tensor] = []
    for first in itertools.product(*starts):
        places = tuple(slice(start, None, period) for start, period in zip(first, periods, strict=True))
        sums.append(torch.linalg.vector_norm(taps[(..., *places)].flatten(3), ord=1, dim=3))
    return torch.stack(sums, dim=3)


def filters_of(layer: nn.Module) -> Tensor:
    """Return the weight of a convolution (transposed or not) or linear layer in one form for all of them.

    Returns:
        ``[groups, output channels of each, input channels of each, taps]``, at least float32; gradients flow.

    Raises:
        InputError: a layer of another kind.
    """
    if isinstance(layer, nn.Linear):
        return at_least_float32(layer.weight)[None, :, :, None]
    if isinstance(layer, TRANSPOSED_CONVOLUTIONS):  # weight [in, out / groups, *taps]
        return at_least_float32(layer.weight).unflatten(0, (layer.groups, -1)).transpose(1, 2).flatten(3)
    if isinstance(layer, CONVOLUTIONS):  # weight [out, in / groups, *taps]
        return at_least_float32(layer.weight).unflatten(0, (layer.groups, -1)).flatten(3)
    raise InputError(f"wanted a convolution or linear layer, got {type(layer).__name__}")


def _positive(lengths: Tensor) -> Tensor:
    return lengths.clamp(min=torch.finfo(lengths.dtype).tiny)


@dataclass(frozen=True, slots=True, kw_only=True)
class Operator:
    """A linear operator of a network: a layer, with the batch norm that belongs to it."""

    path: str
    """The layer's path in the network."""
    layer: nn.Module
    batch_norm_path: str | None = None
    batch_norm: nn.Module | None = None
    """What follows a convolution; ``None`` for a layer by itself, a batch norm among them."""

    def norm(self) -> Tensor:
        """Return the norm induced by the 1-norm: :func:`composed_norm`, or that of the layer by itself.

        Without a batch norm it is the same formula without the factors: exact also where ``induced_norm`` only bounds
        a convolution, with a stride.
        """
        if self.batch_norm is not None:
            return composed_norm(self.layer, self.batch_norm)
        if isinstance(self.layer, BATCH_NORMS):
            return induced_norm(self.layer)
        return meeting_taps(self.layer).sum(dim=1).amax()


def network_operators(network: nn.Module, batch_norm_of: Mapping[str, str]) -> list[Operator]:
    """Return the operators of a network, each once, in the order of ``network.modules()``.

    They are the layers of ``normed_layers``, but a convolution and the batch norm that belongs to it are one.

    Args:
        network: the bare network.
        batch_norm_of: path of a convolution to that of its batch norm, as ``NetworkFacts.batch_norm_of`` has it.

    Raises:
        InputError: the network has no such layer, or not those that belong together.
    """
    layers = {path: module for path, module in network.named_modules() if isinstance(module, NORMED_LAYERS)}
    if not layers:
        raise InputError(f"{type(network).__name__} has no convolution, linear layer or batch norm to regularise")
    missing = [path for pair in batch_norm_of.items() for path in pair if path not in layers]
    if missing:
        raise InputError(f"{type(network).__name__} has no convolution or batch norm {missing[0]!r}")
    return list(_operators(layers, batch_norm_of))


def _operators(layers: Mapping[str, nn.Module], batch_norm_of: Mapping[str, str]) -> Iterator[Operator]:
    following = set(batch_norm_of.values())
    for path, layer in layers.items():
        if path in batch_norm_of:
            other = batch_norm_of[path]
            yield Operator(path=path, layer=layer, batch_norm_path=other, batch_norm=layers[other])
        elif path not in following:
            yield Operator(path=path, layer=layer)


def joint_lipschitz_sum(network: nn.Module, batch_norm_of: Mapping[str, str]) -> Tensor:
    r"""Sum over a network's operators of the Lipschitz bound of each, in the 1-norm.

    .. math:: \sum_{(W, \gamma)} \lVert \mathrm{BN}_\gamma \circ W \rVert_1 + \sum_{\text{others}} \lVert W \rVert_1

    Each is that of :meth:`Operator.norm`, exact also with a stride. Unlike ``lipschitz_bound_sum`` the sum does not
    change when a convolution and its batch norm's statistics are scaled together, which leaves the network the same
    function.

    Args:
        network: the bare network.
        batch_norm_of: path of a convolution to that of its batch norm; see :func:`network_operators`.

    Returns:
        A scalar, float32 (float64 from float64 weights); gradients as :func:`composed_norm` says.

    Raises:
        InputError: see :func:`network_operators` and :func:`composed_norm`.
    """
    return torch.stack([operator.norm() for operator in network_operators(network, batch_norm_of)]).sum()


class JointLipschitzConfig(ObjectiveConfig):
    """Settings of :class:`JointLipschitz`."""

    takes_mixtures: ClassVar[bool] = True

    weight: float = Field(default=WEIGHT, gt=0)
    """Factor of the objective in the training loss."""

    def build(self, task: Task) -> JointLipschitz:
        """Return the objective for the network of the task.

        Raises:
            InputError: nothing is known of the network.
        """
        if task.network is None:
            raise InputError("joint_lipschitz needs the network in training, to see which batch norms follow what")
        return JointLipschitz(self, task.network.batch_norm_of)


@final
class JointLipschitz(Objective[Step]):
    """Keep the Lipschitz constants of convolutions with their batch norms small; see :func:`joint_lipschitz_sum`."""

    name = "joint_lipschitz"

    def __init__(self, config: JointLipschitzConfig, batch_norm_of: Mapping[str, str]) -> None:
        super().__init__()
        self.config = config
        self.batch_norm_of = dict(batch_norm_of)

    def forward(self, step: Step) -> Tensor:
        """Return the sum over the operators of the network in training; the same for every batch."""
        return joint_lipschitz_sum(step.model, self.batch_norm_of)


METHOD = Method(
    name="joint_lipschitz",
    role="teacher",
    title="Student-oriented teacher whose Lipschitz term takes a convolution and its batch norm as one operator",
    source="soteacher; after Dong, Liu and Shang, ICLR 2024, arXiv:2206.06661",
    terms={
        "cross_entropy": {},
        "joint_lipschitz": {"weight": WEIGHT},
        "consistency": {"weight": 1.0, "ramp": "linear"},
    },
)
