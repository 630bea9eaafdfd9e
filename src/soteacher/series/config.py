"""The settings of a series: a base study, the axes along which it is varied, and the studies that come of them."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, cast

from pydantic import Field, field_validator, model_validator

from soteacher.config import StudyConfig
from soteacher.errors import InputError, unknown_name
from soteacher.recipes import is_series, read_source
from soteacher.settings import Settings, apply_settings, parse, shortened

BASE = "base"
"""Name of the point at which nothing is varied."""

AxisName = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9_]*$")]
Label = str | bool | int | float | None
"""How a value of an axis is called: the value itself, or its key in a table of values."""


class Axis(Settings):
    """One thing that is varied, alone."""

    path: str | None = None
    """The setting of the study that takes the values, such as ``data.noise``. ``*`` stands for every entry in which the
    rest of the path is written: ``teachers.*.model`` is the network of each teacher that is trained. Without a path
    every value is a table of paths and what each is set to."""
    values: Any
    """The values, in the order of the page: a list, or a table ``label: value`` that gives each a short name."""
    label: str = ""
    """What the axis is called on the page; where it is empty, the axis' name."""
    reading: str = ""
    """What is to be expected along the axis, in a sentence or two; it is shown and decides nothing."""

    @field_validator("values")
    @classmethod
    def _named_values(cls, values: Any) -> Any:
        if not isinstance(values, (list, Mapping)):
            raise InputError(f"wanted a list or a table label: value, got {shortened(values)}")
        labels = list(cast("Iterable[Any]", values))
        if not labels:
            raise InputError("wanted at least one value, got none")
        for place, label in enumerate(labels):
            if not isinstance(label, (str, bool, int, float, type(None))) or not _is_word(word(label)):
                raise InputError(
                    f"{shortened(label)} cannot name a folder: wanted a table label: value, each label of letters, "
                    "digits and . _ -"
                )
            if word(label).casefold() in (word(other).casefold() for other in labels[:place]):
                raise InputError(f"the value {word(label)} stands twice")
        return values

    def labels(self) -> list[Label]:
        """Return how the values are called, in their order."""
        return list(cast("Iterable[Label]", self.values))

    def settings(self) -> Iterator[tuple[Label, Mapping[str, Any]]]:
        """Yield each value's label, and the paths that it sets with what each is set to.

        Raises:
            InputError: there is no path, and a value is no table of paths.
        """
        table: Any = self.values if isinstance(self.values, Mapping) else None
        for label in self.labels():
            value = label if table is None else table[label]
            if self.path is not None:
                yield label, {self.path: value}
            elif isinstance(value, Mapping) and value:
                yield label, cast("Mapping[str, Any]", value)
            else:
                raise InputError(f"value {word(label)}: without a path it is a table of paths, got {shortened(value)}")


def word(label: Label) -> str:
    """Return a label as YAML writes it, which is how a folder is named."""
    if label is None:
        return "null"
    return str(label).lower() if isinstance(label, bool) else str(label)


def _is_word(text: str) -> bool:
    return re.fullmatch(r"[A-Za-z0-9_.-]+", text) is not None


@dataclass(frozen=True, slots=True)
class SeriesPoint:
    """One study of a series."""

    name: str
    """Its folder's name: ``base``, or ``AXIS-VALUE``."""
    on: dict[str, Label]
    """The axes that it lies on, with its value on each."""
    study: StudyConfig


