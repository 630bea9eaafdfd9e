"""Losses are computed in single precision, whatever precision the network runs in."""

from __future__ import annotations

from contextlib import AbstractContextManager

import torch
from torch import Tensor


def at_least_float32(tensor: Tensor) -> Tensor:
    """Return half-precision values as float32, and float32 or float64 values as they are; gradients flow."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def full_precision(tensor: Tensor) -> AbstractContextManager[object]:
    """Return a context in which autocast rounds nothing on the tensor's device: for the matrix products of a loss."""
    return torch.autocast(device_type=tensor.device.type, enabled=False)
