"""Scale decoupled distillation with decoupled distillation in each region."""

from __future__ import annotations

from soteacher.objective import Method

METHOD = Method(
    name="sdd_dkd",
    role="student",
    title="Scale decoupled distillation: decoupled distillation for regions at three scales",
    venue="CVPR 2024",
    source=(
        "Wei, Luo and Luo, CVPR 2024, arXiv:2403.13512 (SD-DKD), on Zhao et al., CVPR 2022, arXiv:2203.08679; weights "
        "of dkd in mdistiller, which its code extends"
    ),
    differs=(
        "The default scales are 1, 2 and 4; the authors' code takes 1 and 2 for some pairs. The warm-up of 20 "
        "epochs of 240 scales with the length of the run."
    ),
    terms={
        "cross_entropy": {"weight": 1.0},
        "sdd": {
            "weight": 1.0, "ramp": "warmup", "divergence": "dkd",
            "temperature": 4.0, "target_weight": 1.0, "non_target_weight": 8.0,
        },
    },
)  # fmt: skip
