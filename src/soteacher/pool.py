"""Networks side by side: each in a process of its own, so that small networks use all cores.

Two small networks on one core each are faster than one after the other on two. The processes are started afresh
(never forked from this one, never importing the caller's main module) and live through many networks.
"""

from __future__ import annotations

import json
import os
import queue
import signal
import subprocess
import threading
from collections.abc import Callable, Hashable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from soteacher.environment import KEPT_PAGES
from soteacher.errors import InputError, InterruptedRunError, WorkerDiedError


@dataclass(frozen=True, slots=True)
class Work:
    """One network to train, and what must be finished before."""

    name: str
    """How messages call it."""
    key: Hashable
    message: dict[str, Any]
    needs: Hashable | None = None


class _Process:
    """A worker process; its events go into the common queue, ended by ``None``."""

    def __init__(
        self,
        command: Sequence[str],
        cores: Sequence[int],
        threads: int,
        log: IO[str],
        keep: int,
        events: queue.Queue[Any],
    ) -> None:
        self.busy: Work | None = None
        counts = {"OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}
        environment = {name: str(value) for name, value in KEPT_PAGES.items()} | dict(os.environ) | counts
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True, env=environment,
            pass_fds=(keep,),
        )  # fmt: skip
        if cores:
            os.sched_setaffinity(self._process.pid, cores)
        threading.Thread(target=self._listen, args=(events,), daemon=True).start()

    def _listen(self, events: queue.Queue[Any]) -> None:
        assert self._process.stdout is not None
        with self._process.stdout as lines, suppress(ValueError):  # killed in the middle of a line
            for line in lines:
                events.put((self, json.loads(line)))
        self._process.wait()
        events.put((self, None))

    def send(self, work: Work) -> None:
        assert self._process.stdin is not None
        self.busy = work
        with suppress(BrokenPipeError):  # it has died: the end of its events says so
            self._process.stdin.write(json.dumps(work.message) + "\n")
            self._process.stdin.flush()

    def stop(self) -> None:
        """Ask it to save its state and leave."""
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGTERM)

    def end(self) -> None:
        """Let it leave when it has nothing to do, and wait for that."""
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):
            self._process.stdin.close()
        self._process.wait()

    def last_words(self, log: Path) -> str:
        """Return how a process that is gone came to its end."""
        status = self._process.returncode
        how = f"was killed by {signal.Signals(-status).name}" if status < 0 else f"ended with status {status}"
        at = f" training {self.busy.name}" if self.busy else ""
        return f"a worker process{at} {how}; {log} may say why; go on with --resume, or with fewer --workers"


def run_side_by_side(
    works: Sequence[Work],
    command: Sequence[str],
    *,
    workers: int,
    threads: int,
    log: Path,
    keep: int,
    on_event: Callable[[Hashable, dict[str, Any]], None],
    should_stop: Callable[[], bool],
) -> None:
    """Train networks in worker processes, each as soon as what it needs is finished.

    Args:
        works: the networks, in the order in which they are wanted.
        command: starts a worker, which reads a message a line and answers with events, one JSON a line:
            ``{"event": "done"}``, ``"failed"`` (with ``message``), ``"stopped"``, or anything else for ``on_event``.
        workers: how many processes.
        threads: of arithmetic in each; where they fill the cores together, each worker stays on its own.
        log: file that takes what the workers print.
        keep: a file descriptor that they keep open: the run's lock.
        on_event: called with a network's key and each of its events.
        should_stop: asked several times a second; on yes every worker saves its state and leaves.

    Raises:
        InterruptedRunError: ``should_stop`` said yes, or a worker was asked to stop from outside.
        InputError: a network cannot be trained; the others have saved their state.
        WorkerDiedError: a worker died; the others have saved their state.
    """
    waiting, finished = list(works), set[Hashable]()
    events: queue.Queue[Any] = queue.Queue()
    failure: Exception | None = None
    with log.open("a", encoding="utf-8") as stream:
        pinned = cores_of_workers(workers, threads)
        stream.write(_plan(workers, threads, pinned) + "\n")
        stream.flush()
        alive = [
            _Process(command, pinned[number] if pinned else (), threads, stream, keep, events)
            for number in range(min(workers, len(works)))
        ]
        everyone = list(alive)
        try:
            while alive:
                if failure is None:
                    _hand_out(waiting, alive, finished)
                    if not waiting and not any(process.busy for process in alive):
                        break
                try:
                    process, event = events.get(timeout=0.2)
                except queue.Empty:
                    process, event = None, None
                if failure is None:
                    failure = _failure(process, event, log, stopping=should_stop())
                    _stop(alive if failure else ())
                if process is not None and event is not None:
                    _take(process, event, finished, on_event)
                elif process is not None:
                    alive.remove(process)
        finally:
            _stop([process for process in alive if process.busy])
            for process in everyone:
                process.end()
    if failure is not None:
        raise failure


def _plan(workers: int, threads: int, pinned: Sequence[Sequence[int]]) -> str:
    """Return in words how the workers share the machine."""
    cores = f"each on its own cores {pinned}" if pinned else "on any cores"
    return f"{workers} networks side by side, {threads} threads each, {cores}; freed memory is kept where glibc is"


def _hand_out(waiting: list[Work], alive: Sequence[_Process], finished: set[Hashable]) -> None:
    for process in alive:
        if process.busy:
            continue
        ready = next((work for work in waiting if work.needs is None or work.needs in finished), None)
        if ready is None:
            return
        waiting.remove(ready)
        process.send(ready)


def _failure(process: _Process | None, event: dict[str, Any] | None, log: Path, *, stopping: bool) -> Exception | None:
    """Return why all must stop, after an event of a process or after none."""
    if stopping:  # asked first: the same signal may have ended a worker
        return InterruptedRunError("stopped")
    if process is None:
        return None
    if event is None:
        return WorkerDiedError(process.last_words(log))
    if event["event"] == "stopped":
        return InterruptedRunError("a worker was asked to stop")
    if event["event"] == "failed" and process.busy is not None:
        return InputError(f"{process.busy.name}: {event['message']}")
    return None


def _take(
    process: _Process,
    event: dict[str, Any],
    finished: set[Hashable],
    on_event: Callable[[Hashable, dict[str, Any]], None],
) -> None:
    """Pass an event on; the last one of a network sets its process free."""
    assert process.busy is not None
    key = process.busy.key
    if event["event"] == "done":
        finished.add(key)
    if event["event"] in ("done", "failed", "stopped"):
        process.busy = None
    on_event(key, event)


def _stop(processes: Sequence[_Process]) -> None:
    for process in processes:
        process.stop()


def available_cores() -> int:
    """Return how many processor cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def cores_of_workers(workers: int, threads: int) -> list[list[int]]:
    """Return the cores that each worker stays on, so that none moves between the caches.

    They are as many as its threads. There are none where the workers do not fill this machine's cores exactly, for
    others may then be at work on the same ones, or where the system cannot be told.
    """
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_setaffinity") else []
    if workers * threads != len(cores):
        return []
    return [cores[first : first + threads] for first in range(0, len(cores), threads)]


def default_workers(cores: int, networks: int, device: str) -> Mapping[str, int]:
    """Return how many networks are trained side by side and with how many threads each.

    Args:
        cores: of this machine.
        networks: of the study that can be trained at the same time.
        device: ``cpu`` or ``cuda``; on one GPU the networks follow one another.
    """
    workers = 1 if device == "cuda" else max(1, min(cores, networks))
    return {"workers": workers, "threads": max(1, cores // workers)}
