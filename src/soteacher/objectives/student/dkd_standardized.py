"""Logit standardisation with decoupled distillation."""

from __future__ import annotations

from soteacher.objective import Method

METHOD = Method(
    name="dkd_standardized",
    role="student",
    title="Decoupled distillation on standardised logits",
    venue="CVPR 2024",
    source=(
        "Sun, Ren, Li, Wang and Cao, CVPR 2024, arXiv:2403.01427; on DKD by Zhao et al., CVPR 2022, arXiv:2203.08679; "
        "weight and temperature of the authors' command for this method"
    ),
    differs=(
        "The release's command asks for weight 9 and temperature 2. One version of its script does what we do with "
        "them; another one leaves the temperature at 4 and makes the two parts' weights 9 and 81. Logs of some pairs "
        "name other weights, 12 to 18."
    ),
    terms={
        "cross_entropy": {"weight": 1.0},
        "dkd": {
            "weight": 9.0, "ramp": "warmup", "standardize": True,
            "temperature": 2.0, "target_weight": 1.0, "non_target_weight": 8.0,
        },
    },
)  # fmt: skip
