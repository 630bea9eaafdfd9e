"""The control of every distillation: the student without a teacher."""

from __future__ import annotations

from soteacher.objective import Method

METHOD = Method(
    name="alone",
    role="student",
    title="The student trained on the labels alone, without a teacher",
    source="common practice, the control of every comparison",
    terms={"cross_entropy": {}},
)
