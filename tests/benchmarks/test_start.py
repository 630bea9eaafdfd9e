import os
import sys

import pytest
from benchmarks.start import COLD, MARKS, PLAIN, WARM, measure, train

from benchmarks import start
from soteacher.errors import InputError

CASE = ("student", "kd", "resnet14", "resnet8", "8")


def test_train_says_what_it_has_reached(capsys):
    train(*CASE, "false")
    assert capsys.readouterr().out.splitlines() == list(MARKS)


def test_step_seconds_are_those_of_both_ways(monkeypatch):
    built = []
    monkeypatch.setattr(start, "_training", lambda *_, compiled: built.append(compiled) or (lambda: None))
    seconds = start.step_seconds(CASE, rounds=2)
    assert built == [False, True]
    assert {way: len(times) for way, times in seconds.items()} == {PLAIN: 2, WARM: 2}


def test_measure_divides_what_compiling_takes_by_what_a_step_saves(monkeypatch):
    started = []

    def found(case, *, compiled, threads):
        started.append((tuple(case), compiled, threads, os.environ[start.CACHE]))
        first = 60.0 if len(started) == 1 else 14.0 if compiled else 8.0
        return {"imported": 4.0, "made": 5.0, "first step": first}

    monkeypatch.setattr(start, "start", found)
    monkeypatch.setattr(start, "step_seconds", lambda *_, **__: {PLAIN: [0.3, 0.3, 0.3], WARM: [0.25, 0.25, 0.25]})
    monkeypatch.delenv(start.CACHE, raising=False)
    figures = measure(CASE, threads=2, rounds=2, rounds_of_steps=3)
    assert figures["steps_until_worth_it"] == pytest.approx({WARM: 6 / 0.05, COLD: 52 / 0.05})
    assert figures["step_times_as_fast"]["median"] == pytest.approx(1.2)
    assert figures["meets_target"] is True
    assert figures["seconds_to"][COLD] == {"imported": 4.0, "made": 5.0, "first step": 60.0}
    assert [compiled for _, compiled, _, _ in started].count(False) == 2
    assert len({folder for *_, folder in started}) == 1  # the later ones find what the first has left
    assert start.CACHE not in os.environ


def test_start_reads_the_marks_of_a_process(monkeypatch):
    class Process(start.subprocess.Popen):
        def __init__(self, command, **settings):
            assert command[1:] == ["-m", "benchmarks.start", "train", *CASE, "true"]
            assert os.environ["OMP_NUM_THREADS"] == "3"
            words = "\\n".join(said)
            super().__init__([sys.executable, "-c", f"print('{words}')"], **settings)

    monkeypatch.setattr(start.subprocess, "Popen", Process)
    said = list(MARKS)
    seconds = start.start(CASE, compiled=True, threads=3)
    assert list(seconds) == said
    assert 0 < seconds["imported"] <= seconds["made"] <= seconds["first step"]
    said.pop()
    with pytest.raises(InputError, match=r"ended with status 0 after \['imported', 'made'\]"):
        start.start(CASE, compiled=True, threads=3)
