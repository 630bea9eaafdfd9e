"""Stochastic weight averaging: the teacher is the mean of its own weights over the last epochs."""

from __future__ import annotations

from soteacher.objective import Method

METHOD = Method(
    name="swa",
    role="teacher",
    title="Cross-entropy alone; the weights after each of the last epochs are averaged",
    venue="UAI 2018",
    source="Izmailov et al., UAI 2018, arXiv:1803.05407",
    differs=(
        "The learning rate follows the study's schedule, where the paper goes on with a constant or cyclic one while "
        "it averages; set schedule for that."
    ),
    terms={"cross_entropy": {}},
    training={"averaging": {"name": "swa", "start": 150 / 240}},
)
