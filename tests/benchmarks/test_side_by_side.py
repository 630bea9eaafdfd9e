import io
import sys

import pytest
from benchmarks.side_by_side import Processes, Way, measure, serve, ways_of

from soteacher.errors import InputError
from soteacher.pool import available_cores

SAYS = "import os, sys; print({}, flush=True); [print({}, flush=True) for _ in sys.stdin]"
VARIABLES = "*(os.environ.get(name, 'none') for name in ('OMP_NUM_THREADS', 'MALLOC_TOP_PAD_'))"


def test_measure_compares_all_ways_with_the_first_two(monkeypatch):
    command = [sys.executable, "-c", SAYS.format("'ready'", "'done'")]
    monkeypatch.setattr("benchmarks.side_by_side.Processes", lambda way, _: Processes(way, command))
    ways = {
        "one": Way(processes=1, threads=1),
        "other": Way(processes=1, threads=2),
        "two": Way(processes=2, threads=1),
    }
    found = measure("resnet8", ways, batch_size=8, num_steps=2, rounds=2)["ways"]
    assert list(found) == list(ways)
    for row in found.values():
        assert row["images_per_second"] > 0
        assert list(row["times_as_fast_as"]) == ["one", "other"]
    assert found["one"]["times_as_fast_as"]["one"]["median"] == 1


def test_processes_have_the_threads_and_pages_of_their_way(capfd, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    command = [sys.executable, "-c", SAYS.format(VARIABLES, "'done'")]
    for way, wanted in (
        (Way(processes=1, threads=2), f"2 {2**26}"),
        (Way(processes=1, threads=None, keeps_pages=False), "none none"),
    ):
        with (
            pytest.raises(InputError, match=f"answered '{wanted}', wanted 'ready'"),
            Processes(way, command) as running,
        ):
            running.wait()
    assert capfd.readouterr().err == ""


@pytest.mark.skipif(len(ways_of(available_cores())) < 5, reason="processes cannot be pinned here")
def test_pinned_processes_have_a_core_each():
    command = [sys.executable, "-c", "import os, sys; sys.stdin.read(); print(len(os.sched_getaffinity(0)))"]
    way = ways_of(available_cores())[f"{available_cores()} processes, pinned"]
    with Processes(way, command) as running:
        process = running._processes[0]
        assert process.communicate()[0] == "1\n"


def test_a_process_that_dies_is_named():
    with Processes(Way(processes=1, threads=1), [sys.executable, "-c", "print('ready')"]) as running:
        running.wait()
        with pytest.raises(InputError, match="answered '', wanted 'done': it has died"):
            running.train()


def test_serve_trains_once_for_each_line(monkeypatch, capsys):
    monkeypatch.setattr("benchmarks.side_by_side.EXAMPLES", 32)
    monkeypatch.setattr("sys.stdin", io.StringIO("train\ntrain\n"))
    serve("resnet8", 8, 2)
    assert capsys.readouterr().out.splitlines() == ["ready", "done", "done"]
