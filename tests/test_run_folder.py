import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from soteacher import run_folder
from soteacher.config import StudyConfig
from soteacher.errors import InputError
from soteacher.run_folder import claim, locked, network_folder, read_config
from soteacher.settings import parse

STATE = {"data_checksum": "abc", "device": "cpu", "workers": 2, "threads": 1, "own_networks": {}}


@pytest.fixture
def study(tiny_tree: Callable[..., dict[str, Any]]) -> StudyConfig:
    return parse(StudyConfig, tiny_tree())


@pytest.fixture
def run(tmp_path: Path) -> Path:
    folder = tmp_path / "run"
    folder.mkdir()
    return folder


def _contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_network_folder(run: Path) -> None:
    assert network_folder(run, "teacher", "standard", 3) == run / "teachers" / "standard" / "seed3"


@pytest.mark.parametrize("resume", [False, True])
def test_claim_writes_the_study_into_an_empty_folder(run: Path, study: StudyConfig, resume: bool) -> None:
    assert claim(run, study, STATE, resume=resume) == STATE
    assert read_config(run) == study
    assert sorted(_contents(run)) == ["config.yaml", "run.json"]


def test_claim_takes_a_folder_in_which_a_start_was_killed(run: Path, study: StudyConfig) -> None:
    (run / ".lock").touch()
    (run / ".config.yaml.123.part").write_text("half")
    assert claim(run, study, STATE, resume=False) == STATE


def test_claim_goes_on_where_a_start_was_killed_between_its_two_files(run: Path, study: StudyConfig) -> None:
    claim(run, study, STATE, resume=False)
    (run / "run.json").unlink()
    assert claim(run, study, STATE, resume=True) == STATE
    assert claim(run, study, STATE, resume=True) == STATE


@pytest.mark.parametrize("resume", [False, True])
def test_claim_refuses_a_folder_of_something_else(run: Path, study: StudyConfig, resume: bool) -> None:
    (run / "photos").mkdir()
    (run / "photos" / "cat.txt").write_text("mine")
    (run / "run.json").write_text("mine too")
    before = _contents(run)
    with pytest.raises(InputError, match="exists and holds no run; choose another folder with --out"):
        claim(run, study, STATE, resume=resume)
    assert _contents(run) == before


def test_claim_refuses_this_run_without_resume(run: Path, study: StudyConfig) -> None:
    claim(run, study, STATE, resume=False)
    before = _contents(run)
    with pytest.raises(InputError, match="holds this run already; go on with --resume, or choose another folder"):
        claim(run, study, STATE, resume=False)
    assert _contents(run) == before


@pytest.mark.parametrize("resume", [False, True])
def test_claim_refuses_another_run_and_names_the_key(
    run: Path, study: StudyConfig, resume: bool, tiny_tree: Callable[..., dict[str, Any]]
) -> None:
    claim(run, study, STATE, resume=False)
    before = _contents(run)
    other = parse(StudyConfig, tiny_tree(training={"epochs": 3, "batch_size": 8}))
    wanted = r"holds another run: training.epochs: 2 in the folder, 3 now \(and 1 more\); choose another folder"
    with pytest.raises(InputError, match=wanted):
        claim(run, other, STATE, resume=resume)
    assert _contents(run) == before


def test_claim_keeps_the_first_start_and_takes_in_a_grown_study(
    run: Path, study: StudyConfig, tiny_tree: Callable[..., dict[str, Any]]
) -> None:
    claim(run, study, STATE, resume=False)
    grown = parse(StudyConfig, tiny_tree(seeds=[0, 1]))
    assert claim(run, grown, STATE | {"threads": 7, "workers": 9}, resume=True) == STATE
    assert read_config(run) == grown


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"data_checksum": "def"}, "was started on other data: its checksum was abc"),
        ({"device": "cuda"}, "was started on cpu, and this is cuda"),
    ],
)
def test_claim_refuses_other_data_and_another_device(
    run: Path, study: StudyConfig, change: dict[str, str], message: str
) -> None:
    claim(run, study, STATE, resume=False)
    with pytest.raises(InputError, match=message):
        claim(run, study, STATE | change, resume=True)


def test_claim_removes_what_a_kill_left(run: Path, study: StudyConfig) -> None:
    claim(run, study, STATE, resume=False)
    folder = run / "teachers" / "standard" / "seed0"
    folder.mkdir(parents=True)
    (folder / ".model.safetensors.99.part").write_text("half")
    (folder / "metrics.jsonl").write_text("")
    claim(run, study, STATE, resume=True)
    assert [path.name for path in folder.iterdir()] == ["metrics.jsonl"]


def test_read_config_refuses_a_folder_without_a_run(run: Path) -> None:
    with pytest.raises(InputError, match=r"holds no run: there is no config.yaml in it"):
        read_config(run)


def test_read_config_names_the_file_of_broken_settings(run: Path) -> None:
    (run / "config.yaml").write_text("data: [")
    with pytest.raises(InputError, match=r"config.yaml: no readable YAML"):
        read_config(run)


def test_locked_makes_the_folder_and_takes_an_empty_one_away_again(tmp_path: Path) -> None:
    run = tmp_path / "a" / "run"
    with locked(run):
        assert run.is_dir()
    assert not run.exists()
    with pytest.raises(InputError), locked(run):
        raise InputError("the settings are no good")
    assert not run.exists()


def test_locked_leaves_a_folder_that_was_there_or_is_in_use(tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    with locked(tmp_path / "there"):
        pass
    with locked(tmp_path / "new"):
        (tmp_path / "new" / "config.yaml").touch()
    assert list((tmp_path / "there").iterdir()) == []
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["config.yaml"]


@pytest.mark.parametrize("place", ["file", "file/run"])
def test_locked_refuses_a_file_in_the_folders_place(tmp_path: Path, place: str) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(InputError, match="cannot be a folder: a file is in its place"), locked(tmp_path / place):
        pass
    assert (tmp_path / "file").read_text() == "mine"


def test_locked_refuses_a_second_process(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_folder, "LOCK_SECONDS", 0.2)
    with locked(run):
        with pytest.raises(InputError, match=f"another process is at work in {run}; wait for it to end"), locked(run):
            pass
        assert (run / ".lock").exists()
    with locked(run):
        pass


def test_the_lock_is_held_by_those_it_was_handed_to(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_folder, "LOCK_SECONDS", 0.2)
    with locked(run) as file:
        command = [sys.executable, "-c", "import sys; sys.stdin.read()"]
        worker = subprocess.Popen(command, stdin=subprocess.PIPE, pass_fds=(file.fileno(),))
        (run / "config.yaml").touch()
        (run / ".lock").rename(run / "lock")  # so that it is not taken away: as after a kill
    (run / "lock").rename(run / ".lock")
    with pytest.raises(InputError, match="another process is at work"), locked(run):
        pass
    monkeypatch.setattr(run_folder, "LOCK_SECONDS", 30.0)
    assert worker.stdin is not None
    worker.stdin.close()  # it leaves in a moment, and is waited for
    with locked(run):
        pass
    worker.wait()


def test_a_lock_that_was_taken_away_meanwhile_is_no_lock(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    attempts: list[bool] = []
    honest = run_folder._try_lock

    def slow(file: Any) -> bool:
        if not attempts:
            (run / ".lock").unlink()  # the one who held it has just ended
        attempts.append(True)
        return honest(file)

    monkeypatch.setattr(run_folder, "_try_lock", slow)
    with locked(run):
        assert (run / ".lock").exists()
    assert len(attempts) == 2
