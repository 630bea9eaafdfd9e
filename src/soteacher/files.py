"""Files appear whole or not at all: each is written beside its place and renamed."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

DISK_FULL = (errno.ENOSPC, errno.EDQUOT)


@contextmanager
def replacing(path: Path) -> Generator[Path, None, None]:
    """Give a path beside ``path`` to write to; on success it takes the place of ``path``, on failure it is removed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        yield part
        with part.open("rb+") as file:
            os.fsync(file.fileno())
        part.replace(path)
    except OSError as error:
        if error.errno in DISK_FULL and error.filename is None:
            error.filename = str(path)
        raise
    finally:
        part.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically, as UTF-8."""
    with replacing(path) as part:
        part.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file atomically; NaN and infinities are refused."""
    write_text(path, json.dumps(value, indent=2, allow_nan=False) + "\n")


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Write tensors atomically, as safetensors.

    Args:
        path: the file.
        tensors: by name, on any device and in any layout; they may share memory.
        metadata: text to keep beside them.
    """
    # Imported here: they bring PyTorch, and the command line starts without.
    from safetensors.torch import save
    from torch import contiguous_format

    # A copy of each of its own: the format refuses shared memory (tied weights) and layouts such as channels last.
    owned = {
        name: value.detach().to("cpu", copy=True, memory_format=contiguous_format) for name, value in tensors.items()
    }

    # Not the library's own writing: that tells of a full disk in words only, and nobody else may read its files.
    with replacing(path) as part:
        part.write_bytes(save(owned, None if metadata is None else dict(metadata)))


def unwritable(error: OSError) -> str | None:
    """Return one line for an error of writing that the user can mend, ``None`` for any other."""
    place = error.filename or "the output folder"
    if error.errno in DISK_FULL:
        return f"the disk is full at {place}; make room and go on with --resume"
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return f"{place} may not be written: {error.strerror}"
    return None


def read_json(path: Path) -> Any:
    """Return what a JSON file holds."""
    return json.loads(path.read_text(encoding="utf-8"))
