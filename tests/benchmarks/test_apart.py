"""Functions of a process of its own: run there, one state, ended when it is left."""

import os
from collections.abc import Callable
from itertools import count
from pathlib import Path

import torch
from benchmarks.apart import Apart


def make(start: int) -> dict[str, Callable[[], object]]:
    numbers = count(start)
    return {"next": lambda: next(numbers), "process": os.getpid, "threads": torch.get_num_threads}


def test_functions_run_in_one_other_process() -> None:
    with Apart(make, 5) as process:
        calls = process.calls()
        assert list(calls) == ["next", "process", "threads"]
        assert [calls["next"]() for _ in range(3)] == [5, 6, 7]
        other = calls["process"]()
        assert other != os.getpid()
        assert calls["threads"]() == torch.get_num_threads()
        held = os.dup(process._ours.fileno())  # as a loader's processes hold what was open when they began
    os.close(held)
    assert not Path(f"/proc/{other}/stat").exists()
