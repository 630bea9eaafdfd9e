"""All numbers of each example in one row, for what does not depend on their order."""

from __future__ import annotations

import torch
from torch import Tensor


def example_rows(features: Tensor) -> Tensor:
    """Return features as rows in the order in which they lie in memory: channels-last maps need not be copied.

    Args:
        features: ``[B, ...]``; gradients flow.

    Returns:
        ``[B, D]``.
    """
    if features.ndim == 4 and features.is_contiguous(memory_format=torch.channels_last):
        features = features.permute(0, 2, 3, 1)
    return features.flatten(1)
