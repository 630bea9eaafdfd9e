"""A teacher of smoothed labels: good by itself, and known as a poor one to learn from."""

from __future__ import annotations

from soteacher.objective import Method

METHOD = Method(
    name="label_smoothing",
    role="teacher",
    title="Cross-entropy with smoothed labels, which makes teachers that are harder to learn from",
    venue="NeurIPS 2019",
    source=(
        "Mueller, Kornblith and Hinton, NeurIPS 2019, arXiv:1906.02629; smoothing 0.1 as in Szegedy et al., CVPR 2016, "
        "arXiv:1512.00567"
    ),
    terms={"cross_entropy": {"label_smoothing": 0.1}},
)
"""The negative control.

Mueller et al. find such teachers as accurate and better calibrated, and their students worse: smoothing draws the
examples of a class together, and the logits lose what an example has in common with other classes.
"""
