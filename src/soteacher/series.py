"""A series of studies: one thing of a study is varied at a time, each alone around a common base.

:func:`run_series` is the way through; every point of a series is an ordinary run in ``RUN/points/NAME``.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, cast

import yaml
from pydantic import Field, field_validator, model_validator

import soteacher
from soteacher.config import SavedTeacher, StudyConfig, differences
from soteacher.errors import InputError, unknown_name
from soteacher.files import read_json, write_json, write_text
from soteacher.jobs import NetworkFactory, OnEvent, jobs_of
from soteacher.models.zoo import check_network
from soteacher.recipes import is_series, read_source
from soteacher.report.series_page import write_series_report
from soteacher.run_folder import CONFIG, STATE, locked, network_folder, read_config
from soteacher.settings import Settings, apply_settings, parse, read_tree, shortened
from soteacher.studies import pick_device, run_study
from soteacher.studies import report_again as report_study_again

SCHEMA = 1
SERIES = "series.yaml"
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


def run_series(
    config: SeriesConfig,
    folder: Path,
    *,
    data_root: Path | None = None,
    device: str = "auto",
    resume: bool = False,
    workers: int | None = None,
    factories: Mapping[str, NetworkFactory] | None = None,
    on_event: OnEvent | None = None,
    on_download: Any = None,
) -> dict[str, Any]:
    """Run every point of a series that is not finished, one after the other, and write results and page of the whole.

    Args:
        config: the series.
        folder: the series' folder; made, or gone on in with ``resume``.
        data_root: as in :func:`soteacher.studies.run_study`, like the following.
        device: ``auto``, ``cpu`` or ``cuda``.
        resume: go on in a folder that holds this series; finished points are left as they are.
        workers: networks trained side by side.
        factories: networks of the caller's own by name.
        on_event: told of every network's progress; each event holds the ``point`` and its ``place`` in the series.
        on_download: told of a download's progress.

    Returns:
        What ``results.json`` holds.

    Raises:
        InputError: something in the settings, the data or the folder cannot be used; the point is named.
        InterruptedRunError: Ctrl-C or SIGTERM; every network's state is saved.
        WorkerDiedError: a worker process was killed.
    """
    points, device = config.points(), pick_device(device)
    _check_names(points, factories or {})
    with locked(folder):
        _claim(folder, config, resume=resume)
        for number, point in enumerate(points, start=1):
            if _is_finished(folder / "points" / point.name, point.study):
                continue
            place = {"point": point.name, "place": f"{number} of {len(points)}"}
            try:
                run_study(
                    point.study, folder / "points" / point.name, data_root=data_root, device=device, resume=True,
                    workers=workers, factories=factories, on_download=on_download,
                    on_event=on_event and (lambda job, event, place=place: on_event(job, {**event, **place})),
                )  # fmt: skip
            except InputError as error:
                raise InputError(f"point {point.name}: {error}") from error
        return _write_results(folder, config)


def report_again(folder: Path) -> dict[str, Any]:
    """Write results and page of a run or a series anew from the networks that are finished; a series' points as well.

    Raises:
        InputError: the folder holds neither.
    """
    if not (folder / SERIES).exists():
        return report_study_again(folder)
    config = _read_series(folder)
    for point in config.points():
        if (folder / "points" / point.name / STATE).exists():
            report_study_again(folder / "points" / point.name)
    return _write_results(folder, config)


def _check_names(points: Sequence[SeriesPoint], factories: Mapping[str, NetworkFactory]) -> None:
    """Find misspelt networks of all points before the first is trained."""
    for point in points:
        for spec in (*point.study.teachers.values(), *point.study.students.values()):
            model = None if isinstance(spec, SavedTeacher) else spec.model
            if model is not None and model not in factories:
                try:
                    check_network(model)
                except InputError as error:
                    raise InputError(f"point {point.name}: {error}") from error


def _claim(folder: Path, config: SeriesConfig, *, resume: bool) -> None:
    """Write the series into its empty folder, or make sure that it may go on there. It may have grown."""
    if any(path.name != ".lock" and not path.name.endswith(".part") for path in folder.iterdir()):
        if not (folder / SERIES).exists():
            held = "a single run" if (folder / CONFIG).exists() else "no series"
            raise InputError(f"{folder} exists and holds {held}; choose another folder with --out")
        changed = _first_change(_read_series(folder), config)
        if changed:
            raise InputError(f"{folder} holds another series: {changed}; choose another folder with --out")
        if not resume:
            raise InputError(
                f"{folder} holds this series already; go on with --resume, or choose another folder with --out"
            )
        for path in folder.glob(".*.part"):  # a kill left them
            path.unlink(missing_ok=True)
    tree = config.model_dump(mode="json")
    write_text(folder / SERIES, yaml.safe_dump(tree, sort_keys=False, allow_unicode=True, width=120))


def _read_series(folder: Path) -> SeriesConfig:
    path = folder / SERIES
    return parse(SeriesConfig, read_tree(path.read_text(encoding="utf-8"), str(path)), source=str(path))


def _first_change(old: SeriesConfig, new: SeriesConfig) -> str | None:
    """Return what keeps a series from going on in the folder of another: a point that is gone, or is another study."""
    points = {point.name: point.study for point in new.points()}
    for point in old.points():
        if point.name not in points:
            return f"its point {point.name} is no longer wanted"
        changed = differences(point.study, points[point.name])
        if changed:
            return f"point {point.name}, {changed[0]}"
    return None


def _is_finished(folder: Path, study: StudyConfig) -> bool:
    """Return whether a point's folder holds this very study with results of all of its networks."""
    if not (folder / "results.json").exists() or read_config(folder) != study:
        return False
    done = {(row["role"], row["arm"], row["seed"]) for row in read_json(folder / "results.json")["rows"]}
    return done == {(job.role, job.arm, job.seed) for job in jobs_of(study)}


