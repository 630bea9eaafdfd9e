"""The page ``report.html``: one file that shows a whole run, without network access or scripts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from soteacher.files import write_text
from soteacher.report.cards import card_table, carded_teachers, same_network_notes, teacher_kinds
from soteacher.report.charts import Chart, accuracy_chart, cost_chart, learning_curves, reliability_chart
from soteacher.report.correlation_charts import MAX_STUDENTS, MAX_STUDENTS_IN_FULL, other_panels, student_panels
from soteacher.report.correlations import (
    TaughtStudent,
    correlation_notes,
    correlation_table,
    taught_students,
    too_few_arms,
)
from soteacher.report.facts import run_facts, setting_words
from soteacher.report.published import published_numbers
from soteacher.report.record import RunRecord, read_run
from soteacher.report.tables import cost_table, network_table, summary_sentence, summary_table, teacher_table


def evaluated_on(record: RunRecord) -> list[tuple[str, str]]:
    """Return how many images the networks were judged on, as label and text, from the first that tells."""
    for network in record.networks:
        sizes = {split: sum(part["count"] for part in bins) for split, bins in network.reliability.items()}
        if sizes:
            return [("Evaluated on", " and ".join(f"{size:,} {split} images" for split, size in sizes.items()))]
    return []


def provenance(record: RunRecord) -> str:
    """Return one line that says when, with which version and where the results were made."""
    results = record.results
    parts = [f"Results of {record.results_time:%Y-%m-%d %H:%M} UTC"] if record.results_time else []
    if version := results.get("soteacher_version"):
        parts.append(f"soteacher {version}")
    parts += [
        setting_words(key, value) for key, value in (results.get("environment") or {}).items() if value is not None
    ]
    return "; ".join(parts)


def _curves(record: RunRecord) -> dict[str, list[Chart]]:
    """Return each role's chart of learning curves, in a list that is empty if no network of the role has any."""
    charts: dict[str, list[Chart]] = {"teacher": [], "student": []}
    for role in ("teacher", "student"):
        arms = {
            arm: [network for network in networks if network.epochs]
            for arm, networks in record.of_role(role).items()
            if any(network.epochs for network in networks)
        }
        if arms:
            charts[role].append(learning_curves(role, arms))
    return charts


def _judged_teachers(record: RunRecord) -> dict[str, Any] | None:
    """Return what the template names of the teachers' cards; None where no teacher has one."""
    teachers = carded_teachers(record)
    if not teachers:
        return None
    students = taught_students(record, teachers)
    shown = [student for student in students if student.correlations]
    kinds = teacher_kinds(teachers)
    notes = correlation_notes(shown) if shown else []
    if len(shown) > MAX_STUDENTS_IN_FULL:
        notes.append(
            f"Charts of the other figures are of the first {MAX_STUDENTS_IN_FULL} of {len(shown)} students; the table "
            "has all."
        )
    if len(shown) > MAX_STUDENTS:
        notes.append(f"Charts are of the first {MAX_STUDENTS} of {len(shown)} students; the table has all.")
    return {
        "table": card_table(teachers),
        "same": same_network_notes(kinds),
        "too_few": too_few_arms(students),
        "students": [_charted(place, student, list(kinds)) for place, student in enumerate(shown[:MAX_STUDENTS])],
        "correlations": correlation_table(shown),
        "notes": notes,
    }


def _charted(place: int, student: TaughtStudent, kinds: Sequence[str]) -> dict[str, Any]:
    """Return what the template names of one student beside its teachers' cards."""
    return {
        "name": student.name,
        "charts": student_panels(place, student, kinds),
        "others": other_panels(student, kinds) if place < MAX_STUDENTS_IN_FULL else [],
    }


def _context(record: RunRecord) -> dict[str, Any]:
    """Return everything that the template names."""
    results, config = record.results, record.config
    rows, summary = results.get("rows", []), results.get("summary", [])
    timed = any(row.get("train_seconds") is not None for row in rows)
    earlier = [arm for arm, settings in (config.get("teachers") or {}).items() if "from" in (settings or {})]
    baselines = {entry["baseline"] for entry in summary}
    curves = _curves(record)
    reliable = {arm: group for arm, group in record.of_role("teacher").items() if any(one.reliability for one in group)}
    return {
        "title": results.get("recipe") or config.get("name") or "run",
        "description": config.get("description"),
        "provenance": provenance(record),
        "finished": record.finished,
        "num_done": len(rows),
        "compared": [
            {"reason": summary_sentence(entry).removesuffix(entry["verdict"]), "verdict": entry["verdict"]}
            for entry in summary
            if entry["baseline"] is not None
        ],
        "uncompared": [
            summary_sentence(entry) + (" (baseline)" if entry["arm"] in baselines else "")
            for entry in summary
            if entry["baseline"] is None
        ],
        "facts": [*run_facts(config), *evaluated_on(record)],
        "summary": summary_table(results),
        "student_charts": [*([accuracy_chart(summary, rows)] if summary else []), *curves["student"]],
        "teachers": teacher_table(record),
        "teacher_charts": curves["teacher"],
        "reliability_charts": [reliability_chart(place, arm, reliable[arm]) for place, arm in enumerate(reliable)],
        "judged": _judged_teachers(record),
        "published": published_numbers(record),
        "costs": cost_table(results),
        "cost_charts": [cost_chart(rows, earlier_states=earlier)] if timed else [],
        "networks": network_table(record),
    }


def write_report(run_folder: Path) -> Path:
    """Write ``report.html`` into a run's folder and return its path.

    The page is made from the files in the folder alone and is the same, byte for byte, whenever they are. A run that is
    not finished gives a page of what is there.

    Raises:
        InputError: the folder holds no run, or a file in it cannot be read.
    """
    return render("page.html", _context(read_run(run_folder)), run_folder / "report.html")


def render(template: str, context: Mapping[str, Any], path: Path) -> Path:
    """Write a page and return its path.

    Args:
        template: a file beside this one.
        context: everything that it names but ``style``, the pages' style sheet.
        path: of the page.
    """
    from jinja2 import Environment, FunctionLoader, StrictUndefined  # imported here, as matplotlib is

    environment = Environment(
        loader=FunctionLoader(_package_text),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    text = environment.get_template(template).render(style=_package_text("page.css"), **context)
    write_text(path, text.lstrip())
    return path


def _package_text(name: str) -> str:
    """Return a text file that lies beside this one in the package."""
    return resources.files("soteacher.report").joinpath(name).read_text(encoding="utf-8")
