import io
import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from soteacher import terminal
from soteacher.config import to_yaml
from soteacher.files import write_text
from soteacher.jobs import Job
from soteacher.recipes import read_study
from soteacher.statistics import summarise
from soteacher.terminal import DownloadBar, ProgressDisplay, print_results

JOB = Job("student", "standard-kd", 0)
EPOCH = {
    "event": "epoch", "epoch": 1, "epochs": 9, "train_loss": 0.5, "train_accuracy": 0.75, "test_accuracy": 0.625,
    "images_per_second": 1234.5,
}  # fmt: skip
STEP = {
    "event": "step", "epoch": 1, "epochs": 9, "step": 2, "steps_per_epoch": 3, "loss": 0.5, "accuracy": 0.75,
    "images_per_second": 1234.5,
}  # fmt: skip
FINISHED = {"event": "finished", "row": {"accuracy_last": 0.625, "train_accuracy": 0.75, "train_seconds": 12.3}}
EPOCH_LINE = "student standard-kd/seed0: epoch 2/9, loss 0.500, accuracy 75.0 % train, 62.5 % test, 1,234 images/s\n"
FINISHED_LINE = "student standard-kd/seed0: finished, test accuracy 62.50 % (train 75.00 %), 12 s\n"


@pytest.fixture
def on_terminal(monkeypatch: pytest.MonkeyPatch) -> io.StringIO:
    """Show everything on a terminal of 100 columns; return what it was sent."""
    screen = io.StringIO()
    console = Console(file=screen, force_terminal=True, width=100, color_system=None, legacy_windows=False)
    monkeypatch.setattr(terminal, "Console", lambda **_: console)
    return screen


@pytest.fixture
def run(tmp_path: Path, tiny_tree: Any) -> Path:
    """A run's folder that holds nothing but its settings."""
    write_text(tmp_path / "config.yaml", to_yaml(read_study(tiny_tree())))
    return tmp_path


