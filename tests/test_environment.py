import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from soteacher import environment as module
from soteacher.environment import KEPT_PAGES, PeakMemory, environment, keep_pages


def test_the_environment_names_what_numbers_depend_on() -> None:
    facts = environment("cpu", 3)
    assert set(facts) == {"python", "torch", "device", "threads", "commit"}
    assert (facts["torch"], facts["threads"]) == (torch.__version__, 3)
    assert facts["device"]


def test_the_environment_without_git(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    assert environment("cpu", 1)["commit"] is None


def _git(folder: Path, *words: str) -> str:
    command = ["git", "-c", "user.name=a", "-c", "user.email=a@b", *words]
    return subprocess.run(command, cwd=folder, check=True, capture_output=True, text=True).stdout.strip()


def test_the_commit_is_that_of_the_sources_and_shows_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = tmp_path / "package" / "environment.py"
    source.parent.mkdir()
    source.write_text("one")
    monkeypatch.setattr(module, "__file__", str(source))
    assert environment("cpu", 1)["commit"] is None
    _git(tmp_path, "init", "--quiet")
    _git(tmp_path, "commit", "--quiet", "--allow-empty", "--message", "somebody else's")
    assert environment("cpu", 1)["commit"] is None  # the package only lies within the repository
    _git(tmp_path, "add", ".")
    _git(tmp_path, "commit", "--quiet", "--message", "ours")
    assert environment("cpu", 1)["commit"] == _git(tmp_path, "rev-parse", "HEAD")
    source.write_text("two")
    assert environment("cpu", 1)["commit"] == _git(tmp_path, "rev-parse", "HEAD") + "+"


LINUX = pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="only Linux tells the peak")
MEGABYTE = 2**20


@LINUX
def test_the_peak_of_memory_is_what_was_needed_for_a_while() -> None:
    memory = PeakMemory("cpu")
    block = torch.ones(64 * MEGABYTE // 4)
    del block
    peak = memory.bytes()
    assert peak is not None
    assert 60 * MEGABYTE < peak < 128 * MEGABYTE


@LINUX
def test_what_was_needed_before_does_not_count() -> None:
    before = PeakMemory("cpu")
    block = torch.ones(64 * MEGABYTE // 4)
    kept = PeakMemory("cpu")  # the block is there, and no more is needed from now on
    assert block.sum() > 0
    del block
    after = PeakMemory("cpu")
    for memory in (kept, after):
        peak = memory.bytes()
        assert peak is not None
        assert 0 <= peak < 30 * MEGABYTE
    assert before.bytes() is not None


def test_a_system_that_does_not_tell_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> int:
        raise PermissionError

    monkeypatch.setattr(Path, "write_text", refuse)
    assert PeakMemory("cpu").bytes() is None


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_peak_on_a_gpu_is_what_was_allocated() -> None:
    memory = PeakMemory("cuda")
    block = torch.ones(64 * MEGABYTE // 4, device="cuda")
    del block
    peak = memory.bytes()
    assert peak is not None
    assert 64 * MEGABYTE <= peak < 66 * MEGABYTE


class Library:
    """Stands for the C library; remembers what it was told."""

    def __init__(self, answers: dict[int, int]) -> None:
        self.told: dict[int, int] = {}
        self._answers = answers

    def mallopt(self, parameter: int, value: int) -> int:
        self.told[parameter] = value
        return self._answers.get(parameter, 1)


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Library]:
    def put(answers: dict[int, int]) -> Library:
        made = Library(answers)
        monkeypatch.setattr(module.ctypes, "CDLL", lambda _: made)
        return made

    for name in KEPT_PAGES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(sys, "platform", "linux")
    return put


def test_freed_pages_are_kept_where_glibc_is(library: Callable[..., Library]) -> None:
    told = library({})
    assert keep_pages()
    # M_TRIM_THRESHOLD is -1, M_TOP_PAD -2, M_MMAP_THRESHOLD -3; the values must be those of a C int.
    assert told.told == {-1: 2**31 - 1, -2: 2**26, -3: 2**30}


def test_a_refused_setting_keeps_none_of_the_others_from_being_made(library: Callable[..., Library]) -> None:
    told = library({-3: 0})  # glibc before 2.35 takes no threshold above 32 MiB
    assert not keep_pages()
    assert set(told.told) == {-1, -2, -3}


def test_what_the_environment_says_of_freed_pages_stays(
    library: Callable[..., Library], monkeypatch: pytest.MonkeyPatch
) -> None:
    told = library({})
    monkeypatch.setenv("MALLOC_TOP_PAD_", "0")
    assert keep_pages()
    assert set(told.told) == {-1, -3}


def test_systems_without_glibc_keep_their_ways(
    library: Callable[..., Library], monkeypatch: pytest.MonkeyPatch
) -> None:
    told = library({})
    monkeypatch.setattr(module.ctypes, "CDLL", lambda _: object())
    assert not keep_pages()
    monkeypatch.setattr(sys, "platform", "darwin")
    monkeypatch.setattr(module.ctypes, "CDLL", lambda _: told)
    assert not keep_pages()
    assert told.told == {}
