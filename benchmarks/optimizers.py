"""What does the optimiser's step cost? Times stochastic gradient descent as PyTorch does it in three ways.

The weights and gradients are those of one network; ``default`` is what ``torch.optim.SGD`` chooses by itself,
``foreach`` goes through all weights in one call for each operation, ``fused`` in one call for all of them.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from benchmarks import timing
from benchmarks.field import LEARNING_RATE, MOMENTUM, WEIGHT_DECAY
from benchmarks.ours import CLASSES
from soteacher.models.zoo import build_network

WAYS: dict[str, dict[str, Any]] = {"default": {}, "foreach": {"foreach": True}, "fused": {"fused": True}}
CALLS = 20
"""Steps that are timed together: one is short."""


def main() -> None:
    """Measure, print a table and write the numbers to a JSON file if one is named."""
    given = _arguments()
    found = measure(given.model, rounds=given.rounds)
    timing.table(
        f"stochastic gradient descent on the weights of {given.model}, {given.threads} threads",
        ("way", "ms a step", "times as fast as the default"),
        [(way, f"{row['milliseconds']:.2f}", timing.spread(row["times_as_fast"])) for way, row in found.items()],
        caption="medians (quartiles)",
    )
    settings = {"model": given.model, "rounds": given.rounds, "calls": CALLS}
    timing.record(given.json, settings=settings, results={"ways": found}, threads=given.threads)


def measure(model: str, *, rounds: int) -> dict[str, dict[str, Any]]:
    """Return milliseconds of a step, and how many times as fast as the default it is, by way."""
    seconds = timing.alternate({way: _steps(model, options) for way, options in WAYS.items()}, rounds=rounds)
    return {
        way: {
            "milliseconds": 1000 * statistics.median(times) / CALLS,
            "times_as_fast": timing.ratio(seconds, "default", way),
        }
        for way, times in seconds.items()
    }


def _steps(model: str, options: dict[str, Any]) -> Callable[[], None]:
    network: nn.Module = build_network(model, num_classes=CLASSES)
    generator = torch.Generator().manual_seed(0)
    for parameter in network.parameters():
        parameter.grad = torch.rand(parameter.shape, generator=generator) - 0.5
    optimizer = torch.optim.SGD(
        network.parameters(), lr=LEARNING_RATE, momentum=MOMENTUM, weight_decay=WEIGHT_DECAY, **options
    )

    def take_steps() -> None:
        for _ in range(CALLS):
            optimizer.step()

    return take_steps


def _arguments() -> argparse.Namespace:
    parser = timing.arguments(__doc__, rounds=20)
    parser.add_argument("--model", default="wrn_40_2", help="name of the network")
    return timing.checked(parser)


if __name__ == "__main__":
    timing.run(main)
