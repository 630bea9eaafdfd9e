"""SoTeacher as the paper describes it."""

from __future__ import annotations

from soteacher.objective import Method

METHOD = Method(
    name="soteacher",
    role="teacher",
    title="Student-oriented teacher: cross-entropy, induced Lipschitz norms and consistency of predictions",
    venue="ICLR 2024",
    source="Dong, Liu and Shang, ICLR 2024, arXiv:2206.06661",
    terms={
        "cross_entropy": {},
        "lipschitz": {"weight": 1e-5},
        "consistency": {"weight": 1.0, "ramp": "linear"},
    },
)

WITHOUT_LIPSCHITZ = METHOD.without("lipschitz")
WITHOUT_CONSISTENCY = METHOD.without("consistency")
