"""Train teachers that teach: student-oriented teachers, knowledge distillation and honest statistics.

The names below are imported when they are first used, so that ``import soteacher`` costs nothing.
"""

from __future__ import annotations

from importlib import import_module
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from soteacher.api import card, distill, evaluate, export, load, run, teach

__version__ = version("soteacher")
__all__ = ["__version__", "card", "distill", "evaluate", "export", "load", "run", "teach"]


def __getattr__(name: str) -> Any:
    if name in __all__:
        return getattr(import_module("soteacher.api"), name)
    raise AttributeError(f"module 'soteacher' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
