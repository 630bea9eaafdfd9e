"""Curves to where the user looks at them: TensorBoard, Weights & Biases, MLflow."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from hashlib import blake2b
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, Protocol

from soteacher.errors import InputError
from soteacher.files import write_text

LoggerName = Literal["tensorboard", "wandb", "mlflow"]


class Logger(Protocol):
    """Takes the figures of every epoch. Changes nothing in the run."""

    def log(self, figures: Mapping[str, float], *, epoch: int) -> None:
        """Record the figures of an epoch, counted from 0."""
        ...

    def close(self) -> None:
        """Write out what is still held."""
        ...


def check_loggers(names: Sequence[LoggerName]) -> None:
    """See to it that the packages of loggers are installed, without importing them.

    Raises:
        InputError: one is not.
    """
    for name in names:
        if not _installed(name):
            raise _missing(name)


def _installed(package: str) -> bool:
    if package in sys.modules:
        return sys.modules[package] is not None  # pyright: ignore[reportUnnecessaryComparison] None forbids the import
    spec = find_spec(package)
    # A folder of the package's name, such as Weights & Biases leaves behind, passes for a package without an origin.
    return spec is not None and spec.origin is not None


def _missing(name: str) -> InputError:
    extra = "" if name == "tensorboard" else f"[{name}]"
    return InputError(f"logging to {name} needs its package: pip install 'soteacher{extra}'")


def _import(name: LoggerName) -> Any:
    """Import a logger's package, which has its name."""
    check_loggers([name])
    try:
        return import_module(name)
    except ImportError:
        raise _missing(name) from None


class TensorBoardLogger:
    """Event files beside the network; ``tensorboard --logdir RUN`` shows them."""

    def __init__(self, folder: Path, name: str, start_epoch: int) -> None:
        check_loggers(["tensorboard"])
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
    """A Weights & Biases run named after the network, resumed under the same id.

    The id ends in a hash of the network's folder: two runs whose folders have the same last name stay apart.
    """

    def __init__(self, folder: Path, name: str, start_epoch: int) -> None:
        del start_epoch  # Weights & Biases drops steps it has already seen
        wandb = _import("wandb")
        place = blake2b(str(folder.resolve()).encode(), digest_size=4).hexdigest()
        self._run = wandb.init(
            project="soteacher", name=name, id=f"{name.replace('/', '-')}-{place}", dir=str(folder), resume="allow"
        )

    def log(self, figures: Mapping[str, float], *, epoch: int) -> None:
        """Send the figures of an epoch."""
        self._run.log(dict(figures), step=epoch)

    def close(self) -> None:
        """End the run."""
        self._run.finish()


class MLflowLogger:
    """An MLflow run named after the network, resumed by its id, which ``mlflow_run_id`` in the folder holds."""

    def __init__(self, folder: Path, name: str, start_epoch: int) -> None:
        del start_epoch  # MLflow keeps the figures of every epoch that it is told of
        mlflow = _import("mlflow")
        self._client = mlflow.MlflowClient()  # MLflow's own tracking address decides where the figures go
        kept = folder / "mlflow_run_id"
        self._run_id: str = self._reopened(mlflow, kept) or self._created(mlflow, name)
        write_text(kept, f"{self._run_id}\n")

    def _reopened(self, mlflow: Any, kept: Path) -> str | None:
        """Return the id of the run that this network had before, ``None`` where it had none that can go on."""
        if not kept.exists():
            return None
        run_id = kept.read_text(encoding="utf-8").strip()
        try:
            self._client.update_run(run_id, status="RUNNING")
        except mlflow.exceptions.MlflowException:  # the tracking address is another now, or the run was deleted
            return None
        return run_id

    def _created(self, mlflow: Any, name: str) -> str:
        experiment = mlflow.set_experiment("soteacher")
        return self._client.create_run(experiment.experiment_id, run_name=name).info.run_id

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
