"""Every pure function of the objectives: tensors and numbers in, tensors out; no state, no configuration.

``from soteacher.functional import kd_divergence``. A function is here because the file of its objective defines it:
there is no list to keep.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from typing import Any

from soteacher.logits import standardized_logits
from soteacher.objectives import MODULES


def _public_functions() -> dict[str, Callable[..., Any]]:
    """Return the functions by name; two files that define one name are a mistake of ours."""
    functions: dict[str, Callable[..., Any]] = {"standardized_logits": standardized_logits}
    for module in MODULES:
        for name, value in vars(module).items():
            if inspect.isfunction(value) and value.__module__ == module.__name__ and not name.startswith("_"):
                assert name not in functions, f"{name} is defined in {module.__name__} and in another file"
                functions[name] = value
    return functions


_FUNCTIONS = _public_functions()
__all__ = sorted(_FUNCTIONS)  # pyright: ignore[reportUnsupportedDunderAll] known when the module is read
vars(sys.modules[__name__]).update(_FUNCTIONS)


def __getattr__(name: str) -> Callable[..., Any]:
    """Tell type checkers that there are more functions here than they can see."""
    raise AttributeError(f"module {__name__!r} has no function {name!r}")
