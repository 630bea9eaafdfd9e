import subprocess
from pathlib import Path

import pytest
import torch

from soteacher import environment as module
from soteacher.environment import environment


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
