"""The error that a user's input can cause, and the two ways in which a run ends too early."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches


class InputError(ValueError):
    """Input that cannot be used. The message is one line: what came, and what was wanted.

    The command line prints it and exits with status 2; in Python it is an ordinary ``ValueError``.
    """


class InterruptedRunError(Exception):
    """Training was asked to stop (Ctrl-C or SIGTERM) and left a state that can be resumed."""


class WorkerDiedError(Exception):
    """A worker process ended without a word: killed from outside, for want of memory, or by a bug of ours."""


def unknown_name(kind: str, name: str, known: Iterable[str]) -> InputError:
    """Return the error for a name that is not known, with the nearest known ones offered.

    Args:
        kind: what was named, for example ``"data set"``.
        name: what came.
        known: every name that would have been right.
    """
    names = sorted(known)
    near = get_close_matches(name, names, n=3, cutoff=0.5)
    hint = f"did you mean {' or '.join(near)}?" if near else f"known: {', '.join(names)}"
    return InputError(f"unknown {kind} {name!r}; {hint}")
