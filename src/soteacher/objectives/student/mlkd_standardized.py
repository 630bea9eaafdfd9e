"""Logit standardisation with multi-level logit distillation."""

from __future__ import annotations

from soteacher.objective import Method

# Temperature 2 takes the place of 4, so that the sum has it twice: what the authors' code does.
METHOD = Method(
    name="mlkd_standardized",
    role="student",
    title="Multi-level logit distillation, its predictions of examples on standardised logits",
    venue="CVPR 2024",
    source=(
        "Sun, Ren, Li, Wang and Cao, CVPR 2024, arXiv:2403.01427, on Jin, Wang and Lin, CVPR 2023; weights and "
        "temperatures as released"
    ),
    differs=(
        "As mlkd: published rows are runs of 480 epochs on two views, and the authors' code takes the strong view at "
        "fewer temperatures. As there, the relations of batch and classes are those of the plain logits. The share "
        "that weighs the own view is taken from standardised confidences here."
    ),
    terms={
        "cross_entropy": {"weight": 0.1},
        "view_cross_entropy": {"weight": 0.1},
        "mlkd": {"weight": 9.0, "temperatures": [2.0, 3.0, 2.0, 5.0, 6.0], "standardize": True},
        "mlkd_relations": {"weight": 9.0, "temperatures": [2.0, 3.0, 2.0, 5.0, 6.0]},
    },
)
