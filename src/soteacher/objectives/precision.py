"""Losses are computed in single precision, whatever precision the network runs in."""

from __future__ import annotations

import torch
from torch import Tensor


def at_least_float32(tensor: Tensor) -> Tensor:
    """Return half-precision values as float32, and float32 or float64 values as they are; gradients flow."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))
