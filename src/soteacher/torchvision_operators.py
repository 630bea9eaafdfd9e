"""Lets torchvision, and with it timm, be imported where torchvision's compiled operators do not load."""

from __future__ import annotations

import importlib
import sys
from functools import cache

from torch.library import Library

SCHEMAS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)
"""The operators whose schemas torchvision's Python code asks for while it is being imported."""


def define_missing_operators() -> None:
    """Import torchvision; where its compiled operators are missing, define their schemas first.

    A torchvision built for another PyTorch (a CUDA build beside the CPU's) cannot load its library, and its import then
    fails on operators that image classification never calls. Where the library loads, nothing is defined. Call this
    before importing timm.

    Raises:
        ImportError, RuntimeError: torchvision is not installed, or cannot be imported for another reason.
    """
    try:
        importlib.import_module("torchvision")
    except RuntimeError as error:
        if "torchvision::nms" not in str(error):
            raise
        # What the failed import left behind would be taken for imported.
        for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
            del sys.modules[name]
        _define_schemas()
        importlib.import_module("torchvision")


@cache
def _define_schemas() -> Library:
    """Define the schemas; the cache keeps the library alive, and with it the schemas."""
    library = Library("torchvision", "FRAGMENT")
    for schema in SCHEMAS:
        library.define(schema)
    return library
