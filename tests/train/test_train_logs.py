import hashlib
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from soteacher.errors import InputError
from soteacher.train.logs import check_loggers, open_loggers


def _events(folder: Path) -> dict[str, dict[int, float]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    accumulator = EventAccumulator(str(folder))
    accumulator.Reload()
    return {
        tag: {event.step: event.value for event in accumulator.Scalars(tag)} for tag in accumulator.Tags()["scalars"]
    }


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_tensorboard_holds_every_epoch_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tensorboard.summary.writer import event_file_writer

    for start, values in ((0, (0.5, 0.25)), (1, (0.125, 0.0625))):  # the second starts where the kept state stands
        later = SimpleNamespace(time=lambda start=start: 1e9 + start)  # files are read in the order of their seconds
        monkeypatch.setattr(event_file_writer, "time", later)
        (logger,) = open_loggers(["tensorboard"], tmp_path, "run/students/kd/seed0", start_epoch=start)
        for epoch, value in enumerate(values, start=start):
            logger.log({"train_loss": value}, epoch=epoch)
        logger.close()
    assert _events(tmp_path / "tensorboard") == {"train_loss": {0: 0.5, 1: 0.125, 2: 0.0625}}


def test_wandb_gets_every_epoch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Any] = []
    run = SimpleNamespace(
        log=lambda figures, step: calls.append((figures, step)), finish=lambda: calls.append("finished")
    )

    def init(**settings: Any) -> SimpleNamespace:
        calls.append(settings)
        return run

    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=init))
    (logger,) = open_loggers(["wandb"], tmp_path, "study/run/students/kd/seed0", start_epoch=0)
    logger.log({"train_loss": 0.5}, epoch=3)
    logger.close()
    place = hashlib.blake2b(str(tmp_path.resolve()).encode(), digest_size=4).hexdigest()
    assert calls[0]["id"] == f"study-run-students-kd-seed0-{place}"
    assert calls[0]["resume"] == "allow"
    assert calls[1:] == [({"train_loss": 0.5}, 3), "finished"]


def test_wandb_keeps_runs_of_different_folders_apart_and_resumes_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids: list[str] = []
    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=lambda **settings: ids.append(settings["id"])))
    monkeypatch.chdir(tmp_path)
    for folder in (tmp_path / "monday" / "run", tmp_path / "tuesday" / "run", Path("monday/run")):
        open_loggers(["wandb"], folder, "study/run/students/kd/seed0", start_epoch=0)
    assert ids[0] != ids[1]
    assert ids[0] == ids[2]


class _MlflowError(Exception):
    pass


def _fake_mlflow(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Put a stand-in in the place of MLflow and return the list of what it is told."""
    calls: list[Any] = []
    runs: list[str] = []

    def create_run(experiment: str, run_name: str) -> SimpleNamespace:
        runs.append(f"{experiment}/{run_name}/{len(runs)}")
        return SimpleNamespace(info=SimpleNamespace(run_id=runs[-1]))

    def update_run(run: str, status: str) -> None:
        if run not in runs:
            raise _MlflowError
        calls.append((run, status))

    client = SimpleNamespace(
        create_run=create_run,
        update_run=update_run,
        log_metric=lambda run, key, value, step: calls.append((run, key, value, step)),
        set_terminated=lambda run: calls.append((run, "ended")),
    )
    mlflow = SimpleNamespace(
        MlflowClient=lambda: client,
        set_experiment=lambda name: SimpleNamespace(experiment_id=f"id of {name}"),
        exceptions=SimpleNamespace(MlflowException=_MlflowError),
    )
    monkeypatch.setitem(sys.modules, "mlflow", mlflow)
    return calls


def test_mlflow_gets_every_figure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = _fake_mlflow(monkeypatch)
    (logger,) = open_loggers(["mlflow"], tmp_path, "name", start_epoch=0)
    logger.log({"train_loss": 0.5, "test_ece": 0.1}, epoch=3)
    logger.close()
    run = "id of soteacher/name/0"
    assert calls == [(run, "train_loss", 0.5, 3), (run, "test_ece", 0.1, 3), (run, "ended")]


def test_mlflow_goes_on_in_its_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = _fake_mlflow(monkeypatch)
    for epoch in range(2):
        (logger,) = open_loggers(["mlflow"], tmp_path, "name", start_epoch=epoch)
        logger.log({"train_loss": 0.5}, epoch=epoch)
        logger.close()
    run = "id of soteacher/name/0"
    assert (tmp_path / "mlflow_run_id").read_text() == f"{run}\n"
    assert calls == [
        (run, "train_loss", 0.5, 0), (run, "ended"), (run, "RUNNING"), (run, "train_loss", 0.5, 1), (run, "ended"),
    ]  # fmt: skip


def test_mlflow_starts_a_new_run_where_its_own_is_gone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _fake_mlflow(monkeypatch)
    (tmp_path / "mlflow_run_id").write_text("of another server\n")
    open_loggers(["mlflow"], tmp_path, "name", start_epoch=1)
    assert (tmp_path / "mlflow_run_id").read_text() == "id of soteacher/name/0\n"


@pytest.mark.parametrize("name", ["wandb", "mlflow", "tensorboard"])
def test_a_logger_without_its_package_says_how_to_get_it(
    name: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, name, None)
    extra = "" if name == "tensorboard" else rf"\[{name}\]"
    with pytest.raises(InputError, match=rf"logging to {name} needs its package: pip install 'soteacher{extra}'"):
        check_loggers([name])
    with pytest.raises(InputError, match=rf"pip install 'soteacher{extra}'"):
        open_loggers([name], tmp_path, "name", start_epoch=0)
    assert not any(tmp_path.iterdir())


def test_check_loggers_takes_what_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace())
    check_loggers(["tensorboard", "wandb"])
    check_loggers([])


def test_check_loggers_imports_nothing() -> None:
    code = (
        "import sys; from soteacher.train.logs import check_loggers; check_loggers(['tensorboard']); "
        "sys.exit('tensorboard' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_folder_that_a_logger_left_behind_is_no_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    (tmp_path / "wandb").mkdir()
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    with pytest.raises(InputError, match="logging to wandb needs its package"):
        check_loggers(["wandb"])
