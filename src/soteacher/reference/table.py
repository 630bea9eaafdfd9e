"""The package's tables: CSV files whose first line names exactly the columns that are wanted."""

from __future__ import annotations

import csv
from collections.abc import Iterator, Sequence

from soteacher.errors import InputError


def read_rows(text: str, columns: Sequence[str], *, origin: str) -> Iterator[tuple[str, dict[str, str]]]:
    """Yield every line of a table with its place: ``origin, line N``, for messages.

    Args:
        text: the CSV file's text.
        columns: the names of its columns, in order.
        origin: the file, for messages.

    Raises:
        InputError: other columns, or a line with more or fewer values than columns.
    """
    reader = csv.reader(text.splitlines())
    heading = next(reader, [])
    if heading != list(columns):
        raise InputError(f"{origin} has the columns {', '.join(heading) or 'none'}; wanted {', '.join(columns)}")
    for values in reader:
        place = f"{origin}, line {reader.line_num}"
        if len(values) != len(columns):
            raise InputError(f"{place} has {len(values)} values; wanted {len(columns)}")
        yield place, dict(zip(columns, values, strict=True))


def fraction(row: dict[str, str], column: str, place: str) -> float:
    """Return a column's number of per cent, in [0, 100], as a fraction.

    Raises:
        InputError: no number, or one outside.
    """
    try:
        value = float(f"{row[column]}e-2")  # the nearest float, which a division would miss by a bit
    except ValueError:
        raise InputError(f"{place}: {column} must be a number, got {row[column]!r}") from None
    if not 0 <= value <= 1:
        raise InputError(f"{place}: {column} must lie in [0, 100], got {row[column]}")
    return value
