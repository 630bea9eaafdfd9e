"""The state of an unfinished training: one file, written whole, from which it goes on bit for bit."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from soteacher.errors import InputError
from soteacher.files import write_tensors
from soteacher.objective import Term
from soteacher.train.averaging import WeightAverage

FILE_NAME = "state.safetensors"


@dataclass(slots=True)
class Position:
    """How far a training has come, and what it has measured on the way."""

    epoch: int = 0
    """The epoch under way, from 0; equal to the number of finished ones."""
    step: int = 0
    """Finished steps of that epoch."""
    history: list[dict[str, Any]] = field(default_factory=list[dict[str, Any]])
    """One line of figures for each finished epoch."""
    sums: list[float] = field(default_factory=list[float])
    """Running sums of the epoch under way."""
    seconds: float = 0.0
    """Training time of the epoch under way so far."""


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """Where the state of one training lies, and which training it belongs to."""

    folder: Path
    fingerprint: str
    """Checksum of everything that decides the numbers; another one is refused on resume."""

    @property
    def path(self) -> Path:
        """The state's file."""
        return self.folder / FILE_NAME

    def history(self) -> list[dict[str, Any]]:
        """Return the figures of the epochs that the saved state has behind it; none where nothing usable was saved."""
        try:
            with safe_open(self.path, framework="pt") as file:  # pyright: ignore[reportUnknownVariableType] untyped
                return json.loads(file.metadata()["soteacher"])["history"]
        except (SafetensorError, OSError, KeyError, TypeError, ValueError):
            return []

    def save(
        self,
        position: Position,
        *,
        network: nn.Module,
        optimizer: torch.optim.Optimizer,
        terms: Sequence[Term[Any]],
        average: WeightAverage | None = None,
    ) -> None:
        """Write the state atomically."""
        tensors = {f"network.{name}": tensor for name, tensor in network.state_dict().items()}
        numbers: dict[str, Any] = {}
        for index, values in optimizer.state_dict()["state"].items():
            for key, value in values.items():
                (tensors if isinstance(value, Tensor) else numbers)[f"optimizer.{index}.{key}"] = value
        for term in terms:
            prefix = f"objective.{term.objective.name}"
            tensors |= {f"{prefix}.{name}": tensor for name, tensor in term.objective.state_dict().items()}
        if average is not None:
            tensors |= {f"average.{name}": tensor for name, tensor in average.state().items()}
        facts = {
            "fingerprint": self.fingerprint, "optimizer": numbers, "epoch": position.epoch, "step": position.step,
            "history": position.history, "sums": position.sums, "seconds": position.seconds,
        }  # fmt: skip
        write_tensors(self.path, tensors, {"soteacher": json.dumps(facts)})

    def load(
        self,
        *,
        network: nn.Module,
        optimizer: torch.optim.Optimizer,
        terms: Sequence[Term[Any]],
        average: WeightAverage | None = None,
    ) -> Position | None:
        """Put a saved state into the training's parts and return its position; ``None`` where nothing was saved.

        Raises:
            InputError: the file cannot be read, or belongs to a training with other settings.
        """
        if not self.path.exists():
            return None
        try:
            with safe_open(self.path, framework="pt") as file:  # pyright: ignore[reportUnknownVariableType] untyped
                facts = json.loads(file.metadata()["soteacher"])
                tensors: dict[str, Tensor] = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 no dict
        except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
            raise InputError(
                f"{self.path} is no readable training state ({error}); remove it to train this network from its start"
            ) from None
        if facts["fingerprint"] != self.fingerprint:
            raise InputError(f"{self.path} belongs to a training with other settings; use another folder, or remove it")
        network.load_state_dict(_part(tensors, "network"))
        _load_optimizer(optimizer, _part(tensors, "optimizer"), facts["optimizer"])
        for term in terms:
            term.objective.load_state_dict(_part(tensors, f"objective.{term.objective.name}"))
        if average is not None:
            average.load(_part(tensors, "average"))
        return Position(**{key: facts[key] for key in ("epoch", "step", "history", "sums", "seconds")})

    def remove(self) -> None:
        """Remove the state of a training that has finished."""
        self.path.unlink(missing_ok=True)
        if self.folder.is_dir() and not any(self.folder.iterdir()):
            self.folder.rmdir()


def _part(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name[len(prefix) + 1 :]: tensor for name, tensor in tensors.items() if name.startswith(prefix + ".")}


def _load_optimizer(optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor], numbers: dict[str, Any]) -> None:
    """Put back the optimiser's memory, each tensor in its parameter's own memory layout: fused kernels depend on it."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for name, value in tensors.items():
        index, key = name.split(".", 1)
        parameter: Tensor = parameters[int(index)]
        if value.shape == parameter.shape:
            value = torch.empty_like(parameter).copy_(value)
        optimizer.state[parameter][key] = value.to(parameter.device)
    for name, number in numbers.items():
        _, index, key = name.split(".", 2)
        optimizer.state[parameters[int(index)]][key] = number
