"""The control of every teacher method: cross-entropy alone."""

from __future__ import annotations

from soteacher.objective import Method

METHOD = Method(
    name="standard",
    role="teacher",
    title="Cross-entropy alone, as teachers are usually trained",
    source="common practice, the control of every comparison",
    terms={"cross_entropy": {}},
)
