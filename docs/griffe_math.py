"""Lets the API pages show mathematics, roles and literals of our docstrings, which are written as reStructuredText."""

from __future__ import annotations

import re
from typing import Any

import griffe

from soteacher.method_pages import inline_markdown


class MarkdownDocstrings(griffe.Extension):
    """Rewrites every docstring when its object is found; sections such as ``Args:`` are left to griffe."""

    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        """Rewrite the docstring of a module, class, function or attribute."""
        del kwargs
        if obj.docstring is not None:
            text = inline_markdown(obj.docstring.value)
            obj.docstring.value = re.sub(r"^Source:\s*", "**Source.** ", text, flags=re.MULTILINE)
