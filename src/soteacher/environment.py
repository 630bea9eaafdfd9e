"""What numbers depend on besides the settings: machine, versions, commit."""

from __future__ import annotations

import ctypes
import os
import platform
import subprocess
import sys
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


KEPT_PAGES = {"MALLOC_MMAP_THRESHOLD_": 2**30, "MALLOC_TRIM_THRESHOLD_": 2**31 - 1, "MALLOC_TOP_PAD_": 2**26}
"""For glibc: keep freed pages. A step frees and asks for the same memory, and to get it anew each time costs time."""
_PARAMETERS = {"MALLOC_TRIM_THRESHOLD_": -1, "MALLOC_TOP_PAD_": -2, "MALLOC_MMAP_THRESHOLD_": -3}
"""Their numbers in ``malloc.h``."""


def keep_pages() -> bool:
    """Let this process keep the pages that it frees, as :data:`KEPT_PAGES` says, and return whether it does.

    What the user's environment says of them stays. Only glibc can be told.
    """
    tell = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if tell is None:
        return False
    told = [tell(_PARAMETERS[name], value) for name, value in KEPT_PAGES.items() if name not in os.environ]
    return all(told)  # of all, where one is refused: glibc before 2.35 takes no threshold above 32 MiB


class PeakMemory:
    """The most memory in use from now on, beyond what is in use now."""

    def __init__(self, device: str) -> None:
        """``cuda`` counts what PyTorch has allocated there, ``cpu`` the resident memory of this process."""
        self._device = device
        if device == "cuda":
            torch.cuda.reset_peak_memory_stats()
            self._before: int | None = torch.cuda.memory_allocated()
        else:
            self._before = _resident_bytes("VmRSS") if _forget_high_water_mark() else None

    def bytes(self) -> int | None:
        """Return the bytes; ``None`` where the system does not tell."""
        if self._before is None:
            return None
        peak = torch.cuda.max_memory_allocated() if self._device == "cuda" else _resident_bytes("VmHWM")
        return None if peak is None else max(0, peak - self._before)


def _forget_high_water_mark() -> bool:
    """Let Linux count the process's peak anew, and say whether it does.

    Freed pages go back first: a process that keeps them for its next network would need nothing more for it.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc's
    if trim is not None:
        trim(0)
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # see proc(5)
    except OSError:
        return False
    return True


def _resident_bytes(key: str) -> int | None:
    """Return ``VmRSS``, what is resident, or ``VmHWM``, the most that was."""
    for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines():
        if line.startswith(f"{key}:"):
            return 1024 * int(line.split()[1])
    return None
