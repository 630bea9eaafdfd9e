"""What a training step computes and moves, and what the device could at its best."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.gpu_steps import synchronise
from benchmarks.timing import alternate

CALLS, ROUNDS = 5, 6
"""Products and copies in a round, and rounds, of which the fastest counts."""
UNAVOIDABLE = ("convolution", "batch_norm", "fused_sgd", "fused_adam")
PRODUCTS = ("mm", "addmm", "bmm", "baddbmm")


def peaks(device: str, *, size: int, copied_bytes: int) -> dict[str, float]:
    """Return what the device reaches at its best.

    Args:
        device: ``cpu`` or ``cuda``.
        size: of the square bfloat16 matrices, of random numbers, that are multiplied.
        copied_bytes: of the array that is copied; well above the caches.

    Returns:
        ``bf16_operations_per_second`` (a multiplication and an addition are two), and ``bytes_per_second`` read and
        written.
    """
    first, second = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    source = torch.randint(0, 256, (copied_bytes,), device=device, dtype=torch.uint8)
    target = torch.empty_like(source)
    multiplying = _seconds(lambda: torch.mm(first, second), device)
    copying = _seconds(lambda: target.copy_(source), device)
    return {
        "bf16_operations_per_second": 2 * size**3 / multiplying,
        "bytes_per_second": 2 * copied_bytes / copying,
    }


def _seconds(call: Callable[[], object], device: str) -> float:
    def block() -> None:
        for _ in range(CALLS):
            call()
        synchronise(device)

    return min(alternate({"": block}, rounds=ROUNDS)[""]) / CALLS


class Traffic(TorchDispatchMode):
    """Adds up the bytes of what operations read and write, each array once for each operation."""

    def __init__(self) -> None:
        super().__init__()
        self.all = 0
        """Of every operation, as if each went alone and nothing stayed in a cache: what an eager step moves. Look-ups,
        which read a few rows of an array, are left out: they are a small part."""
        self.least = 0
        """Of convolutions, matrix products, batch norms and fused optimisers alone, as if all else rode along."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Run an operation and count it."""
        del types
        result = func(*args, **(kwargs or {}))
        name: str = func.overloadpacket.__name__
        if not func.is_view and not name.startswith("index"):
            read = _bytes((args, kwargs))
            moved = read + (_bytes(result) if result is not None else read)  # None: what it read was written in place
            self.all += moved
            if name in PRODUCTS or any(part in name for part in UNAVOIDABLE):
                self.least += moved
        return result


def _bytes(tree: Any) -> int:
    return sum(leaf.numel() * leaf.element_size() for leaf in tree_leaves(tree) if isinstance(leaf, Tensor))


def count_step(step: Callable[[], None]) -> dict[str, int]:
    """Return what one eager step computes and moves.

    Args:
        step: takes a step; of a network that is not compiled.

    Returns:
        ``operations`` of convolutions and matrix products (a multiplication and an addition are two), forward and
        backward, a teacher's included; ``bytes_each_operation`` and ``bytes_least``, see :class:`Traffic`.
    """
    traffic, operations = Traffic(), FlopCounterMode(display=False)
    with operations, traffic:
        step()
    return {
        "operations": operations.get_total_flops(), "bytes_each_operation": traffic.all, "bytes_least": traffic.least,
    }  # fmt: skip
