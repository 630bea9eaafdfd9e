"""SoTeacher as the authors' released code computes it."""

from __future__ import annotations

from soteacher.objective import Method

METHOD = Method(
    name="soteacher_released",
    role="teacher",
    title="Student-oriented teacher as released: entrywise L1 of convolutions, first epoch counted twice",
    venue="ICLR 2024",
    source="Released code of Dong, Liu and Shang, ICLR 2024, arXiv:2206.06661",
    terms={
        "cross_entropy": {},
        "weight_l1": {"weight": 1e-5},
        "consistency_released": {"weight": 1.0, "ramp": "linear"},
    },
)

WITHOUT_WEIGHT_L1 = METHOD.without("weight_l1")
WITHOUT_CONSISTENCY_RELEASED = METHOD.without("consistency_released")
