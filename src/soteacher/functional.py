"""Every pure function of the objectives: tensors and numbers in, tensors out; no state, no configuration."""

from __future__ import annotations

from soteacher.objectives.cross_entropy import cross_entropy
from soteacher.objectives.student.kd import kd_divergence
from soteacher.objectives.teacher.consistency import running_mean, squared_distance
from soteacher.objectives.teacher.consistency_released import released_running_mean
from soteacher.objectives.teacher.lipschitz import induced_norm, lipschitz_bound_sum, normed_layers
from soteacher.objectives.teacher.weight_l1 import weight_l1_norm, weight_l1_sum

__all__ = [
    "cross_entropy",
    "induced_norm",
    "kd_divergence",
    "lipschitz_bound_sum",
    "normed_layers",
    "released_running_mean",
    "running_mean",
    "squared_distance",
    "weight_l1_norm",
    "weight_l1_sum",
]
