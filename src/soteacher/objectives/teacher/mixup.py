"""A teacher of images that are weighted means of two."""

from __future__ import annotations

from soteacher.objective import Method

METHOD = Method(
    name="mixup",
    role="teacher",
    title="Cross-entropy on weighted means of two images, with both labels by their weights",
    venue="ICLR 2018",
    source="Zhang, Cisse, Dauphin and Lopez-Paz, ICLR 2018, arXiv:1710.09412; the released code's default for CIFAR",
    differs="Optimiser and schedule are the study's own; the released code takes weight decay 1e-4 and 200 epochs.",
    terms={"cross_entropy": {}},
    training={"mixing": {"name": "mixup", "alpha": 1.0}},
)
