"""NORM together with contrastive representation distillation."""

from __future__ import annotations

from soteacher.objective import Method

METHOD = Method(
    name="norm_crd",
    role="student",
    title="NORM, and contrastive representation distillation",
    venue="ICLR 2023",
    source="Liu, Li, Li and Yao, ICLR 2023, arXiv:2305.13803; the contrastive term: Tian et al., arXiv:1910.10699",
    differs=(
        "As norm and crd. The contrastive term has its usual weight of 0.8; in the released code one number, 2.5 "
        "unless set, is both that weight and the factor of the normalised logits."
    ),
    terms={
        "cross_entropy": {"weight": 0.1},
        "norm": {"weight": 1.0, "ramp": "warmup"},
        "crd": {"weight": 0.8},
    },
)
