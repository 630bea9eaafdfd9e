"""Every random number comes from a generator whose seed is computed from what it is for.

Nothing carries a random state from one step to the next, so a resumed run draws what the unbroken run would have drawn.
"""

from __future__ import annotations

from hashlib import blake2b

import torch


def derive_seed(seed: int, *keys: str | int) -> int:
    """Return a 63-bit seed for one purpose of a run, the same on every machine.

    Args:
        seed: the run's seed.
        keys: what the numbers are for, for example ``("augment", epoch)``.
    """
    digest = blake2b("/".join(map(str, (seed, *keys))).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def generator(seed: int, *keys: str | int) -> torch.Generator:
    """Return a CPU generator for one purpose of a run; see :func:`derive_seed`."""
    return torch.Generator().manual_seed(derive_seed(seed, *keys))
