"""Contrastive representation distillation together with knowledge distillation."""

from __future__ import annotations

from soteacher.objective import Method

METHOD = Method(
    name="crd_kd",
    role="student",
    title="Contrastive representation distillation, and the teacher's softened predictions",
    venue="ICLR 2020",
    source="Tian, Krishnan and Isola, ICLR 2020, arXiv:1910.10699; settings as released",
    differs="As crd.",
    terms={
        "cross_entropy": {"weight": 1.0},
        "kd": {"weight": 1.0, "temperature": 4.0},
        "crd": {"weight": 0.8},
    },
)
