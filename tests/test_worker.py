import io
import json
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from soteacher.recipes import read_study
from soteacher.run_folder import claim
from soteacher.worker import _Stop, serve

TEACHER = {"role": "teacher", "arm": "standard", "seed": 0}
STUDENT = {"role": "student", "arm": "standard-kd", "seed": 0}


@pytest.fixture
def stop() -> Iterator[_Stop]:
    """Make what tells a worker to stop; put the signals back afterwards."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield _Stop()
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture
def run(tmp_path: Path, tiny_tree: Callable[..., dict[str, Any]]) -> Path:
    config = read_study(tiny_tree(training={"epochs": 1, "batch_size": 16}))
    (tmp_path / "run").mkdir()
    claim(tmp_path / "run", config, {"data_checksum": "", "device": "cpu"}, resume=False)
    return tmp_path / "run"


@pytest.fixture
def work(run: Path, stop: _Stop, monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[dict[str, Any]]]:
    """Let a worker in this process train networks; return its answers."""

    def serve_these(*messages: dict[str, Any], answers: io.StringIO | None = None) -> list[dict[str, Any]]:
        stream = answers or io.StringIO()
        monkeypatch.setattr("sys.stdin", io.StringIO("".join(json.dumps(message) + "\n" for message in messages)))
        serve(run, "cpu", 1, None, stop, stream)
        return [json.loads(line) for line in stream.getvalue().splitlines()]

    return serve_these


def _full(*_: object) -> None:
    raise OSError(28, "No space left on device")


def test_a_worker_trains_what_it_is_told_and_answers(work, run: Path) -> None:
    events = work(TEACHER, STUDENT)
    assert [event["event"] for event in events] == 2 * ["started", "step", "epoch", "finished", "done"]
    assert events[3]["row"]["arm"] == "standard"
    assert events[8]["row"]["teacher_arm"] == "standard"
    assert (run / "students/standard-kd/seed0/model.json").exists()


def test_a_network_that_cannot_be_trained_is_told_and_the_next_is_tried(work, run: Path) -> None:
    config = run / "config.yaml"
    config.write_text(config.read_text().replace("learning_rate: 0.05", "learning_rate: 1.0e+30", 1))
    events = work(TEACHER | {"arm": "soteacher"}, TEACHER)
    assert [event["event"] for event in events if event["event"] in ("failed", "done")] == ["failed", "failed"]
    assert events[1]["message"].startswith("the loss is not finite")


def test_a_full_disk_is_told_in_one_line_and_leaves_no_half_file(
    work, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "fsync", _full)
    events = work(TEACHER)
    folder = run / "teachers/standard/seed0"
    assert events[-1] == {
        "event": "failed",
        "message": f"the disk is full at {folder / 'metrics.jsonl'}; make room and go on with --resume",
    }
    assert list(folder.iterdir()) == []


def test_an_error_of_ours_is_not_swallowed(work, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise FileNotFoundError(2, "No such file", "somewhere")

    monkeypatch.setattr(os, "fsync", broken)
    with pytest.raises(FileNotFoundError):
        work(TEACHER)


def test_an_idle_worker_leaves_at_once(stop: _Stop) -> None:
    assert not stop.wanted()
    with pytest.raises(SystemExit) as left:
        os.kill(os.getpid(), signal.SIGTERM)
    assert left.value.code == 0
    os.kill(os.getpid(), signal.SIGINT)  # of no account: the parent decides


def test_a_worker_that_is_asked_saves_its_state_and_leaves(work, run: Path, stop: _Stop) -> None:
    stop.training = True
    os.kill(os.getpid(), signal.SIGTERM)
    assert [event["event"] for event in work(TEACHER, STUDENT)] == ["started", "stopped"]
    assert (run / "teachers/standard/seed0/resume/state.safetensors").exists()


def test_a_worker_whose_parent_is_gone_saves_its_state_and_leaves(
    work, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "getppid", lambda: -1)  # no process has this number
    assert [event["event"] for event in work(TEACHER, STUDENT)] == ["started", "stopped"]
    assert (run / "teachers/standard/seed0/resume/state.safetensors").exists()


def test_a_worker_that_nobody_listens_to_ends(work, monkeypatch: pytest.MonkeyPatch) -> None:
    class Closed(io.StringIO):
        def flush(self) -> None:
            raise BrokenPipeError

    def leave(status: int) -> None:
        raise SystemExit(status)

    monkeypatch.setattr(os, "_exit", leave)
    with pytest.raises(SystemExit) as left:
        work(TEACHER, answers=Closed())
    assert left.value.code == 1