class SeriesConfig(Settings):
    """A series: a base study, and what is varied around it, one thing at a time."""

    name: str = Field(default="series", pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$")
    """The series' name; shown, never parsed."""
    description: str = ""
    """What it is for, in a sentence or two."""
    vary: dict[AxisName, Axis] = Field(min_length=1)
    """The axes by name. A value that makes the base itself is trained once for all axes."""
    study: dict[str, Any]
    """The base: a whole study, without a name of its own."""

    @model_validator(mode="after")
    def _every_point_is_a_study(self) -> SeriesConfig:
        if "name" in self.study:
            raise InputError(f"study.name: the points of a series are named after it, got {self.study['name']!r}")
        self.points()
        return self

    def points(self) -> tuple[SeriesPoint, ...]:
        """Return the studies, each once: the base first, where it lies on an axis, then axis by axis.

        Raises:
            InputError: a value makes no valid study, or the same as another of its axis; axis and value are named.
        """
        points = [SeriesPoint(BASE, {}, self._study(self.study, BASE, "study"))]
        for name, axis in self.vary.items():
            try:
                for label, settings in axis.settings():
                    self._add(points, name, label, settings)
            except InputError as error:
                raise InputError(f"axis {name}, {error}") from None
        return tuple(point for point in points if point.on)

    def _add(self, points: list[SeriesPoint], axis: str, label: Label, settings: Mapping[str, Any]) -> None:
        """Add the point of a value, or put the axis down at the point that is the same study."""
        value, name = f"value {word(label)}", f"{axis}-{word(label)}"
        tree = copy.deepcopy(self.study)
        for path, setting in settings.items():
            _lay_over(tree, str(path), setting, value)
        study = self._study(tree, name, value)
        same = next((point for point in points if _same_study(point.study, study)), None)
        if same is None:
            points.append(SeriesPoint(name, {axis: label}, study))
        elif axis in same.on:
            raise InputError(f"{value}: the same study as value {word(same.on[axis])}")
        else:
            same.on[axis] = label

    def _study(self, tree: Mapping[str, Any], name: str, place: str) -> StudyConfig:
        about = {"name": f"{self.name}-{name}", "description": f"The point {name} of the series {self.name}."}
        return parse(StudyConfig, {**about, **tree}, source=place)


def _same_study(one: StudyConfig, other: StudyConfig) -> bool:
    """Return whether two points differ in their names only."""
    return one == other.model_copy(update={"name": one.name, "description": one.description})


def _lay_over(tree: dict[str, Any], path: str, value: Any, place: str) -> None:
    """Set what a path of an axis names in a study's tree."""
    parts = path.split(".")
    if not all(parts) or parts[-1] == "*":
        raise InputError(f"{place}: {path!r} is no path to a setting, such as data.train_examples or teachers.*.model")
    tables = _tables(tree, parts, f"{place}: {path}")
    if not tables:
        raise InputError(f"{place}: {path} stands nowhere in the study")
    for table in tables:
        table[parts[-1]] = copy.deepcopy(value)


def _tables(table: dict[str, Any], parts: Sequence[str], place: str, *, top: bool = True) -> list[dict[str, Any]]:
    """Return the tables that hold the last part of a path; those on the way to a single one are made."""
    first, *rest = parts
    if not rest:
        return [table]
    if first == "*":
        inner = [entry for entry in table.values() if isinstance(entry, dict) and _has(entry, rest)]
        return [found for entry in inner for found in _tables(entry, rest, place, top=False)]
    if top and first in ("teachers", "students") and rest[0] not in ("*", *(table.get(first) or {})):
        raise InputError(f"{place}: {unknown_name(first.removesuffix('s'), rest[0], table.get(first) or {})}")
    below = table.setdefault(first, {})
    if not isinstance(below, dict):
        raise InputError(f"{place}: {first} is no table but {shortened(below)}")
    return _tables(below, rest, place, top=False)


def _has(table: Mapping[str, Any], parts: Sequence[str]) -> bool:
    """Return whether a path is written out in a table; the wildcard is met by any entry."""
    first, *rest = parts
    found = [table[key] for key in (table if first == "*" else [first]) if key in table]
    return any(not rest or (isinstance(one, Mapping) and _has(cast("Any", one), rest)) for one in found)


def read_plan(
    source: str | Path | dict[str, Any], settings: Iterable[str] = (), pair: str | None = None
) -> StudyConfig | SeriesConfig:
    """Return the study or the series of a recipe, a YAML file or a tree of settings.

    Args:
        source: as in :func:`soteacher.recipes.read_study`.
        settings: ``path.to.field=value``, laid over it; the base study of a series is below ``study``.
        pair: teacher and student, where the recipe is a method's.

    Raises:
        InputError: no such recipe, pair or file, or settings that cannot be used.
    """
    tree, origin = read_source(source, pair)
    tree = apply_settings(tree, settings)
    return parse(SeriesConfig if is_series(tree) else StudyConfig, tree, source=origin)
