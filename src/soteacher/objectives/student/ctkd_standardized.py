"""Logit standardisation with a curriculum temperature."""

from __future__ import annotations

from soteacher.objective import Method

METHOD = Method(
    name="ctkd_standardized",
    role="student",
    title="Distillation of standardised logits at a temperature that is learned against the student",
    venue="CVPR 2024",
    source=(
        "Sun, Ren, Li, Wang and Cao, CVPR 2024, arXiv:2403.01427; on CTKD by Li et al., AAAI 2023, arXiv:2211.16231; "
        "weights of the authors' script"
    ),
    differs="As in ctkd the temperature is one for all and its curriculum a share of the run; and the deviation of the "
    "logits has 1e-7 added to it.",
    terms={"cross_entropy": {"weight": 0.1}, "ctkd": {"weight": 9.0, "standardize": True}},
)
