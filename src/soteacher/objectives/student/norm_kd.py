"""NORM together with knowledge distillation."""

from __future__ import annotations

from soteacher.objective import Method

METHOD = Method(
    name="norm_kd",
    role="student",
    title="NORM, and the teacher's softened predictions",
    venue="ICLR 2023",
    source="Liu, Li, Li and Yao, ICLR 2023, arXiv:2305.13803",
    differs=(
        "As norm. The authors' weight of the softened predictions is not known to us; 0.9 is RepDistiller's beside "
        "labels of weight 0.1."
    ),
    terms={
        "cross_entropy": {"weight": 0.1},
        "kd": {"weight": 0.9, "temperature": 4.0},
        "norm": {"weight": 1.0, "ramp": "warmup"},
    },
)
