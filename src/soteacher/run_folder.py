"""The folder of a run: who may write in it, and where each network lies."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from soteacher.config import StudyConfig, differences, to_yaml
from soteacher.errors import InputError
from soteacher.files import read_json, write_json, write_text
from soteacher.settings import parse, read_tree
from soteacher.train.checkpoint import Checkpoint

CONFIG = "config.yaml"
STATE = "run.json"
LOG = "log.txt"
OUT_OF_FOLD = "out_of_fold"
PREDICTIONS = "predictions.npz"
LOCK_SECONDS = 10.0
"""How long another process at work in the folder is waited for."""


def network_folder(run: Path, role: str, arm: str, seed: int) -> Path:
    """Return where a network of a run lies: ``teachers/ARM/seed0`` or ``students/ARM/seed0``."""
    return run / f"{role}s" / arm / f"seed{seed}"


def read_config(run: Path) -> StudyConfig:
    """Return the study that a run folder holds.

    Raises:
        InputError: the folder holds no run, or its configuration cannot be read.
    """
    path = run / CONFIG
    try:
        text = path.read_text(encoding="utf-8")
    except OSError:
        raise InputError(f"{run} holds no run: there is no {CONFIG} in it") from None
    return parse(StudyConfig, read_tree(text, str(path)), source=str(path))


def claim(run: Path, config: StudyConfig, state: dict[str, Any], *, resume: bool) -> dict[str, Any]:
    """Write the run's settings into its empty folder, or make sure that it may go on there; return the run's state.

    Args:
        run: the folder, locked.
        config: the study.
        state: facts of this start that a resumed run must share or keep: ``data_checksum``, ``own_networks``,
            ``device``, ``threads``; and what it remembers: ``environment``, ``skipped_images``.
        resume: whether an unfinished or finished run of the same study may be there.

    Returns:
        The state written at the run's first start.

    Raises:
        InputError: the folder holds something else, another run, or this run without ``resume``.
    """
    if all(path.name == ".lock" or _is_part(path) for path in run.iterdir()):
        write_text(run / CONFIG, to_yaml(config))
        write_json(run / STATE, state)
        return state
    if not (run / CONFIG).exists():
        raise InputError(f"{run} exists and holds no run; choose another folder with --out")
    changed = differences(read_config(run), config)
    if changed:
        more = f" (and {len(changed) - 1} more)" if len(changed) > 1 else ""
        raise InputError(f"{run} holds another run: {changed[0]}{more}; choose another folder with --out")
    if not resume:
        raise InputError(f"{run} holds this run already; go on with --resume, or choose another folder with --out")
    if not (run / STATE).exists():  # killed between the two files
        write_json(run / STATE, state)
    first = read_json(run / STATE)
    if first["data_checksum"] != state["data_checksum"]:
        raise InputError(f"{run} was started on other data: its checksum was {first['data_checksum']}")
    if first["own_networks"] != state["own_networks"]:
        raise InputError(f"{run} was started with other networks of your own; choose another folder with --out")
    if first["device"] != state["device"]:
        raise InputError(f"{run} was started on {first['device']}, and this is {state['device']}; see --device")
    _tidy(run)
    write_text(run / CONFIG, to_yaml(config))  # the study may have grown: more seeds, teachers, students
    return first


def _tidy(run: Path) -> None:
    """Remove what a kill left: half-written files, and the states of networks that are finished."""
    for path in run.rglob(".*.part"):
        path.unlink(missing_ok=True)
    for folder in run.glob("*/*/*/resume"):
        if (folder.parent / "model.json").exists():
            for state in (folder / "preparation", folder):
                Checkpoint(state, fingerprint="").remove()


def _is_part(path: Path) -> bool:
    """Return whether a file is one that was not written to its end; see :func:`soteacher.files.replacing`."""
    return path.name.startswith(".") and path.name.endswith(".part")


@contextmanager
def locked(run: Path) -> Generator[IO[str], None, None]:
    """Hold the run's folder against other processes; the lock ends with this process and those it handed the file to.

    The folder is made where it is missing, and taken away again where nothing was written into it.

    Raises:
        InputError: another process is at work in the folder, or there can be no such folder.
    """
    created = not run.exists()
    try:
        run.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        raise InputError(f"{run} cannot be a folder: a file is in its place; choose another with --out") from None
    path = run / ".lock"
    with _lock(path) as file:
        try:
            yield file
        finally:
            path.unlink(missing_ok=True)
            if created and not any(run.iterdir()):
                run.rmdir()


def _lock(path: Path) -> IO[str]:
    """Return the opened and locked file. Workers of a killed run need a moment to leave, and are waited for."""
    deadline = time.monotonic() + LOCK_SECONDS
    while True:
        file = path.open("a", encoding="utf-8")
        if _try_lock(file) and _lies_at(path, file):
            return file
        file.close()
        if time.monotonic() > deadline:
            raise InputError(f"another process is at work in {path.parent}; wait for it to end, or end it")
        time.sleep(0.1)


def _try_lock(file: IO[str]) -> bool:
    if sys.platform == "win32":
        return True
    import fcntl

    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def _lies_at(path: Path, file: IO[str]) -> bool:
    """Return whether an open file is still the one at a path: who held it before may have taken it away."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False
