"""What numbers depend on besides the settings: machine, versions, commit."""

from __future__ import annotations

import platform
import subprocess
from pathlib import Path
from typing import Any

import torch


def environment(device: str, threads: int) -> dict[str, Any]:
    """Return the facts of this machine that belong beside a number.

    Args:
        device: ``cpu`` or ``cuda``.
        threads: of arithmetic in each process.

    Returns:
        ``python``, ``torch``, ``device`` (the processor's or GPU's name), ``threads`` and ``commit``.
    """
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "device": torch.cuda.get_device_name() if device == "cuda" else _processor(),
        "threads": threads,
        "commit": _commit(),
    }


def _processor() -> str:
    information = Path("/proc/cpuinfo")
    if information.exists():
        for line in information.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _commit() -> str | None:
    """Return the commit of this package's sources, with ``+`` where files differ from it.

    ``None`` where the sources are in no repository, or only lie within one.
    """
    here = Path(__file__)
    is_tracked = ["ls-files", "--error-unmatch", here.name]
    describe = ["describe", "--always", "--abbrev=40", "--exclude=*", "--dirty=+"]
    try:
        for command in (is_tracked, describe):
            answer = subprocess.run(["git", *command], cwd=here.parent, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return answer.stdout.strip()


def reset_peak_memory(device: str) -> None:
    """Let :func:`peak_memory_bytes` count from now on, where the system allows it."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    elif _CLEAR.exists():
        try:
            _CLEAR.write_text("5")  # resets the high-water mark of the resident memory; see proc(5)
        except OSError:
            return


def peak_memory_bytes(device: str) -> int | None:
    """Return the most memory that was in use since the last reset.

    Args:
        device: ``cuda``: what PyTorch had allocated there; ``cpu``: the resident memory of the whole process.

    Returns:
        Bytes; ``None`` where the system does not say it.
    """
    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    if _CLEAR.exists():
        for line in _CLEAR.with_name("status").read_text(encoding="utf-8").splitlines():
            if line.startswith("VmHWM:"):
                return 1024 * int(line.split()[1])
    return None


_CLEAR = Path("/proc/self/clear_refs")
