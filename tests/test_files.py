import errno
import math
import os
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
def test_replacing_leaves_the_old_file_and_nothing_else_on_failure(
    tmp_path: Path, error: type[BaseException]
) -> None:
    path = tmp_path / "file.txt"
    path.write_text("old")
    with pytest.raises(error), replacing(path) as part:
        part.write_text("half")
        raise error
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_replacing_removes_what_cannot_be_renamed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*arguments: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        write_text(tmp_path / "file.txt", "text")
    assert list(tmp_path.iterdir()) == []


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


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full on this system")
def test_a_full_disk_is_an_os_error_though_the_library_says_it_in_words(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save = safetensors.torch.save_file
    monkeypatch.setattr(safetensors.torch, "save_file", lambda tensors, part, metadata: save(tensors, "/dev/full"))
    with pytest.raises(OSError, match="No space left") as caught:
        write_tensors(tmp_path / "file.safetensors", {"weight": torch.zeros(3)})
    assert (caught.value.errno, caught.value.filename) == (errno.ENOSPC, str(tmp_path / "file.safetensors"))
    assert list(tmp_path.iterdir()) == []


def test_other_errors_of_the_library_stay_what_they_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*arguments: object, **more: object) -> None:
        raise safetensors.SafetensorError("not a number of the system")

    monkeypatch.setattr(safetensors.torch, "save_file", fails)
    with pytest.raises(safetensors.SafetensorError, match="not a number"):
        write_tensors(tmp_path / "file.safetensors", {"weight": torch.zeros(3)})


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
