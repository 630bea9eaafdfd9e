"""Scalar products of all pairs of vectors; their gradient costs one product of matrices, where autograd takes two."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor

from soteacher.precision import full_precision


def gram_matrix(rows: Tensor) -> Tensor:
    r"""Scalar products of all pairs of rows, in full precision under autocast as well.

    .. math:: G = X X^\top

    Args:
        rows: ``[..., N, D]``; gradients flow.

    Returns:
        ``[..., N, N]``.
    """
    return cast("Tensor", _GramMatrix.apply(rows))


class _GramMatrix(torch.autograd.Function):
    """Both factors are the same, so that the gradient is one product with the sum of the upstream one's two sides."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride] one argument
        ctx.save_for_backward(rows)
        with full_precision(rows):
            return rows @ rows.mT

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        (rows,) = ctx.saved_tensors
        with full_precision(rows):
            return (gradient + gradient.mT) @ rows
