import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from soteacher.errors import InputError, InterruptedRunError, WorkerDiedError
from soteacher.pool import Work, available_cores, cores_of_workers, default_workers, run_side_by_side

WORKER = """
import json, os, signal, sys, time

busy, asked = False, False

def ask(number, frame):
    global asked
    asked = True
    if not busy:
        sys.exit(0)

signal.signal(signal.SIGTERM, ask)
signal.signal(signal.SIGINT, signal.SIG_IGN)

def answer(**event):
    print(json.dumps(event), flush=True)

for line in sys.stdin:
    busy = True
    message = json.loads(line)
    answer(event="started", pid=os.getpid(), threads=os.environ["OMP_NUM_THREADS"], time=time.monotonic())
    do = message["do"]
    if do == "fail":
        answer(event="failed", message="the loss is not finite")
    elif do == "die":
        print("the last words", file=sys.stderr, flush=True)
        os.kill(os.getpid(), signal.SIGKILL)
    elif do == "leave":
        sys.exit(3)
    elif do == "babble":
        sys.stdout.write('{"event": "do')
        sys.stdout.flush()
        os.kill(os.getpid(), signal.SIGKILL)
    else:
        end = time.monotonic() + message.get("seconds", 0.0)
        while time.monotonic() < end and not asked:
            time.sleep(0.005)
        if asked:
            answer(event="stopped")
            break
        answer(event="done", time=time.monotonic())
    busy = False
    if asked:
        break
"""


@pytest.fixture
def pool(tmp_path: Path) -> Iterator[Callable[..., list[tuple[Any, dict[str, Any]]]]]:
    """Run works with the tiny worker; return the events in their order, also in ``pool.events`` after an error."""
    script = tmp_path / "worker.py"
    script.write_text(WORKER)
    reading, writing = os.pipe()

    def run(
        works: list[Work], workers: int = 2, should_stop: Callable[[], bool] = lambda: False,
        on_event: Callable[[Any, dict[str, Any]], None] | None = None,
    ) -> list[tuple[Any, dict[str, Any]]]:  # fmt: skip
        events: list[tuple[Any, dict[str, Any]]] = []
        run.events = events

        def take(key: Any, event: dict[str, Any]) -> None:
            events.append((key, event))
            if on_event is not None:
                on_event(key, event)

        run_side_by_side(
            works, [sys.executable, "-S", "-E", str(script)], workers=workers, threads=3, log=tmp_path / "log.txt",
            keep=writing, on_event=take, should_stop=should_stop,
        )  # fmt: skip
        return events

    yield run
    for _, event in getattr(run, "events", []):
        if "pid" in event:  # whatever happened, nobody is left behind
            with pytest.raises(ProcessLookupError):
                os.kill(event["pid"], 0)
    os.close(reading)
    os.close(writing)


def _work(key: str, needs: str | None = None, **message: Any) -> Work:
    return Work(f"student {key}", key, {"do": "train"} | message, needs)


def _order(events: list[tuple[Any, dict[str, Any]]], event: str) -> list[Any]:
    return [key for key, value in events if value["event"] == event]


def test_every_network_is_trained_once(pool) -> None:
    events = pool([_work(key) for key in "abcde"])
    assert sorted(_order(events, "started")) == sorted(_order(events, "done")) == list("abcde")
    assert {event["threads"] for _, event in events if event["event"] == "started"} == {"3"}
    assert 1 <= len({event["pid"] for _, event in events if event["event"] == "started"}) <= 2


def test_networks_are_trained_side_by_side(pool) -> None:
    events = pool([_work("a", seconds=0.6), _work("b", seconds=0.6)])
    times = {(key, event["event"]): event["time"] for key, event in events}
    assert times["b", "started"] < times["a", "done"]
    assert times["a", "started"] < times["b", "done"]


