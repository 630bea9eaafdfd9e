"""What a run left in its folder, read back."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, Literal

import yaml

from soteacher.errors import InputError
from soteacher.statistics import summarise

Role = Literal["teacher", "student"]
ROLES: tuple[Role, ...] = ("teacher", "student")


@dataclass(frozen=True, slots=True, kw_only=True)
class NetworkRecord:
    """One trained network, or one in training."""

    role: Role
    arm: str
    seed: int
    row: dict[str, Any] | None
    """Its row of the results; None while it trains."""
    epochs: tuple[dict[str, Any], ...]
    """The lines of ``metrics.jsonl``, in order; empty without that file."""
    reliability: dict[str, list[dict[str, Any]]]
    """Reliability bins by split (``test``, ``train``); empty where none were written."""
    card: dict[str, Any] = field(default_factory=dict)
    """``card.json``, what the network is as a teacher; empty without that file."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RunRecord:
    """A run's folder."""

    config: dict[str, Any]
    """``config.yaml``; empty without that file."""
    results: dict[str, Any]
    """``results.json``; without that file, the rows of the networks that are done, compared with nothing."""
    results_time: datetime | None
    """When the results were written, UTC; None where they were not."""
    networks: tuple[NetworkRecord, ...]
    """In the order of the results' rows; those that have none come last."""

    @property
    def finished(self) -> bool:
        """Whether ``results.json`` is there and has a row for every network that the configuration asks for."""
        done = {(row["role"], row["arm"], row["seed"]) for row in self.results.get("rows", [])}
        teachers, students = self.config.get("teachers") or {}, self.config.get("students") or {}
        arms: set[tuple[str, str]] = {("teacher", name) for name in teachers}
        for name, settings in students.items():
            # A student's arm bears its own name where it learns from no teacher; its method says so, its row shows it.
            chosen = (settings or {}).get("teachers") or teachers
            alone = any(role == "student" and arm == name for role, arm, _ in done)
            arms |= {("student", name)} if alone or not chosen else {("student", f"{one}-{name}") for one in chosen}
        given = {("teacher", name) for name, settings in teachers.items() if "file" in (settings or {})}
        seeds = self.config.get("seeds") or []
        wanted = {(*arm, seed) for arm in arms for seed in ([0] if arm in given else seeds)}
        return self.results_time is not None and wanted <= done

    def of_role(self, role: Role) -> dict[str, list[NetworkRecord]]:
        """Return the networks of one role by arm, arms in the order of their first network."""
        arms: dict[str, list[NetworkRecord]] = {}
        for network in self.networks:
            if network.role == role:
                arms.setdefault(network.arm, []).append(network)
        return arms


def read_mapping(path: Path) -> dict[str, Any]:
    """Return the mapping that a JSON or YAML file of ours holds; an empty one without the file.

    Raises:
        InputError: the file cannot be read, holds no mapping, or is of another schema.
    """
    if not path.is_file():
        return {}
    try:
        text = path.read_text(encoding="utf-8")
        value = json.loads(text) if path.suffix == ".json" else yaml.safe_load(text)
    except (ValueError, yaml.YAMLError) as error:
        raise InputError(f"{path} cannot be read: {' '.join(str(error).split())}") from error
    if not isinstance(value, dict):
        raise InputError(f"{path} holds a {type(value).__name__}; wanted a mapping")
    if value.get("schema", 1) != 1:
        raise InputError(f"{path} has schema {value['schema']}; this version reads schema 1")
    return value


def _read_epochs(path: Path) -> tuple[dict[str, Any], ...]:
    """Return the lines of ``metrics.jsonl``. A last line that was cut off by a killed run is left out."""
    if not path.is_file():
        return ()
    lines = path.read_text(encoding="utf-8").split("\n")[:-1]
    epochs: list[dict[str, Any]] = []
    for number, line in enumerate(lines, start=1):
        try:
            epochs.append(json.loads(line))
        except ValueError as error:
            raise InputError(f"{path}, line {number} is not JSON: {error}") from error
    return tuple(epochs)


def _network_folders(run_folder: Path) -> list[tuple[Role, str, int]]:
    """Return role, arm and seed of every network's folder, sorted."""
    found: list[tuple[Role, str, int]] = []
    for role in ROLES:
        for folder in run_folder.glob(f"{role}s/*/seed*"):
            if folder.is_dir() and (match := re.fullmatch(r"seed(\d+)", folder.name)):
                found.append((role, folder.parent.name, int(match[1])))
    return sorted(found)


def read_run(run_folder: Path) -> RunRecord:
    """Return what a run's folder holds. A run that is unfinished, or was killed, gives what is there.

    Raises:
        InputError: the folder holds no run, or a file in it cannot be read.
    """
    config, results = read_mapping(run_folder / "config.yaml"), read_mapping(run_folder / "results.json")
    if not config and not results:
        raise InputError(f"{run_folder} is not a run's folder: it has neither config.yaml nor results.json")
    rows = {(row["role"], row["arm"], row["seed"]): row for row in results.get("rows", [])}
    networks: list[NetworkRecord] = []
    for role, arm, seed in dict.fromkeys([*rows, *_network_folders(run_folder)]):
        folder = run_folder / f"{role}s" / arm / f"seed{seed}"
        model = read_mapping(folder / "model.json")
        networks.append(
            NetworkRecord(
                role=role,
                arm=arm,
                seed=seed,
                row=rows.get((role, arm, seed)) or model.get("row"),
                epochs=_read_epochs(folder / "metrics.jsonl"),
                reliability=model.get("reliability") or {},
                card=read_mapping(folder / "card.json"),
            )
        )
    time = datetime.fromtimestamp((run_folder / "results.json").stat().st_mtime, timezone.utc) if results else None
    if not results:
        done = [network.row for network in networks if network.row]
        results = {"recipe": config.get("name"), "rows": done, "summary": summarise(done, {})}
    return RunRecord(config=config, results=results, results_time=time, networks=tuple(networks))
