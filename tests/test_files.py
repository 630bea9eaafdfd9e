import errno
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from soteacher.files import read_json, replacing, unwritable, write_json, write_tensors, write_text


def test_replacing_puts_the_whole_file_in_place(tmp_path: Path) -> None:
    path = tmp_path / "new" / "file.txt"
    with replacing(path) as part:
        assert part.parent == path.parent
        part.write_text("whole")
        assert not path.exists()
    assert path.read_text() == "whole"
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize("error", [ValueError, OSError, KeyboardInterrupt])
def test_replacing_leaves_the_old_file_and_nothing_else_on_failure(tmp_path: Path, error: type[BaseException]) -> None:
    path = tmp_path / "file.txt"
    path.write_text("old")

    def fail() -> None:
        with replacing(path) as part:
            part.write_text("half")
            raise error

    with pytest.raises(error):
        fail()
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def _full(*_: object) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def test_text_is_utf8(tmp_path: Path) -> None:
    write_text(tmp_path / "file.txt", "Grüße, 学生\n")
    assert (tmp_path / "file.txt").read_bytes() == "Grüße, 学生\n".encode()


def test_json_reads_back_equal(tmp_path: Path) -> None:
    value: dict[str, Any] = {"numbers": [1, 0.1 + 0.2, None], "text": "é", "below": {"yes": True}}
    write_json(tmp_path / "file.json", value)
    assert read_json(tmp_path / "file.json") == value


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_json_refuses_what_is_no_number(tmp_path: Path, value: float) -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(tmp_path / "file.json", {"nll": value})
    assert list(tmp_path.iterdir()) == []


def test_tensors_read_back_equal(tmp_path: Path) -> None:
    tensors = {"weight": torch.arange(6.0).view(2, 3), "count": torch.tensor(3)}
    write_tensors(tmp_path / "new" / "file.safetensors", tensors, {"key": "text"})
    read = safetensors.torch.load_file(tmp_path / "new" / "file.safetensors")
    assert read.keys() == tensors.keys()
    assert all(torch.equal(read[name], tensors[name]) for name in tensors)
    with safetensors.safe_open(tmp_path / "new" / "file.safetensors", framework="pt") as file:
        assert file.metadata() == {"key": "text"}


def test_tensors_may_be_read_by_whom_other_files_may(tmp_path: Path) -> None:
    write_text(tmp_path / "file.txt", "text")
    write_tensors(tmp_path / "file.safetensors", {"weight": torch.zeros(3)})
    modes = {path.stat().st_mode for path in tmp_path.iterdir()}
    assert len(modes) == 1


@pytest.mark.parametrize("write", [lambda path: write_text(path, "a"), lambda path: write_tensors(path, {})])
def test_a_full_disk_names_the_file_and_leaves_nothing(
    write: Callable[[Path], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "fsync", _full)
    with pytest.raises(OSError, match="No space left") as caught:
        write(tmp_path / "file")
    assert unwritable(caught.value) == (f"the disk is full at {tmp_path / 'file'}; make room and go on with --resume")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("number", "message"),
    [
        (errno.ENOSPC, "the disk is full at /run/file; make room and go on with --resume"),
        (errno.EDQUOT, "the disk is full at /run/file; make room and go on with --resume"),
        (errno.EACCES, "/run/file may not be written: Permission denied"),
        (errno.EROFS, "/run/file may not be written: Read-only file system"),
        (errno.ENOENT, None),
    ],
)
def test_unwritable_tells_errors_that_the_user_can_mend(number: int, message: str | None) -> None:
    assert unwritable(OSError(number, os.strerror(number), "/run/file")) == message


def test_unwritable_without_a_place() -> None:
    assert unwritable(OSError(errno.ENOSPC, "No space")) == (
        "the disk is full at the output folder; make room and go on with --resume"
    )
