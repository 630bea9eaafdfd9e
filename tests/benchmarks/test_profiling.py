from itertools import count

import pytest
import torch
from benchmarks.profiling import KINDS, labelled, operations, shares
from torch import nn


def _network():
    return nn.Sequential(
        nn.Conv2d(3, 5, 3, padding=1), nn.BatchNorm2d(5), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Linear(5, 2),
    )  # fmt: skip


def test_operations_are_those_counted_by_hand():
    convolution = 2 * 4 * 32 * 32 * 5 * 3 * 9  # forward, and the same again for the weight; images want no gradient
    linear = 2 * 4 * 5 * 2  # forward, for the weight and for what came in
    assert operations(_network(), batch_size=4) == 2 * convolution + 3 * linear


def test_shares_tell_the_kinds_of_work_apart():
    network, labels = _network(), torch.zeros(4, dtype=torch.int64)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
    source = labelled(torch.rand(4, 3, 32, 32) for _ in count())

    def take_step() -> None:
        optimizer.zero_grad()
        nn.functional.cross_entropy(network(next(source)), labels).backward()
        optimizer.step()

    found = shares(take_step, steps=2)
    assert set(found) == set(KINDS)
    assert sum(found.values()) == pytest.approx(1)
    assert min(found.values()) > 0


def test_what_is_not_there_has_no_share():
    found = shares(lambda: torch.ones(8) * 2)
    assert found["convolution"] == found["optimiser"] == found["input"] == 0


def test_labelled_passes_everything_on_and_ends():
    assert list(labelled(iter([1, 2, 3]))) == [1, 2, 3]
