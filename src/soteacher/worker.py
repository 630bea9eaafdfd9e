"""A worker process: trains the networks of one run that it is told to, one after the other.

``python -m soteacher.worker RUN --device cpu --threads 1 [--data-root FOLDER]`` reads a network a line from standard
input (``{"role": "teacher", "arm": "standard", "seed": 0}``) and answers on standard output with events, one JSON a
line; the last of each network is ``done``, ``failed`` or ``stopped``. SIGTERM saves the state and ends the process, and
so does the end of the process that started it.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import Any, TextIO

from soteacher.errors import InputError, InterruptedRunError
from soteacher.files import unwritable


class _Stop:
    """Whether this process is to stop. An idle one leaves at once, a training one after its step."""

    def __init__(self) -> None:
        self.asked = False
        self.training = False
        self._parent = os.getppid()
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole terminal; the parent decides
        signal.signal(signal.SIGTERM, self._ask)

    def wanted(self) -> bool:
        """Return whether training must stop: somebody asked, or the parent is gone and its run may be resumed."""
        return self.asked or os.getppid() != self._parent

    def _ask(self, number: int, frame: FrameType | None) -> None:
        del number, frame
        self.asked = True
        if not self.training:
            raise SystemExit(0)


def main(arguments: Sequence[str] | None = None) -> None:
    """Serve until standard input ends."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("run", type=Path)
    parser.add_argument("--device", required=True)
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--data-root", type=Path)
    options = parser.parse_args(arguments)
    stop = _Stop()
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # whatever a library prints must not mix with the answers
    serve(options.run, options.device, options.threads, options.data_root, stop, answers)


def serve(run: Path, device: str, threads: int, data_root: Path | None, stop: _Stop, answers: TextIO) -> None:
    """Train networks as they are named."""
    import torch

    from soteacher.data import load_data
    from soteacher.jobs import Job, Study
    from soteacher.networks import train_network
    from soteacher.run_folder import read_config

    torch.set_num_threads(threads)
    config = read_config(run)
    study = Study(config, run, load_data(config.data, data_root), device)

    def answer(event: dict[str, Any]) -> None:
        try:
            answers.write(json.dumps(event) + "\n")
            answers.flush()
        except BrokenPipeError:  # the parent is gone: what is on disk is what a resumed run starts from
            os._exit(1)  # and nobody is left to be told of anything else

    for line in sys.stdin:
        stop.training = True
        try:
            train_network(
                study, Job(**json.loads(line)), on_event=lambda _, event: answer(event), should_stop=stop.wanted
            )
        except InterruptedRunError:
            answer({"event": "stopped"})
            return
        except InputError as error:
            answer({"event": "failed", "message": str(error)})
        except OSError as error:
            message = unwritable(error)
            if message is None:
                raise
            answer({"event": "failed", "message": message})
        else:
            answer({"event": "done"})
        stop.training = False
        if stop.asked:
            return


if __name__ == "__main__":
    main()
