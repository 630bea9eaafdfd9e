"""WKD: Wasserstein distances of predictions and of features together."""

from __future__ import annotations

from soteacher.objective import Method

METHOD = Method(
    name="wkd",
    role="student",
    title="WKD: Wasserstein distances of predictions and of maps",
    venue="NeurIPS 2024",
    source="Lv, Yang and Li, NeurIPS 2024, arXiv:2412.08139",
    differs="As wkd_logit and wkd_feature, whose weights stand side by side; the authors' own are not known to us.",
    terms={"cross_entropy": {"weight": 1.0}, "wkd_logit": {}, "wkd_feature": {"weight": 0.006}},
)
