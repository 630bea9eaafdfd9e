"""Curves to where the user looks at them: TensorBoard, Weights & Biases, MLflow."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any, Literal, Protocol

from soteacher.errors import InputError

LoggerName = Literal["tensorboard", "wandb", "mlflow"]


class Logger(Protocol):
    """Takes the figures of every epoch. Changes nothing in the run."""

    def log(self, figures: Mapping[str, float], *, epoch: int) -> None:
        """Record the figures of an epoch, counted from 0."""
        ...

    def close(self) -> None:
        """Write out what is still held."""
        ...


def _import(module: str, extra: str) -> Any:
    try:
        return import_module(module)
    except ImportError:
        raise InputError(f"logging to {extra} needs its package: pip install 'soteacher[{extra}]'") from None


class TensorBoardLogger:
    """Event files beside the network; ``tensorboard --logdir RUN`` shows them."""

    def __init__(self, folder: Path, name: str, start_epoch: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        del name  # TensorBoard names a run by its folder
        self._writer = SummaryWriter(str(folder / "tensorboard"), purge_step=start_epoch)

    def log(self, figures: Mapping[str, float], *, epoch: int) -> None:
        """Write each figure as a scalar."""
        for key, value in figures.items():
            self._writer.add_scalar(key, value, epoch)

    def close(self) -> None:
        """End the run."""
        self._writer.close()


class WandbLogger:
    """A Weights & Biases run named after the network, resumed under the same id."""

    def __init__(self, folder: Path, name: str, start_epoch: int) -> None:
        del start_epoch  # Weights & Biases drops steps it has already seen
        wandb = _import("wandb", "wandb")
        self._run = wandb.init(
            project="soteacher", name=name, id=name.replace("/", "-"), dir=str(folder), resume="allow"
        )

    def log(self, figures: Mapping[str, float], *, epoch: int) -> None:
        """Send the figures of an epoch."""
        self._run.log(dict(figures), step=epoch)

    def close(self) -> None:
        """End the run."""
        self._run.finish()


class MLflowLogger:
    """An MLflow run named after the network."""

    def __init__(self, folder: Path, name: str, start_epoch: int) -> None:
        del folder, start_epoch  # MLflow's own tracking address decides where the figures go
        mlflow = _import("mlflow", "mlflow")
        self._client = mlflow.MlflowClient()
        experiment = mlflow.set_experiment("soteacher")
        self._run_id: str = self._client.create_run(experiment.experiment_id, run_name=name).info.run_id

    def log(self, figures: Mapping[str, float], *, epoch: int) -> None:
        """Write each figure as a scalar."""
        for key, value in figures.items():
            self._client.log_metric(self._run_id, key, value, step=epoch)

    def close(self) -> None:
        """End the run."""
        self._client.set_terminated(self._run_id)


_LOGGERS = {"tensorboard": TensorBoardLogger, "wandb": WandbLogger, "mlflow": MLflowLogger}


def open_loggers(names: Sequence[LoggerName], folder: Path, name: str, *, start_epoch: int) -> list[Logger]:
    """Return the loggers of one network.

    Args:
        names: which ones.
        folder: the network's folder.
        name: the network's name in the study, for example ``students/soteacher-kd/seed0``.
        start_epoch: first epoch that will be logged; later ones of a killed run are dropped where possible.

    Raises:
        InputError: a logger's package is not installed.
    """
    return [_LOGGERS[logger](folder, name, start_epoch) for logger in names]
