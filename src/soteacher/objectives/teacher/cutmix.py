"""A teacher of images with a rectangle of another one in them."""

from __future__ import annotations

from soteacher.objective import Method

METHOD = Method(
    name="cutmix",
    role="teacher",
    title="Cross-entropy on images with a rectangle of another one, with both labels by their areas",
    venue="ICCV 2019",
    source=(
        "Yun, Han, Oh, Chun, Choe and Yoo, ICCV 2019, arXiv:1905.04899; the released code's command for CIFAR-100: "
        "every second batch on average"
    ),
    differs="Optimiser and schedule are the study's own; the rectangle's sides need not be even numbers of pixels.",
    terms={"cross_entropy": {}},
    training={"mixing": {"name": "cutmix", "alpha": 1.0, "probability": 0.5}},
)
