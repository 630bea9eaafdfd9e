"""A series at work: every point is an ordinary run in ``RUN/points/NAME``, and the whole has results and a page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

import soteacher
from soteacher.config import StudyConfig, differences
from soteacher.errors import InputError
from soteacher.files import read_json, write_json, write_text
from soteacher.jobs import NetworkFactory, OnEvent, jobs_of
from soteacher.report.cards import flat_figures
from soteacher.report.series_page import write_series_report
from soteacher.run_folder import CONFIG, STATE, locked, network_folder, read_config
from soteacher.series.config import SeriesConfig, SeriesPoint
from soteacher.settings import parse, read_tree
from soteacher.studies import pick_device, run_study
from soteacher.studies import report_again as report_study_again
from soteacher.study_checks import check_names

SCHEMA = 1
SERIES = "series.yaml"


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
    """Find misspelt networks and missing packages of all points before the first is trained."""
    for point in points:
        try:
            check_names(point.study, factories)
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
        rows.append({**row, "card": flat_figures(read_json(card))} if card.exists() else row)
    return {
        "name": point.name, "folder": f"points/{point.name}", "on": point.on, "environment": results["environment"],
        "rows": rows, "summary": results["summary"],
    }  # fmt: skip
