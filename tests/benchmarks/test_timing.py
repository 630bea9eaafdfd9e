import argparse
import json
import sys

import pytest
import torch

from benchmarks import timing
from soteacher.errors import InputError


def test_variants_take_turns_in_going_first_and_warm_up_does_not_count():
    called: list[str] = []
    seconds = timing.alternate({name: lambda name=name: called.append(name) for name in "abc"}, rounds=3, warm_up=1)
    assert "".join(called) == "abc" + "bca" + "cab" + "abc"
    assert {name: len(times) for name, times in seconds.items()} == {"a": 3, "b": 3, "c": 3}


def test_every_clock_is_read_around_every_call():
    ticks = iter(range(100))
    clocks = {"wall": lambda: float(next(ticks)), "still": lambda: 7.0}
    seconds = timing.alternate_clocks({"a": lambda: next(ticks), "b": lambda: None}, clocks, rounds=2, warm_up=0)
    assert seconds == {"wall": {"a": [2.0, 2.0], "b": [1.0, 1.0]}, "still": {"a": [0.0, 0.0], "b": [0.0, 0.0]}}


def test_ratio_is_above_one_where_the_other_is_faster():
    seconds = {"slow": [2.0, 6.0, 12.0], "fast": [1.0, 2.0, 3.0]}
    assert timing.ratio(seconds, "slow", "fast") == {"median": 3.0, "quartile_low": 2.0, "quartile_high": 4.0}
    assert timing.ratio(seconds, "fast", "slow")["median"] == pytest.approx(1 / 3)
    assert timing.spread(timing.ratio(seconds, "slow", "fast"), 1) == "3.0 (2.0 to 4.0)"


@pytest.fixture
def command_line(monkeypatch):
    threads = torch.get_num_threads()

    def parse(*words: str) -> argparse.Namespace:
        monkeypatch.setattr(sys, "argv", ["benchmark", *words])
        return timing.checked(timing.arguments("What is measured.", rounds=5, batch_size=16, threads=1))

    yield parse
    torch.set_num_threads(threads)


def test_arguments_have_their_defaults_and_set_the_threads(command_line):
    given = command_line()
    assert (given.rounds, given.batch_size, given.threads, given.json) == (5, 16, 1, None)
    assert command_line("--threads", "2").threads == torch.get_num_threads() == 2


@pytest.mark.parametrize("words", [("--rounds", "1"), ("--batch-size", "1"), ("--threads", "0")])
def test_arguments_out_of_their_bounds_are_refused(command_line, words, capsys):
    with pytest.raises(SystemExit):
        command_line(*words)
    assert "of at least" in capsys.readouterr().err


def test_a_record_holds_settings_machine_and_results(tmp_path):
    path = tmp_path / "figures.json"
    timing.record(path, settings={"model": "resnet8"}, results={"ratio": 2.0}, threads=3)
    found = json.loads(path.read_text())
    assert (found["settings"], found["ratio"], found["machine"]["threads"]) == ({"model": "resnet8"}, 2.0, 3)
    assert found["machine"]["torch"] == torch.__version__
    timing.record(None, settings={}, results={}, threads=1)  # and without a path nothing


def test_the_peak_is_the_best_of_what_was_tried(monkeypatch):
    durations = iter([1.0, 1.0, 1.0, 1e-3])
    monkeypatch.setattr(timing, "_least_seconds", lambda _: next(durations))
    peak = timing.matrix_peak()
    assert peak["reached_by"].startswith("3 x 3 convolution")
    assert peak["operations_per_second"] == pytest.approx(2 * 32 * 32 * 32 * 128 * 128 * 9 * 1000)
    assert peak["all"]["product of 512 x 512 matrices"] == 2 * 512**3


def test_an_error_in_the_input_ends_with_one_line():
    def fail() -> None:
        raise InputError("examples is 3; wanted 64")

    with pytest.raises(SystemExit, match=r"^examples is 3; wanted 64$"):
        timing.run(fail)