def test_a_network_waits_for_what_it_needs(pool) -> None:
    works = [_work("student", needs="teacher"), _work("other"), _work("teacher", seconds=0.1), _work("late", "student")]
    events = pool(works, workers=3)
    times = {(key, event["event"]): event["time"] for key, event in events}
    assert times["teacher", "done"] < times["student", "started"]
    assert times["student", "done"] < times["late", "started"]


def test_nothing_to_do_starts_nothing(pool) -> None:
    assert pool([]) == []


def test_a_network_that_fails_stops_the_others(pool) -> None:
    works = [_work("bad", do="fail"), _work("good", seconds=60), _work("never")]
    began = time.monotonic()
    with pytest.raises(InputError, match=r"^student bad: the loss is not finite$"):
        pool(works)
    assert time.monotonic() - began < 20
    assert "never" not in _order(pool.events, "started")
    assert "good" not in _order(pool.events, "done")


@pytest.mark.parametrize(
    ("do", "words"),
    [("die", "was killed by SIGKILL"), ("leave", "ended with status 3"), ("babble", "was killed by SIGKILL")],
)
def test_a_worker_that_dies_is_reported_and_stops_the_others(pool, tmp_path: Path, do: str, words: str) -> None:
    with pytest.raises(WorkerDiedError) as caught:
        pool([_work("bad", do=do), _work("good", seconds=60)])
    log = tmp_path / "log.txt"
    assert str(caught.value).startswith(f"a worker process training student bad {words}; {log} may say why;")
    assert "--resume" in str(caught.value)
    if do == "die":
        assert "the last words" in log.read_text()


def test_an_idle_worker_that_dies_is_reported(pool) -> None:
    def kill_the_idle_one(key: Any, event: dict[str, Any]) -> None:
        if (key, event["event"]) == ("short", "done"):
            pid = next(event["pid"] for key, event in pool.events if key == "short")
            os.kill(pid, signal.SIGKILL)

    works = [_work("long", seconds=60), _work("short"), _work("waits", needs="long")]
    with pytest.raises(WorkerDiedError, match=r"^a worker process was killed by SIGKILL;"):
        pool(works, on_event=kill_the_idle_one)


def test_a_worker_that_cannot_start_is_reported(tmp_path: Path) -> None:
    command = [sys.executable, "-S", "-c", "raise SystemExit(7)"]
    with pytest.raises(WorkerDiedError, match="ended with status 7"):
        run_side_by_side(
            [_work("a", filler="x" * 200_000), _work("b")], command, workers=2, threads=1, log=tmp_path / "log.txt",
            keep=2, on_event=lambda *_: None, should_stop=lambda: False,
        )  # fmt: skip


def test_a_stop_reaches_every_worker(pool) -> None:
    def started() -> bool:
        return len(_order(pool.events, "started")) == 2

    with pytest.raises(InterruptedRunError):
        pool([_work("a", seconds=60), _work("b", seconds=60), _work("c")], should_stop=started)
    assert sorted(_order(pool.events, "stopped")) == ["a", "b"]
    assert "c" not in _order(pool.events, "started")


def test_a_stop_of_the_whole_group_is_a_stop_though_idle_workers_leave_first(pool) -> None:
    asked = threading.Event()

    def stop_all(key: Any, event: dict[str, Any]) -> None:
        if (key, event["event"]) == ("short", "done"):
            asked.set()
            for pid in {event["pid"] for _, event in pool.events if event["event"] == "started"}:
                os.kill(pid, signal.SIGTERM)
            time.sleep(0.3)  # the idle one is gone before anybody has looked

    works = [_work("long", seconds=60), _work("short", seconds=0.2), _work("waits", needs="long")]
    with pytest.raises(InterruptedRunError):
        pool(works, should_stop=asked.is_set, on_event=stop_all)
    assert _order(pool.events, "stopped") == ["long"]


def test_a_worker_stopped_from_outside_stops_the_run(pool) -> None:
    def stop_it(key: Any, event: dict[str, Any]) -> None:
        if event["event"] == "started" and key == "a":
            os.kill(event["pid"], signal.SIGTERM)

    with pytest.raises(InterruptedRunError):
        pool([_work("a", seconds=60), _work("b", seconds=60)], on_event=stop_it)


