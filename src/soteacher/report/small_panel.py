"""A panel of a few marks in some hundred characters each, where there are too many panels for full charts."""

from __future__ import annotations

import html
from collections.abc import Sequence
from dataclasses import dataclass

from soteacher.report.card_tables import figure

WIDTH, HEIGHT, LEFT, BOTTOM, ROOM = 200, 130, 44, 112, 8
SHAPES = {
    "o": "m-4 0a4 4 0 1 0 8 0a4 4 0 1 0-8 0",
    "s": "m-4-4h8v8h-8z",
    "D": "m0-5l5 5l-5 5l-5-5z",
    "^": "m0-5l5 9h-10z",
    "v": "m0 5l5-9h-10z",
    "P": "m-2-5h4v3h3v4h-3v3h-4v-3h-3v-4h3z",
}
"""Marks by the names that matplotlib has for them, drawn from their centre."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Mark:
    """One mark of a panel."""

    across: float
    up: float
    colour: str
    shape: str
    """A key of :data:`SHAPES`."""
    title: str
    """Whose it is; browsers show it when the mark is pointed at."""


def small_panel(marks: Sequence[Mark], *, title: str) -> str:
    """Return a labelled SVG element: the marks, and the least and the largest value at each of two lines.

    Args:
        marks: at least one.
        title: what it shows.
    """
    across, up = [mark.across for mark in marks], [mark.up for mark in marks]
    parts = [
        f'<path d="M{LEFT} 4V{BOTTOM}H{WIDTH - 2}" fill="none" stroke="currentColor"/>',
        f'<text x="{LEFT - 4}" y="{12 + ROOM}" text-anchor="end">{max(up):.2f}</text>',
        f'<text x="{LEFT - 4}" y="{BOTTOM - ROOM}" text-anchor="end">{min(up):.2f}</text>',
        f'<text x="{LEFT}" y="{BOTTOM + 13}">{figure(min(across))}</text>',
        f'<text x="{WIDTH - 2}" y="{BOTTOM + 13}" text-anchor="end">{figure(max(across))}</text>',
    ]
    for mark in marks:
        x = LEFT + ROOM + (WIDTH - 2 - LEFT - 2 * ROOM) * _share(mark.across, across)
        y = BOTTOM - ROOM - (BOTTOM - 4 - 2 * ROOM) * _share(mark.up, up)
        parts.append(
            f'<path fill="{mark.colour}" d="M{x:.1f} {y:.1f}{SHAPES[mark.shape]}">'
            f"<title>{html.escape(mark.title)}</title></path>"
        )
    label = html.escape(title)
    return (
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{label}" font-size="10" fill="currentColor">'
        f"{''.join(parts)}</svg>"
    )


def _share(value: float, values: Sequence[float]) -> float:
    """Return where a value lies between the least and the largest, 0 to 1; in the middle where all are equal."""
    least, largest = min(values), max(values)
    return (value - least) / (largest - least) if largest > least else 0.5
