"""Published numbers beside a run's own, where data, networks and methods are the same."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from soteacher.errors import InputError
from soteacher.objectives import method, objective_config
from soteacher.published_settings import method_recipe_names, pair_names, published_student
from soteacher.reference import Published, gap_best_last, matching, network_name
from soteacher.report.record import ROLES, Role, RunRecord
from soteacher.report.tables import Table, interval, percent
from soteacher.settings import parse
from soteacher.statistics import mean_interval


@dataclass(frozen=True, slots=True, kw_only=True)
class PublishedNumbers:
    """What others have published for the arms of a run."""

    table: Table
    """A line for each arm and each number published for it."""
    notes: tuple[str, ...]
    """Sentences on what the two do not have in common."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Arm:
    """An arm, and what was published for it."""

    name: str
    rows: tuple[Mapping[str, Any], ...]
    """Its networks' rows of the results, one for each seed."""
    published: tuple[Published, ...]
    teacher_from_file: bool
    """Whether it learnt from a file, which does not say how the teacher was trained."""


def published_numbers(record: RunRecord) -> PublishedNumbers | None:
    """Return the published numbers for a run's arms; None where there are none.

    An arm has some only where its configuration is known and its terms are the method's own, or those published for its
    pair of networks: it did not start from published weights, is no earlier state of another network, and neither it
    nor its teacher saw a part of the data only. A teacher from a file counts as a standard one, and a note says so.
    """
    data = record.config.get("data") or {}
    if any(data.get(key) is not None for key in ("train_examples", "test_examples")):
        return None
    arms = [arm for role in ROLES for arm in _arms(record, role) if arm.published]
    if not arms:
        return None
    table = Table(
        columns=(
            *("arm", "ours, last epoch, % [95 % interval]", "our epochs"),
            *("published, %", "its epochs", "epoch reported", "source"),
        ),
        rows=tuple(line for arm in arms for line in _lines(arm)),
        numeric=(False, *[True] * 4, False, False),
    )
    return PublishedNumbers(table=table, notes=tuple(_notes(arms)))


def _arms(record: RunRecord, role: Role) -> Iterator[_Arm]:
    """Yield the arms of one role that have a finished network, each with what was published for it."""
    for name, networks in record.of_role(role).items():
        rows = tuple(network.row for network in networks if network.row)
        if rows:
            teacher_arm = rows[0]["teacher_arm"]
            yield _Arm(
                name=f"{role} {name}",
                rows=rows,
                published=_of_teacher(record, rows[0]) if role == "teacher" else _of_student(record, rows[0]),
                teacher_from_file=teacher_arm is not None and "file" in _settings(record, "teachers", teacher_arm),
            )


def _settings(record: RunRecord, section: str, name: str) -> Mapping[str, Any]:
    """Return the configuration of a teacher or student; an empty one where it is not known."""
    return (record.config.get(section) or {}).get(name) or {}


def _as_its_method(settings: Mapping[str, Any], name: str, pair: tuple[str, str] | None = None) -> bool:
    """Return whether a network was trained from random weights with the terms of its method, or those published.

    Args:
        settings: its configuration.
        name: the method.
        pair: the networks of its teacher and its own, where it has a teacher.
    """
    if "model" not in settings or settings.get("pretrained") or "file" in settings:
        return False
    if not settings.get("terms"):
        return True
    try:
        own = _terms(name, settings["terms"])
        wanted = [_terms(name, {})]
        if pair is not None and "-".join(map(network_name, pair)) in pair_names() and name in method_recipe_names():
            published = published_student(name, "-".join(map(network_name, pair)))
            wanted.append(_terms(name, published["terms"]))
    except InputError:  # of a plug-in that is not there any more, or a version that had other settings
        return False
    return own in wanted


def _terms(method_name: str, changes: Mapping[str, Mapping[str, Any] | None]) -> dict[str, dict[str, Any]]:
    """Return the settings of all terms of a method with changes laid over them, defaults included."""
    merged: dict[str, Any] = {name: dict(settings) for name, settings in method(method_name).terms.items()}
    for name, settings in changes.items():
        merged[name] = None if settings is None else {**(merged.get(name) or {}), **settings}
    return {
        name: parse(objective_config(name), settings).model_dump()
        for name, settings in merged.items()
        if settings is not None
    }


