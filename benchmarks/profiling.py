"""Where the time of a training step goes, and how much arithmetic there is in it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import nn
from torch.profiler import ProfilerActivity, profile, record_function
from torch.utils.flop_counter import FlopCounterMode

Item = TypeVar("Item")

INPUT, STEP = "measured input", "measured step"
CONVOLUTION = ("aten::mkldnn_convolution", "aten::convolution_backward", "aten::addmm", "aten::mm")
POINTWISE = (
    "aten::native_batch_norm", "aten::batch_norm", "aten::_batch_norm", "aten::clamp_min", "aten::relu",
    "aten::threshold_backward", "aten::add", "aten::mul", "aten::sub", "aten::div", "aten::copy_", "aten::avg_pool2d",
    "aten::mean", "## Call CompiledFxGraph",
)  # fmt: skip
"""What is neither; a compiled graph's own time is that of the operations that the compiler has fused."""
KINDS = ("convolution", "batch norm, pointwise", "optimiser", "input", "other")


def labelled(source: Iterator[Item]) -> Iterator[Item]:
    """Yield what ``source`` yields, so that :func:`shares` knows its time for input."""
    while True:
        try:
            with record_function(INPUT):
                item = next(source)
        except StopIteration:
            return
        yield item


def shares(take_step: Callable[[], object], *, steps: int = 3) -> dict[str, float]:
    """Return the share of each of :data:`KINDS` in a step's time, measured by PyTorch's profiler.

    ``convolution`` counts other products of matrices too; ``other`` is losses, bookkeeping and Python between the
    operations. The profiler itself costs time with each operation: shares are near, and not exactly, those without it.

    Args:
        take_step: does one step on the CPU, its input from :func:`labelled`.
        steps: to look at.
    """
    take_step()
    with profile(activities=[ProfilerActivity.CPU]) as recorded:
        for _ in range(steps):
            with record_function(STEP):
                take_step()
    times: dict[str, float] = dict.fromkeys(KINDS, 0.0)
    for event in recorded.events() or []:
        times[_kind(event)] += event.self_cpu_time_total
    total = sum(times.values())
    return {kind: time / total for kind, time in times.items()}


def _kind(event: Any) -> str:
    """Return what an operation's own time is for: by what it happens in, else by what it is."""
    around = event
    while around is not None:
        if around.name == INPUT:
            return "input"
        if around.name.startswith("Optimizer."):
            return "optimiser"
        around = around.cpu_parent
    if event.name in CONVOLUTION:
        return "convolution"
    return "batch norm, pointwise" if event.name.startswith(POINTWISE) else "other"


def operations(network: nn.Module, batch_size: int) -> int:
    """Return the arithmetic operations of a network's way forward and back: two for each multiply-add.

    Convolutions and products of matrices are counted, nothing else.

    Args:
        network: takes ``[B, 3, 32, 32]``; its gradients are filled.
        batch_size: B.
    """
    images = torch.rand(batch_size, 3, 32, 32)
    with FlopCounterMode(display=False) as counter:
        F.cross_entropy(network(images), torch.zeros(batch_size, dtype=torch.int64)).backward()
    return counter.get_total_flops()
