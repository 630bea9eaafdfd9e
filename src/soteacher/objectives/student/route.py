"""A route of checkpoints: the student follows its teacher's own way, from early epochs to the last."""

from __future__ import annotations

from soteacher.objective import Method

METHOD = Method(
    name="route",
    role="student",
    title="Route of checkpoints: earlier states of the teacher teach first, the finished one last",
    venue="ICCV 2019",
    source="Jin et al. (RCO), ICCV 2019, arXiv:1904.09149; weights and temperature are those of kd",
    differs=(
        "The anchors stand at equal intervals of the teacher's run, the paper's simpler choice; its greedy search is "
        "not offered. The learning rate follows one schedule over the whole training; whether the authors begin it "
        "anew at each anchor was not checked."
    ),
    terms={"cross_entropy": {"weight": 0.5}, "kd": {"weight": 0.5, "temperature": 4.0}},
    training={"route": [0.25, 0.5, 0.75]},
)
