"""How far the best epoch on the test images lies above the last, in training logs that others have released."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from statistics import fmean

from soteacher.errors import InputError
from soteacher.reference.table import fraction, read_rows

FILE = "best_and_last.csv"
COLUMNS = ("data", "log", "epochs", "best_percent", "last_percent", "mean_last_10_percent", "source")


@dataclass(frozen=True, slots=True, kw_only=True)
class BestLastGap:
    """Accuracy of the best epoch on the test images minus that of the last, over a number of logs."""

    num_logs: int
    """Training logs that it was computed from."""
    mean: float
    """Mean over the logs, a fraction."""
    highest: float
    """The largest, a fraction."""


def read_gap(text: str, *, origin: str) -> BestLastGap:
    """Return the gap between best and last epoch in a table of training logs.

    Args:
        text: the CSV file's text; accuracies are in per cent there.
        origin: the file, for messages.

    Raises:
        InputError: a line that cannot be used, a best epoch below the last, or no line at all.
    """
    gaps: list[float] = []
    for place, row in read_rows(text, COLUMNS, origin=origin):
        best, last = (fraction(row, column, place) for column in ("best_percent", "last_percent"))
        if best < last:
            raise InputError(
                f"{place}: best_percent {row['best_percent']} lies below last_percent {row['last_percent']}"
            )
        gaps.append(best - last)
    if not gaps:
        raise InputError(f"{origin} has no logs; wanted at least one")
    return BestLastGap(num_logs=len(gaps), mean=fmean(gaps), highest=max(gaps))


@cache
def gap_best_last() -> BestLastGap:
    """Return how far the best epoch lies above the last in released logs.

    Source: the logs in the repository sunshangquan/logit-standardization-KD: KD, DKD and MLKD with standardised logits,
    40 on CIFAR-100 and one on ImageNet.
    """
    return read_gap((files("soteacher.reference") / FILE).read_text(encoding="utf-8"), origin=FILE)
