"""Ways that are measured in a process of their own: what the allocator keeps holds for a whole process.

The process stands still until it is its turn, so that ways here and there take turns like any others.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from multiprocessing import get_context
from typing import Any

import torch

from soteacher.environment import keep_pages

KEPT = ", kept pages"
"""Behind the name of a way whose process keeps the pages that a step frees, as a study's processes do."""


class Apart:
    """A process that keeps freed pages and runs functions that are made there.

    Args:
        make: a module's function, which returns functions without arguments by name.
        arguments: what it is called with; they are copied.
    """

    def __init__(self, make: Callable[..., Mapping[str, Callable[[], object]]], *arguments: Any) -> None:
        spawning = get_context("spawn")
        self._ours, theirs = spawning.Pipe()
        self._process = spawning.Process(target=_serve, args=(theirs, torch.get_num_threads(), make, arguments))
        self._process.start()
        theirs.close()
        self._names: list[str] = self._ours.recv()

    def __enter__(self) -> Apart:
        return self

    def __exit__(self, *error: object) -> None:
        self._ours.send(None)  # not by closing: a loader's processes may hold the pipe too
        self._process.join()
        self._ours.close()

    def calls(self) -> dict[str, Callable[[], Any]]:
        """Return functions that run those of the process, by the same names, and return what they return."""
        return {name: partial(self._call, name) for name in self._names}

    def _call(self, name: str) -> Any:
        self._ours.send(name)
        return self._ours.recv()


def _serve(
    pipe: Any, threads: int, make: Callable[..., Mapping[str, Callable[[], object]]], arguments: tuple[Any, ...]
) -> None:
    keep_pages()
    torch.set_num_threads(threads)
    calls = make(*arguments)
    pipe.send(list(calls))
    while (name := pipe.recv()) is not None:
        pipe.send(calls[name]())
