"""The control of every teacher method: the standard training, left before the learning rate falls."""

from __future__ import annotations

from soteacher.objective import Method

METHOD = Method(
    name="early_stopped",
    role="teacher",
    title="Cross-entropy alone, stopped before the learning rate first falls (150 of 240 epochs)",
    venue="ICCV 2019",
    source="Cho and Hariharan (ESKD), ICCV 2019, arXiv:1910.01348; Wang et al. (CheckpointKD), NeurIPS 2022",
    differs=(
        "The point of the stop is that of the default schedule's first milestone, not one searched for. A study can "
        "take any other epoch of a teacher (from, with after or best), without a training of its own."
    ),
    terms={"cross_entropy": {}},
    training={"stop_after": 150 / 240},
)
