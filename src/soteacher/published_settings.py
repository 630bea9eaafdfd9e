"""Published settings of the distillation methods, by the standard pairs of networks: data inside the package.

``recipes/methods/NAME.yaml`` holds those of a method for every pair of ``recipes/pairs/cifar100.yaml``, which also says
what all studies on these pairs share.
"""

from __future__ import annotations

from functools import cache
from importlib.resources import files
from typing import Any

from soteacher.errors import unknown_name
from soteacher.objectives import method as method_named
from soteacher.settings import Settings, merge, parse, read_tree

_FOLDER = files("soteacher") / "recipes"


class Changes(Settings):
    """What is laid over a student's settings."""

    terms: dict[str, dict[str, Any] | None] = {}
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


def method_recipe_names() -> tuple[str, ...]:
    """Return the names of the methods whose published settings are inside the package."""
    names = (path.name for path in _FOLDER.joinpath("methods").iterdir())
    return tuple(sorted(name.removesuffix(".yaml") for name in names if name.endswith(".yaml")))


def pair_names() -> tuple[str, ...]:
    """Return the standard pairs, ``TEACHER-STUDENT`` each."""
    return tuple(f"{teacher}-{student}" for teacher, student in standard_pairs().pairs)


def method_recipe(name: str) -> MethodRecipe:
    """Return a method's published settings.

    Raises:
        InputError: there is no recipe of that method.
    """
    if name not in method_recipe_names():
        raise unknown_name("recipe", name, method_recipe_names())
    return parse(MethodRecipe, _read(f"methods/{name}"), source=f"recipe {name}")


def published_student(name: str, pair: str) -> dict[str, Any]:
    """Return the settings of a student by a method on a pair, all its terms spelt out.

    They are the method's own, those for all pairs, the network's and the pair's, laid over one another in turn.

    Args:
        name: the method.
        pair: as :func:`pair_names` gives it.

    Raises:
        InputError: there is no such recipe, method or pair.
    """
    recipe, method, network = method_recipe(name), method_named(name), standard_pairs().networks(pair)[1]
    terms: dict[str, dict[str, Any] | None] = {key: dict(settings) for key, settings in method.terms.items()}
    training: dict[str, Any] = dict(method.training)
    layers = (recipe.student, standard_pairs().students.get(network, Changes()), recipe.pairs.get(pair, Changes()))
    for changes in layers:
        training = merge(training, changes.training)
        for key, settings in changes.terms.items():
            terms[key] = None if settings is None else {**(terms.get(key) or {}), **settings}
    return {"model": network, "method": name, "terms": terms, "training": training}


@cache
def standard_pairs() -> Pairs:
    """Return the standard pairs and what the studies on them share."""
    return parse(Pairs, _read("pairs/cifar100"), source="pairs cifar100")


def _read(path: str) -> dict[str, Any]:
    return read_tree((_FOLDER / f"{path}.yaml").read_text(encoding="utf-8"), f"recipe {path}")
