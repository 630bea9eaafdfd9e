"""Directions of vectors, with gradients that stay bounded where there is no direction."""

from __future__ import annotations

from torch import Tensor

LEAST_SQUARED_NORM = 1e-24


def unit_vectors(vectors: Tensor, dim: int = -1) -> Tensor:
    """Return the vectors along a dimension with length 1, in the same shape; zeros stay zeros.

    A vector shorter than 1e-12 has no direction worth following: it is left as it is, with a gradient of 1. Dividing it
    by a small epsilon, as is usual, would give finite gradients too, but ones that ruin the network in one step.
    """
    squared_norms = vectors.square().sum(dim=dim, keepdim=True)
    return vectors * squared_norms.where(squared_norms > LEAST_SQUARED_NORM, 1.0).rsqrt()