def test_a_pipe_gets_plain_lines_and_the_log_the_same(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with ProgressDisplay(run) as display:
        for event in (STEP, EPOCH, STEP, FINISHED):
            display(JOB, event)
    assert capsys.readouterr().out == EPOCH_LINE + FINISHED_LINE
    assert (run / "log.txt").read_text() == EPOCH_LINE + FINISHED_LINE


@pytest.mark.parametrize(
    ("how", "line"),
    [
        (
            {"channels_last": True, "compiled": False, "threads": 1},
            "channels last, not compiled, 1 thread",
        ),
        (
            {"channels_last": False, "compiled": True, "threads": 8, "teacher": "live: the study keeps no answers"},
            "channels first, compiled, 8 threads, teacher live: the study keeps no answers",
        ),
        (
            {"channels_last": True, "compiled": True, "threads": 2, "teacher": "kept answers"},
            "channels last, compiled, 2 threads, teacher kept answers",
        ),
    ],
)
def test_the_log_says_how_a_network_is_run(
    run: Path, capsys: pytest.CaptureFixture[str], how: dict[str, Any], line: str
) -> None:
    with ProgressDisplay(run) as display:
        display(JOB, {"event": "started", "how": how})
    assert capsys.readouterr().out == ""
    assert (run / "log.txt").read_text() == f"student standard-kd/seed0: {line}\n"


def test_a_pipe_is_not_flooded_and_the_log_has_every_epoch(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with ProgressDisplay(run) as display:
        for epoch in range(3):
            display(JOB, EPOCH | {"epoch": epoch})
        display(Job("teacher", "standard", 0), EPOCH)
    assert [line.split(",")[0] for line in capsys.readouterr().out.splitlines()] == [
        "student standard-kd/seed0: epoch 1/9", "teacher standard/seed0: epoch 2/9",
    ]  # fmt: skip
    assert len((run / "log.txt").read_text().splitlines()) == 4


def test_the_log_of_a_resumed_run_goes_on(run: Path) -> None:
    for _ in range(2):
        with ProgressDisplay(run) as display:
            display(JOB, FINISHED)
    assert (run / "log.txt").read_text() == 2 * FINISHED_LINE


def test_nothing_is_written_where_nothing_happens(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with DownloadBar(), ProgressDisplay(tmp_path / "run"):
        pass
    assert list(tmp_path.iterdir()) == []
    assert capsys.readouterr().out == ""


def test_a_terminal_gets_bars(run: Path, on_terminal: io.StringIO) -> None:
    with DownloadBar() as bar, ProgressDisplay(run) as display:
        bar("archive.tar.gz", 1, 2)
        bar("archive.tar.gz", 2, 2)
        display(JOB, STEP)
    shown = on_terminal.getvalue()
    assert "archive.tar.gz" in shown
    assert "all 5 networks" in shown
    assert "2/9 loss 0.50 acc 75.0% 1,234 img/s" in shown
    with ProgressDisplay(run) as display:
        for event in (STEP, EPOCH, FINISHED):
            display(JOB, event)
    shown = on_terminal.getvalue()
    assert FINISHED_LINE.strip() in shown.replace("\n", " ")
    assert (run / "log.txt").read_text() == EPOCH_LINE + FINISHED_LINE


def test_a_download_that_does_not_end_makes_room_for_the_training(run: Path, on_terminal: io.StringIO) -> None:
    with DownloadBar() as bar, ProgressDisplay(run) as display:
        bar("archive.tar.gz", 1, None)
        display(JOB, STEP)
    assert "loss 0.50" in on_terminal.getvalue()


def test_a_download_into_a_pipe_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    with DownloadBar() as bar:
        for done in range(5):
            bar("archive.tar.gz", done, 4)
    assert capsys.readouterr().out == "archive.tar.gz\n"


def _row(role: str, arm: str, teacher: str | None, accuracy: float) -> dict[str, Any]:
    return {
        "role": role, "arm": arm, "teacher_arm": teacher, "method": "kd", "model": "resnet8", "data": "tiny", "seed": 0,
        "epochs": 2, "accuracy_last": accuracy,
    }  # fmt: skip


def test_results_show_every_arm_and_a_sentence_for_each_comparison(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [_row("teacher", "standard", None, 0.5), _row("student", "alone", None, 0.25)]
    rows.append(_row("student", "standard-kd", "standard", 0.75))
    results = {
        "rows": rows,
        "summary": summarise(rows, {"alone": "standard-kd", "standard-kd": None}),
        "skipped_images": [],
    }
    (tmp_path / "results.json").write_text(json.dumps(results))
    print_results(results, tmp_path)
    shown = capsys.readouterr().out
    assert "standard-kd" in shown
    assert "75.00" in shown
    assert "alone: 25.00 %" in shown
    assert shown.endswith(f"report: {tmp_path / 'report.html'}\n")


def test_results_show_costs_and_published_numbers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arms = {"kd": 0.1, "dkd": 0.25}
    pair = {"data": "cifar100", "model": "wrn_16_2", "extra_parameters": 0}
    rows = [_row("teacher", "standard", None, 0.75) | {"data": "cifar100", "model": "wrn_40_2", "method": "standard"}]
    for name, seconds in arms.items():
        row = _row("student", f"standard-{name}", "standard", 0.7)
        rows.append(row | pair | {"method": name, "seconds_per_step": seconds})
    config = {
        "data": {"source": "cifar100"},
        "teachers": {"standard": {"model": "wrn_40_2"}},
        "students": {name: {"model": "wrn_16_2", "method": name} for name in arms},
    }
    results = {
        "rows": rows, "skipped_images": [],
        "summary": summarise(rows, {"standard-kd": None, "standard-dkd": "standard-kd"}),
    }  # fmt: skip
    (tmp_path / "results.json").write_text(json.dumps(results))
    (tmp_path / "config.yaml").write_text(json.dumps(config))
    print_results(results, tmp_path)
    shown = capsys.readouterr().out
    assert "2.50" in shown  # steps of kd
    assert "76.24" in shown  # mdistiller's number for DKD on this pair


def test_results_of_teachers_alone_are_lines(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    skipped = ["a.png", "b.png", "c.png", "d.png"]
    rows = [_row("teacher", "soteacher", None, 0.5)]
    print_results({"rows": rows, "summary": [], "skipped_images": skipped}, tmp_path)
    shown = capsys.readouterr().out
    assert shown.startswith("soteacher/seed0: test accuracy 50.00 %\n")
    assert "left out 4 images that cannot be read: a.png, b.png, c.png ...\n" in shown
