"""The folder of a run: who may write in it, and where each network lies."""

from __future__ import annotations

import sys
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from soteacher.config import StudyConfig, differences, to_yaml
from soteacher.errors import InputError
from soteacher.files import read_json, write_json, write_text
from soteacher.settings import parse, read_tree

CONFIG = "config.yaml"
STATE = "run.json"
LOG = "log.txt"


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
    """Make the run's folder, or make sure that it may go on in it; return the run's state.

    Args:
        run: the folder.
        config: the study.
        state: facts of this start that a resumed run must share or keep: ``data_checksum``, ``threads``, ``device``.
        resume: whether an unfinished or finished run of the same study may be there.

    Returns:
        The state written at the run's first start.

    Raises:
        InputError: the folder holds something else, another run, or this run without ``resume``.
    """
    if not run.exists() or (run.is_dir() and not any(path.name != ".lock" for path in run.iterdir())):
        run.mkdir(parents=True, exist_ok=True)
        write_json(run / STATE, state)
        write_text(run / CONFIG, to_yaml(config))
        return state
    if not (run / CONFIG).exists():
        raise InputError(f"{run} exists and holds no run; choose another folder with --out")
    changed = differences(read_config(run), config)
    if changed:
        more = f" (and {len(changed) - 1} more)" if len(changed) > 1 else ""
        raise InputError(f"{run} holds another run: {changed[0]}{more}; choose another folder with --out")
    if not resume:
        raise InputError(f"{run} holds this run already; go on with --resume, or choose another folder with --out")
    first = read_json(run / STATE)
    if first["data_checksum"] != state["data_checksum"]:
        raise InputError(f"{run} was started on other data: its checksum was {first['data_checksum']}")
    write_text(run / CONFIG, to_yaml(config))  # the study may have grown: more seeds, teachers, students
    return first


@contextmanager
def locked(run: Path) -> Generator[IO[str], None, None]:
    """Hold the run's folder against other processes; the lock ends with this process and those it handed the file to.

    Raises:
        InputError: another process is at work in the folder.
    """
    created = not run.exists()
    run.mkdir(parents=True, exist_ok=True)
    path = run / ".lock"
    with path.open("a", encoding="utf-8") as file:
        if sys.platform != "win32":
            import fcntl

            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                raise InputError(f"another process is at work in {run}; wait for it to end, or end it") from None
        try:
            yield file
        finally:
            path.unlink(missing_ok=True)
            if created and not any(run.iterdir()):
                run.rmdir()
