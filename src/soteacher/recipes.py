"""Whole studies by name: YAML files inside the package, one study each."""

from __future__ import annotations

from collections.abc import Iterable
from importlib.resources import files
from pathlib import Path
from typing import Any

from soteacher.config import StudyConfig
from soteacher.errors import InputError, unknown_name
from soteacher.settings import apply_settings, parse, read_tree

_FOLDER = files("soteacher") / "recipes"


def recipe_names() -> tuple[str, ...]:
    """Return the names of the recipes inside the package."""
    return tuple(sorted(path.name.removesuffix(".yaml") for path in _FOLDER.iterdir() if path.name.endswith(".yaml")))


def recipe_text(name: str) -> str:
    """Return a recipe's YAML, to be edited and run as a file.

    Raises:
        InputError: there is no such recipe.
    """
    if name not in recipe_names():
        raise unknown_name("recipe", name, recipe_names())
    return (_FOLDER / f"{name}.yaml").read_text(encoding="utf-8")


def recipe_description(name: str) -> str:
    """Return what a recipe says it is for."""
    return str(read_tree(recipe_text(name), name).get("description", "")).strip()


def read_study(source: str | Path | dict[str, Any], settings: Iterable[str] = ()) -> StudyConfig:
    """Return the study of a recipe, a YAML file or a tree of settings.

    Args:
        source: a recipe's name, a file's path (it ends in ``.yaml`` or ``.yml``, or has a folder in it), or a tree.
        settings: ``path.to.field=value``, laid over it.

    Raises:
        InputError: no such recipe or file, or settings that cannot be used; the source and the key are named.
    """
    if isinstance(source, dict):
        tree, origin = source, ""
    else:
        tree, origin = _read(source)
    return parse(StudyConfig, apply_settings(tree, settings), source=origin)


def _read(source: str | Path) -> tuple[dict[str, Any], str]:
    path = Path(source)
    if isinstance(source, str) and path.suffix not in (".yaml", ".yml") and path.name == source:
        return read_tree(recipe_text(source), f"recipe {source}"), f"recipe {source}"
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: no readable study: {getattr(error, 'strerror', None) or error}") from None
    return read_tree(text, str(path)), str(path)
