"""A teacher assistant: a network of middle size that learns from the teacher and teaches the student."""

from __future__ import annotations

from soteacher.objective import Method

METHOD = Method(
    name="assistant",
    role="teacher",
    title="Teacher assistant: it learns from the teacher that the study names, and teaches the students itself",
    venue="AAAI 2020",
    source="Mirzadeh et al. (TAKD), AAAI 2020, arXiv:1902.03393; weights and temperature are those of kd",
    differs=(
        "Chains of any length are made by assistants that name assistants as their teacher. Any method that distils "
        "can take the place of this one."
    ),
    terms={"cross_entropy": {"weight": 0.5}, "kd": {"weight": 0.5, "temperature": 4.0}},
)