def test_an_error_of_the_display_stops_the_workers(pool) -> None:
    def fails(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space left"):
        pool([_work("a", seconds=60), _work("b", seconds=60)], on_event=fails)


def test_workers_keep_the_lock_open(tmp_path: Path) -> None:
    reading, writing = os.pipe()
    script = """
import os, sys
for line in sys.stdin:
    os.write(int(sys.argv[1]), b"held")
    print('{"event": "done"}', flush=True)
"""
    run_side_by_side(
        [_work("a")], [sys.executable, "-S", "-c", script, str(writing)], workers=1, threads=1,
        log=tmp_path / "log.txt", keep=writing, on_event=lambda *_: None, should_stop=lambda: False,
    )  # fmt: skip
    assert os.read(reading, 10) == b"held"
    os.close(reading)
    os.close(writing)


@pytest.mark.parametrize(
    ("cores", "networks", "device", "plan"),
    [
        (2, 10, "cpu", (2, 1)), (8, 3, "cpu", (3, 2)), (8, 1, "cpu", (1, 8)), (1, 5, "cpu", (1, 1)),
        (8, 10, "cuda", (1, 8)), (2, 0, "cpu", (1, 2)),
    ],
)  # fmt: skip
def test_default_workers_share_the_cores(cores: int, networks: int, device: str, plan: tuple[int, int]) -> None:
    assert default_workers(cores, networks, device) == {"workers": plan[0], "threads": plan[1]}


def test_available_cores_are_those_of_this_process() -> None:
    assert 1 <= available_cores() <= (os.cpu_count() or 1)
    assert json.dumps(available_cores()).isdigit()


@pytest.mark.parametrize(
    ("workers", "threads", "cores", "pinned"),
    [
        (2, 1, {0, 1}, [[0], [1]]),
        (2, 2, {7, 2, 3, 5}, [[2, 3], [5, 7]]),
        (1, 2, {4, 9}, [[4, 9]]),
        (2, 1, {0, 1, 2}, []),  # a core is left over: others may be at work
        (4, 1, {0, 1}, []),
        (2, 3, {0, 1, 2, 3}, []),
    ],
)
def test_workers_that_fill_the_cores_stay_on_their_own(
    monkeypatch: pytest.MonkeyPatch, workers: int, threads: int, cores: set[int], pinned: list[list[int]]
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: cores, raising=False)
    monkeypatch.setattr(os, "sched_setaffinity", lambda *_: None, raising=False)
    assert cores_of_workers(workers, threads) == pinned


def test_workers_stay_nowhere_where_the_system_cannot_be_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "sched_setaffinity", raising=False)
    assert cores_of_workers(2, 1) == []


def test_each_worker_is_put_on_its_cores_and_the_log_says_so(
    pool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put: dict[int, list[int]] = {}
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1, 2, 3, 4, 5}, raising=False)
    monkeypatch.setattr(os, "sched_setaffinity", put.__setitem__, raising=False)
    events = pool([_work("a", seconds=0.4), _work("b", seconds=0.4)])
    pids = {event["pid"] for _, event in events if event["event"] == "started"}
    assert set(put) == pids
    assert sorted(put.values()) == [[0, 1, 2], [3, 4, 5]]
    assert (tmp_path / "log.txt").read_text().splitlines()[0] == (
        "2 networks side by side, 3 threads each, each on its own cores [[0, 1, 2], [3, 4, 5]]; freed memory is kept "
        "where glibc is"
    )


def test_workers_that_do_not_fill_the_cores_are_on_any(pool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(7)), raising=False)
    monkeypatch.setattr(os, "sched_setaffinity", lambda *_: pytest.fail("put on cores"), raising=False)
    pool([_work("a")])
    assert (tmp_path / "log.txt").read_text().splitlines()[0] == (
        "2 networks side by side, 3 threads each, on any cores; freed memory is kept where glibc is"
    )