def _of_teacher(record: RunRecord, row: Mapping[str, Any]) -> tuple[Published, ...]:
    """Return what was published for a teacher, told from its row."""
    if not _as_its_method(_settings(record, "teachers", row["arm"]), row["method"]):
        return ()
    return matching(data=row["data"], teacher=row["model"], student=None, method=row["method"])


def _of_student(record: RunRecord, row: Mapping[str, Any]) -> tuple[Published, ...]:
    """Return what was published for a student, told from its row and its teacher's."""
    teacher_arm = row["teacher_arm"]
    name = row["arm"] if teacher_arm is None else row["arm"].removeprefix(f"{teacher_arm}-")
    own = _settings(record, "students", name)
    if teacher_arm is None:
        if not _as_its_method(own, row["method"]):
            return ()
        return matching(data=row["data"], teacher=None, student=row["model"], method=row["method"])
    teachers = [network.row for network in record.of_role("teacher").get(teacher_arm, []) if network.row]
    settings = _settings(record, "teachers", teacher_arm)
    if not teachers or not (_as_its_method(settings, teachers[0]["method"]) or "file" in settings):
        return ()
    if not _as_its_method(own, row["method"], (teachers[0]["model"], row["model"])):
        return ()
    return matching(
        data=row["data"],
        teacher=teachers[0]["model"],
        student=row["model"],
        method=row["method"],
        teacher_method="standard" if "file" in settings else teachers[0]["method"],
    )


def _lines(arm: _Arm) -> Iterator[tuple[str, ...]]:
    """Yield a line of text for each number that was published for an arm."""
    mean, ends = mean_interval([row["accuracy_last"] for row in arm.rows])
    for number in arm.published:
        note = f" ({number.note})" if number.note else ""
        yield (
            arm.name,
            percent(mean) + interval(ends),
            str(_epochs(arm)),
            percent(number.accuracy) + (f" \u00b1 {percent(number.std)}" if number.std is not None else ""),
            "-" if number.epochs is None else str(number.epochs),
            number.epoch_reported,
            f"{number.source}: {number.published_as}{note}",
        )


def _epochs(arm: _Arm) -> int:
    """Return how long an arm's networks were trained, the same for all of them."""
    return arm.rows[0]["epochs"]


def _notes(arms: Sequence[_Arm]) -> Iterator[str]:
    """Yield what keeps the numbers from being comparable one to one."""
    yield (
        "Data, networks and method are the same. Settings can differ, and so can teachers of one name; both move these "
        "numbers. They are no baseline, and no verdict is drawn from them."
    )
    gap = gap_best_last()
    yield (
        "Ours are of the last epoch. Numbers of the best epoch on the test images are higher by what picking it gains: "
        f"in {gap.num_logs} released training logs {percent(gap.mean)} points on average, and up to "
        f"{percent(gap.highest)}. Unknown means that the source does not say which epoch it reports."
    )
    others = [f"{arm.name} ({_epochs(arm)}, published {theirs})" for arm in arms if (theirs := _other_epochs(arm))]
    if others:
        yield f"Not comparable, because trained for another number of epochs: {', '.join(others)}."
    from_file = [arm.name for arm in arms if arm.teacher_from_file]
    if from_file:
        yield f"Their teacher is from a file, the published ones were trained as standard ones: {', '.join(from_file)}."
    if any(number.std is not None for arm in arms for number in arm.published):
        yield "After \u00b1 stands the standard deviation over the source's runs, which is no interval of its mean."


def _other_epochs(arm: _Arm) -> str:
    """Return the known epochs of the published numbers that are not those of an arm's networks; nothing without any."""
    known = {number.epochs for number in arm.published if number.epochs is not None}
    return " and ".join(map(str, sorted(known - {_epochs(arm)})))
