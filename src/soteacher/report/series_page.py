"""The page of a series of studies: a chart of every figure along every axis, paired differences, rank correlations.

It is made from the series' ``results.json`` and ``series.yaml`` alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import yaml

from soteacher.errors import InputError
from soteacher.files import read_json
from soteacher.report.charts import Chart
from soteacher.report.correlations import MIN_DECISIVE_PAIRS
from soteacher.report.facts import run_facts
from soteacher.report.page import provenance, render
from soteacher.report.record import RunRecord
from soteacher.report.series_charts import axis_chart
from soteacher.report.series_figures import QUANTITIES, Results, along, closeness, reference_teacher
from soteacher.report.series_tables import (
    correlation_sentences,
    difference_table,
    tally_table,
    trend_table,
    within_points_table,
)
from soteacher.statistics import MIN_CORRELATED_PAIRS


def _sections(results: Results, vary: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield what the page shows of each axis that has points."""
    index = 0
    for axis in results["axes"]:
        if not along(results, axis):
            continue
        label = vary.get(axis, {}).get("label") or axis.replace("_", " ")
        charts: list[Chart] = []
        for quantity in QUANTITIES:
            chart = axis_chart(results, axis, quantity, label=label, index=index)
            index += 1
            charts += [chart] if chart else []
        yield {
            "title": label, "reading": vary.get(axis, {}).get("reading", ""), "charts": charts,
            "trend": trend_table(results, axis), "differences": difference_table(results, axis),
        }  # fmt: skip


def write_series_report(folder: Path) -> Path:
    """Write ``report.html`` into a series' folder and return its path.

    Raises:
        InputError: the folder holds no series, or a file in it cannot be read.
    """
    config, results, time = _read(folder)
    first = results["points"][0] if results["points"] else {}
    record = RunRecord(config=config, results={**first, **results}, results_time=time, networks=())
    context = {
        "title": results["recipe"],
        "description": config.get("description"),
        "provenance": provenance(record),
        "num_points": results["num_points"],
        "num_done": len(results["points"]),
        "points": [(point["name"], f"{point['folder']}/report.html") for point in results["points"]],
        "facts": run_facts(config.get("study") or {}),
        "correlations": correlation_sentences(results),
        "min_correlated": MIN_CORRELATED_PAIRS,
        "min_decisive": MIN_DECISIVE_PAIRS,
        "within_points": within_points_table(results),
        "tally": tally_table(results),
        "reference": reference_teacher(results),
        "closeness": closeness(results).unit,
        "sections": list(_sections(results, config.get("vary") or {})),
    }
    return render("series_page.html", context, folder / "report.html")


def _read(folder: Path) -> tuple[dict[str, Any], dict[str, Any], datetime]:
    """Return the settings of a series, its results, and when they were written."""
    settings, path = folder / "series.yaml", folder / "results.json"
    try:
        config, results = yaml.safe_load(settings.read_text(encoding="utf-8")), read_json(path)
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise InputError(f"{folder} holds no series that can be read: {' '.join(str(error).split())}") from error
    if not isinstance(results, dict) or results.get("kind") != "series" or results.get("schema") != 1:
        raise InputError(f"{path} holds no results of a series of schema 1")
    return config, results, datetime.fromtimestamp(path.stat().st_mtime, timezone.utc)