def _write_results(folder: Path, config: SeriesConfig) -> dict[str, Any]:
    """Write ``results.json`` of the points that have results, and the page made of it; return the results."""
    points = config.points()
    results = {
        "schema": SCHEMA,
        "kind": "series",
        "soteacher_version": soteacher.__version__,
        "recipe": config.name,
        "axes": {name: axis.labels() for name, axis in config.vary.items()},
        "num_points": len(points),
        "points": [_point_results(folder, point) for point in points if _results_of(folder, point).exists()],
    }
    write_json(folder / "results.json", results)
    write_series_report(folder)
    return results


def _results_of(folder: Path, point: SeriesPoint) -> Path:
    return folder / "points" / point.name / "results.json"


def _point_results(folder: Path, point: SeriesPoint) -> dict[str, Any]:
    """Return a point's part of the results: its rows, with the figures of each teacher's card, and its summary."""
    results = read_json(_results_of(folder, point))
    rows: list[dict[str, Any]] = []
    for row in results["rows"]:
        run = folder / "points" / point.name
        card = network_folder(run, row["role"], row["arm"], row["seed"]) / "card.json"
        rows.append({**row, "card": _flat_figures(read_json(card)["figures"])} if card.exists() else row)
    return {
        "name": point.name, "folder": f"points/{point.name}", "on": point.on, "environment": results["environment"],
        "rows": rows, "summary": results["summary"],
    }  # fmt: skip


def _flat_figures(figures: Mapping[str, Any], prefix: str = "") -> dict[str, float]:
    """Return the figures of a card by their paths, such as ``distance.train.mse``; those that are null are left out."""
    flat: dict[str, float] = {}
    for key, value in figures.items():
        if isinstance(value, Mapping):
            flat |= _flat_figures(cast("Mapping[str, Any]", value), f"{prefix}{key}.")
        elif value is not None:
            flat[f"{prefix}{key}"] = value
    return flat
