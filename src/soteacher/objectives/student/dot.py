"""Distillation-oriented training: knowledge distillation, whose gradient has a momentum of its own."""

from __future__ import annotations

from soteacher.objective import Method

METHOD = Method(
    name="dot",
    role="student",
    title="Knowledge distillation whose gradient has more momentum than that of the labels",
    venue="ICCV 2023",
    source="Zhao, Cui, Song and Liang, ICCV 2023, arXiv:2307.08436; weights and momenta as released for CIFAR-100",
    differs="Weights that only the distillation reaches are decayed from the first step on, theirs from the second.",
    terms={"cross_entropy": {"weight": 0.1}, "kd": {"weight": 0.9, "temperature": 4.0}},
    training={"optimizer": {"momentum_difference": 0.075}},
)
