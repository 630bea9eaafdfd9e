import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from soteacher.errors import InputError
from soteacher.train.logs import open_loggers


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
    assert calls[0]["id"] == "study-run-students-kd-seed0"
    assert calls[0]["resume"] == "allow"
    assert calls[1:] == [({"train_loss": 0.5}, 3), "finished"]


def test_mlflow_gets_every_figure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Any] = []
    client = SimpleNamespace(
        create_run=lambda experiment, run_name: SimpleNamespace(
            info=SimpleNamespace(run_id=f"{experiment}/{run_name}")
        ),
        log_metric=lambda run, key, value, step: calls.append((run, key, value, step)),
        set_terminated=calls.append,
    )
    mlflow = SimpleNamespace(
        MlflowClient=lambda: client, set_experiment=lambda name: SimpleNamespace(experiment_id=f"id of {name}")
    )
    monkeypatch.setitem(sys.modules, "mlflow", mlflow)
    (logger,) = open_loggers(["mlflow"], tmp_path, "name", start_epoch=0)
    logger.log({"train_loss": 0.5, "test_ece": 0.1}, epoch=3)
    logger.close()
    run = "id of soteacher/name"
    assert calls == [(run, "train_loss", 0.5, 3), (run, "test_ece", 0.1, 3), run]


@pytest.mark.parametrize("name", ["wandb", "mlflow"])
def test_a_logger_without_its_package_says_how_to_get_it(
    name: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(InputError, match=rf"pip install 'soteacher\[{name}\]'"):
        open_loggers([name], tmp_path, "name", start_epoch=0)
