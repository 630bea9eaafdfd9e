"""Studies by name: whole ones, and those made of a method's published settings and a standard pair of networks.

A whole study is one YAML file in ``recipes/``; of the others ``published_settings`` holds the parts.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml

from soteacher.config import StudyConfig
from soteacher.errors import InputError, unknown_name
from soteacher.published_settings import (
    Changes,
    MethodRecipe,
    method_recipe,
    method_recipe_names,
    published_student,
    standard_pairs,
)
from soteacher.settings import apply_settings, parse, read_tree

_FOLDER = files("soteacher") / "recipes"
DEFAULT_PAIR = "wrn_40_2-wrn_16_2"
"""The pair of a method's recipe where none is named."""
BASELINE = "kd"
"""The method that the others are compared with."""


def recipe_names() -> tuple[str, ...]:
    """Return the names of the whole studies inside the package."""
    return tuple(sorted(path.name.removesuffix(".yaml") for path in _FOLDER.iterdir() if path.name.endswith(".yaml")))


class _WithoutAliases(yaml.SafeDumper):
    """Writes a table that stands in two places twice, so that each can be edited."""

    def ignore_aliases(self, data: Any) -> bool:
        del data
        return True


def recipe_text(name: str, pair: str | None = None) -> str:
    """Return a recipe's study as YAML, to be edited and run as a file.

    Args:
        name: a whole study, or a method.
        pair: teacher and student of a method's study, see :func:`~soteacher.published_settings.pair_names`; None:
            :data:`DEFAULT_PAIR`.

    Raises:
        InputError: there is no such recipe or pair, a whole study was to have a pair, or the pair does not suit the
            method.
    """
    if name not in recipe_names():
        tree = method_study(name, pair)
        return yaml.dump(
            tree, Dumper=_WithoutAliases, sort_keys=False, allow_unicode=True, width=120, default_flow_style=None
        )
    _refuse_pair(name, pair)
    return (_FOLDER / f"{name}.yaml").read_text(encoding="utf-8")


def recipe_description(name: str) -> str:
    """Return what a recipe is for, or where a method's settings were published."""
    if name in recipe_names():
        return str(read_tree(recipe_text(name), f"recipe {name}").get("description", "")).strip()
    recipe = method_recipe(name)
    return f"On {len(standard_pairs().pairs) - len(recipe.unsuitable)} CIFAR-100 pairs; settings: {recipe.source}"


def read_study(
    source: str | Path | dict[str, Any], settings: Iterable[str] = (), pair: str | None = None
) -> StudyConfig:
    """Return the study of a recipe, a YAML file or a tree of settings.

    Args:
        source: a recipe's name, a file's path (it ends in ``.yaml`` or ``.yml``, or has a folder in it), or a tree.
        settings: ``path.to.field=value``, laid over it.
        pair: teacher and student, where the recipe is a method's; see :func:`recipe_text`.

    Raises:
        InputError: no such recipe, pair or file, a series of studies, or settings that cannot be used; the source and
            the key are named.
    """
    tree, origin = read_source(source, pair)
    if is_series(tree):
        raise InputError(f"{origin or 'the tree'} is a series of studies (it has vary), wanted a single one")
    return parse(StudyConfig, apply_settings(tree, settings), source=origin)


def is_series(tree: Mapping[str, Any]) -> bool:
    """Return whether a tree is that of a series of studies; see :mod:`soteacher.series`."""
    return "vary" in tree


def read_source(source: str | Path | dict[str, Any], pair: str | None = None) -> tuple[dict[str, Any], str]:
    """Return the tree of a recipe, a file or a tree itself, unchecked, and its name in messages.

    Args:
        source: as in :func:`read_study`.
        pair: likewise.

    Raises:
        InputError: no such recipe, pair or file, or no table in it.
    """
    if isinstance(source, dict):
        _refuse_pair("the tree of settings", pair)
        return source, ""
    path = Path(source)
    if isinstance(source, str) and path.suffix not in (".yaml", ".yml") and path.name == source:
        return read_tree(recipe_text(source, pair), f"recipe {source}"), f"recipe {source}"
    _refuse_pair(str(path), pair)
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: no readable study: {getattr(error, 'strerror', None) or error}") from None
    return read_tree(text, str(path)), str(path)


def _refuse_pair(source: str, pair: str | None) -> None:
    """Refuse a pair for a study that names its networks itself."""
    if pair is not None:
        raise InputError(
            f"{source} is a whole study with networks of its own, got the pair {pair}: a pair is for a method's "
            f"recipe, such as {BASELINE}"
        )


def method_study(name: str, pair: str | None = None) -> dict[str, Any]:
    """Return the study of a method on a pair: beside it ``kd`` as the baseline, and a student alone.

    The method's student spells out all of its terms, so that what is shown can be edited.

    Args:
        name: the method.
        pair: as in :func:`recipe_text`.

    Raises:
        InputError: there is no such recipe, method or pair, or the pair does not suit the method.
    """
    if name not in method_recipe_names():
        raise unknown_name("recipe", name, (*recipe_names(), *method_recipe_names()))
    recipe, pair = method_recipe(name), pair or DEFAULT_PAIR
    teacher, student = standard_pairs().networks(pair)
    if pair in recipe.unsuitable:
        raise InputError(f"{name} does not suit the pair {pair}: {recipe.unsuitable[pair]}")
    network = standard_pairs().students.get(student, Changes())
    alone = {"model": student, "method": "alone", "training": network.training}
    students = {"alone": alone, **{key: published_student(key, pair) for key in (BASELINE, name)}}
    tree = {
        "name": f"cifar100-{name}-{pair}",
        "description": _description(recipe, teacher, student),
        "baseline": "alone" if name == BASELINE else f"standard-{BASELINE}",
        "teachers": {"standard": {"model": teacher, "method": "standard"}},
        "students": {key: {k: v for k, v in settings.items() if v} for key, settings in students.items()},
        **standard_pairs().study,
    }
    return {key: tree[key] for key in StudyConfig.model_fields if key in tree}


def _description(recipe: MethodRecipe, teacher: str, student: str) -> str:
    beside = "a student alone" if recipe.method == BASELINE else "knowledge distillation and a student alone"
    unchecked = f" Not checked: {recipe.unchecked}." if recipe.unchecked else ""
    return (
        f"{recipe.method} with its published settings on CIFAR-100, {teacher} -> {student}, beside {beside}. "
        f"Settings: {recipe.source}. Published numbers: {recipe.protocol}.{unchecked} Made for a GPU."
    )
