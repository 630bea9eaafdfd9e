"""Studies by name: whole ones, and those made of a method's published settings and a standard pair of networks.

A whole study is one YAML file in ``recipes/``. A method's recipe is one file in ``recipes/methods/`` for every pair of
``recipes/pairs/cifar100.yaml``, which holds what all those studies share.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml

from soteacher.config import StudyConfig, TermSettings
from soteacher.errors import InputError, unknown_name
from soteacher.objectives import method as method_named
from soteacher.settings import Settings, apply_settings, merge, parse, read_tree

_FOLDER = files("soteacher") / "recipes"
DEFAULT_PAIR = "wrn_40_2-wrn_16_2"
"""The pair of a method's recipe where none is named."""
BASELINE = "kd"
"""The method that the others are compared with."""


class Changes(Settings):
    """What is laid over a student's settings."""

    terms: TermSettings = {}
    """Settings of single terms over the method's own; ``null`` leaves a term out."""
    training: dict[str, Any] = {}
    """Settings that differ from the study's ``training``."""


class MethodRecipe(Settings):
    """A method's published settings, for every pair."""

    method: str
    """The distillation method; also the file's stem."""
    source: str
    """Where the settings were published: repository or paper."""
    protocol: str
    """How the published numbers came about: epochs, which epoch, views of an image, what differs from ours."""
    unchecked: str = ""
    """What stands here without having been checked against its source; empty where everything was."""
    student: Changes = Changes()
    """What is laid over the method's own settings for all pairs."""
    pairs: dict[str, Changes] = {}
    """What differs for a pair."""
    unsuitable: dict[str, str] = {}
    """Pairs that cannot be had with the method, and why."""


class Pairs(Settings):
    """The standard pairs, and what the studies on them share."""

    study: dict[str, Any]
    """Data, seeds and training."""
    students: dict[str, Changes] = {}
    """What a network wants when it is a student, whatever the method."""
    pairs: tuple[tuple[str, str], ...]
    """Teacher and student, by the names of their networks."""

    def networks(self, pair: str) -> tuple[str, str]:
        """Return the teacher's and the student's network of a pair."""
        known = {f"{teacher}-{student}": (teacher, student) for teacher, student in self.pairs}
        if pair not in known:
            raise unknown_name("pair", pair, known)
        return known[pair]


def recipe_names() -> tuple[str, ...]:
    """Return the names of the whole studies inside the package."""
    return _stems()


def method_recipe_names() -> tuple[str, ...]:
    """Return the names of the methods whose published settings are inside the package."""
    return _stems("methods")


def pair_names() -> tuple[str, ...]:
    """Return the standard pairs, ``TEACHER-STUDENT`` each."""
    return tuple(f"{teacher}-{student}" for teacher, student in _pairs().pairs)


def _stems(*folder: str) -> tuple[str, ...]:
    names = (path.name for path in _FOLDER.joinpath(*folder).iterdir())
    return tuple(sorted(name.removesuffix(".yaml") for name in names if name.endswith(".yaml")))


def method_recipe(name: str) -> MethodRecipe:
    """Return a method's published settings.

    Raises:
        InputError: there is no recipe of that method.
    """
    if name not in method_recipe_names():
        raise unknown_name("recipe", name, (*recipe_names(), *method_recipe_names()))
    return parse(MethodRecipe, _read_packaged(f"methods/{name}"), source=f"recipe {name}")


class _WithoutAliases(yaml.SafeDumper):
    """Writes a table that stands in two places twice, so that each can be edited."""

    def ignore_aliases(self, data: Any) -> bool:
        del data
        return True


def recipe_text(name: str, pair: str | None = None) -> str:
    """Return a recipe's study as YAML, to be edited and run as a file.

    Args:
        name: a whole study, or a method.
        pair: teacher and student of a method's study, see :func:`pair_names`; None: :data:`DEFAULT_PAIR`.

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
        return str(_read_packaged(name).get("description", "")).strip()
    recipe = method_recipe(name)
    return f"On {len(_pairs().pairs) - len(recipe.unsuitable)} CIFAR-100 pairs; settings: {recipe.source}"


def read_study(
    source: str | Path | dict[str, Any], settings: Iterable[str] = (), pair: str | None = None
) -> StudyConfig:
    """Return the study of a recipe, a YAML file or a tree of settings.

    Args:
        source: a recipe's name, a file's path (it ends in ``.yaml`` or ``.yml``, or has a folder in it), or a tree.
        settings: ``path.to.field=value``, laid over it.
        pair: teacher and student, where the recipe is a method's; see :func:`recipe_text`.

    Raises:
        InputError: no such recipe, pair or file, or settings that cannot be used; the source and the key are named.
    """
    tree, origin = _read(source, pair)
    return parse(StudyConfig, apply_settings(tree, settings), source=origin)


def _read(source: str | Path | dict[str, Any], pair: str | None) -> tuple[dict[str, Any], str]:
    """Return a study's tree, and its name in messages."""
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
    recipe, pair = method_recipe(name), pair or DEFAULT_PAIR
    teacher, student = _pairs().networks(pair)
    if pair in recipe.unsuitable:
        raise InputError(f"{name} does not suit the pair {pair}: {recipe.unsuitable[pair]}")
    network = _pairs().students.get(student, Changes())
    alone = {"model": student, "method": "alone", "training": network.training}
    students = {"alone": alone, **{key: _student(key, pair) for key in (BASELINE, name)}}
    tree = {
        "name": f"cifar100-{name}-{pair}",
        "description": _description(recipe, teacher, student),
        "baseline": "alone" if name == BASELINE else f"standard-{BASELINE}",
        "teachers": {"standard": {"model": teacher, "method": "standard"}},
        "students": {key: {k: v for k, v in settings.items() if v} for key, settings in students.items()},
        **_pairs().study,
    }
    return {key: tree[key] for key in StudyConfig.model_fields if key in tree}


def _student(name: str, pair: str) -> dict[str, Any]:
    """Return a student by a method: its own settings, those for all pairs, the network's and the pair's, in turn."""
    recipe, method, network = method_recipe(name), method_named(name), _pairs().networks(pair)[1]
    terms: TermSettings = {key: dict(settings) for key, settings in method.terms.items()}
    training: dict[str, Any] = dict(method.training)
    layers = (recipe.student, _pairs().students.get(network, Changes()), recipe.pairs.get(pair, Changes()))
    for changes in layers:
        training = merge(training, changes.training)
        for key, settings in changes.terms.items():
            terms[key] = None if settings is None else {**(terms.get(key) or {}), **settings}
    return {"model": network, "method": name, "terms": terms, "training": training}


def _description(recipe: MethodRecipe, teacher: str, student: str) -> str:
    beside = "a student alone" if recipe.method == BASELINE else "knowledge distillation and a student alone"
    unchecked = f" Not checked: {recipe.unchecked}." if recipe.unchecked else ""
    return (
        f"{recipe.method} with its published settings on CIFAR-100, {teacher} -> {student}, beside {beside}. "
        f"Settings: {recipe.source}. Published numbers: {recipe.protocol}.{unchecked} Made for a GPU."
    )


@cache
def _pairs() -> Pairs:
    return parse(Pairs, _read_packaged("pairs/cifar100"), source="pairs cifar100")


def _read_packaged(path: str) -> dict[str, Any]:
    return read_tree((_FOLDER / f"{path}.yaml").read_text(encoding="utf-8"), f"recipe {path}")
