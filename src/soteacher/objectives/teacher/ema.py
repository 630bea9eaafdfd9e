"""The teacher is an exponential moving average of its own weights over the steps."""

from __future__ import annotations

from soteacher.objective import Method

METHOD = Method(
    name="ema",
    role="teacher",
    title="Cross-entropy alone; the weights are averaged over the steps, older ones counting ever less",
    venue="NIPS 2017",
    source="Tarvainen and Valpola (mean teacher), NIPS 2017, arXiv:1703.01780, without its consistency loss",
    differs="The average begins after 150 of 240 epochs, and the statistics of batch normalisation are estimated anew.",
    terms={"cross_entropy": {}},
    training={"averaging": {"name": "ema", "decay": 0.999, "start": 150 / 240}},
)
