"""The control that changes nothing but how sure a teacher is: one temperature, fitted on held-out training images."""

from __future__ import annotations

from soteacher.objective import Method

METHOD = Method(
    name="temperature_calibrated",
    role="teacher",
    title="Cross-entropy alone on nine tenths of the images; one temperature is fitted on the others",
    venue="ICML 2017",
    source="Guo et al., ICML 2017, arXiv:1706.04599, section 4.2",
    differs=(
        "The temperature is part of the network: its last layer is divided by it. The held-out images are training "
        "images, so the test split selects nothing."
    ),
    terms={"cross_entropy": {}},
    training={"held_out": 0.1, "calibrate": True},
)
