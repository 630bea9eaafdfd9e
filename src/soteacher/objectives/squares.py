"""Sums of squares whose gradient passes over the values once, where autograd writes them out two or three times."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor

from soteacher.precision import full_precision


def squared_norm(values: Tensor) -> Tensor:
    r"""Squared Euclidean length along the last dimension, in full precision under autocast as well.

    .. math:: \sum_n x_n^2

    Args:
        values: ``[..., N]``; gradients flow.

    Returns:
        ``[...]``.
    """
    return cast("Tensor", _SumOfSquares.apply(values, -1))


def mean_square(values: Tensor, dim: int) -> Tensor:
    r"""Mean of the squares along a dimension, which is not the last one.

    .. math:: \frac{1}{C} \sum_c x_c^2

    Args:
        values: of any shape; gradients flow.
        dim: the dimension, from 0.

    Returns:
        The same shape without the dimension.
    """
    return cast("Tensor", _SumOfSquares.apply(values, dim)) / values.shape[dim]


class _SumOfSquares(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, dim: int) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx.save_for_backward(values)
        ctx.dim = dim
        if dim != -1:
            return values.square().sum(dim=dim)
        with full_precision(values):
            return torch.linalg.vecdot(values, values)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        (values,) = ctx.saved_tensors
        return values * (2 * gradient).unsqueeze(ctx.dim), None
