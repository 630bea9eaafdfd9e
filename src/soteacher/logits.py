"""What may be done to logits before any loss sees them."""

from __future__ import annotations

from torch import Tensor

from soteacher.errors import InputError
from soteacher.precision import at_least_float32

EPSILON = 1e-7


def standardized_logits(logits: Tensor) -> Tensor:
    r"""Return logits with mean 0 and standard deviation 1 in each example.

    .. math:: (z - \bar z) / (s + \epsilon), \quad s^2 = \tfrac{1}{K - 1} \sum_k (z_k - \bar z)^2, \epsilon = 10^{-7}

    The student then has to match the order and the relations of the teacher's logits, not their size.

    Args:
        logits: ``[..., K]``, K at least 2; gradients flow.

    Returns:
        ``[..., K]`` float32 (float64 from float64); invariant to a shift of the logits, and to a positive factor as
        long as their deviation is far above :math:`\epsilon`. Zeros, with gradient 0, where all logits of an example
        are equal.

    Raises:
        InputError: there are fewer than two logits.

    Source: Sun et al., CVPR 2024, arXiv:2403.01427, section 4, without the temperature, which the loss has itself.
    """
    if logits.ndim < 1 or logits.shape[-1] < 2:
        raise InputError(f"standardised logits need at least 2 classes, got logits {list(logits.shape)}")
    logits = at_least_float32(logits)
    centred = logits - logits.mean(dim=-1, keepdim=True)
    variance = centred.square().sum(dim=-1, keepdim=True) / (logits.shape[-1] - 1)
    # Rounding of the mean may leave equal logits a variance; and the square root of 0 has no gradient.
    equal = (logits.amax(dim=-1, keepdim=True) == logits.amin(dim=-1, keepdim=True)) | (variance == 0)
    deviation = variance.where(~equal, 1.0).sqrt() + EPSILON
    return (centred / deviation).where(~equal, 0.0)
