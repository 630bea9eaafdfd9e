"""Logit standardisation with knowledge distillation: the student matches relations of logits, not their size."""

from __future__ import annotations

from soteacher.objective import Method

METHOD = Method(
    name="kd_standardized",
    role="student",
    title="Knowledge distillation on standardised logits",
    venue="CVPR 2024",
    source="Sun, Ren, Li, Wang and Cao, CVPR 2024, arXiv:2403.01427; weights and temperature as released",
    terms={"cross_entropy": {"weight": 0.1}, "kd": {"weight": 9.0, "temperature": 2.0, "standardize": True}},
)
