"""Scale decoupled distillation with normalised distillation in each region."""

from __future__ import annotations

from soteacher.objective import Method

METHOD = Method(
    name="sdd_nkd",
    role="student",
    title="Scale decoupled distillation: normalised distillation for regions at three scales",
    venue="CVPR 2024",
    source=(
        "Wei, Luo and Luo, CVPR 2024, arXiv:2403.13512 (SD-NKD), on Yang et al., ICCV 2023, arXiv:2303.13005; settings "
        "of nkd, warm-up as released"
    ),
    differs=(
        "The default scales are 1, 2 and 4; the authors' code takes 1 and 2 for some pairs. There the label's class "
        "stays among the other classes, and temperature and weight are read from the settings of dkd (4 and 8 by "
        "default); here it is left out, as in nkd, with nkd's 1 and 1.5. The warm-up scales with the length of the "
        "run."
    ),
    terms={
        "cross_entropy": {"weight": 1.0},
        "sdd": {
            "weight": 1.0, "ramp": "warmup", "divergence": "nkd", "temperature": 1.0, "non_target_weight": 1.5,
        },
    },
)  # fmt: skip
