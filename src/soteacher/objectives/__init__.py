"""Every objective and every method by name: our own, and those that other packages add by Python entry points.

Another package adds an objective or a method without a fork::

    [project.entry-points."soteacher.objectives"]
    my_term = "my_package.my_term:MyTermConfig"  # a subclass of soteacher.objective.ObjectiveConfig

    [project.entry-points."soteacher.methods"]
    my_method = "my_package.my_term:METHOD"  # a soteacher.objective.Method whose name is my_method
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from types import MappingProxyType, ModuleType
from typing import Any

from soteacher.errors import InputError, unknown_name
from soteacher.objective import Method, ObjectiveConfig
from soteacher.objectives import cross_entropy, view_cross_entropy
from soteacher.objectives.student import (
    activation_boundary,
    alone,
    attention,
    cat,
    correlation,
    crd,
    crd_kd,
    crld,
    ctkd,
    ctkd_standardized,
    dist,
    dkd,
    dkd_standardized,
    dot,
    factor_transfer,
    fcfd,
    fitnet,
    fsp,
    itrd,
    kd,
    kd_standardized,
    kdpp,
    kdsvd,
    mlkd,
    mlkd_relations,
    mlkd_standardized,
    nkd,
    norm,
    norm_crd,
    norm_kd,
    nst,
    ofa,
    ofd,
    paraphraser,
    pkt,
    review,
    rkd,
    rld,
    route,
    sdd,
    sdd_dkd,
    sdd_nkd,
    semckd,
    similarity,
    simkd,
    srd,
    srrl,
    sskd,
    sskd_head,
    ttm,
    vid,
    wkd,
    wkd_feature,
    wkd_logit,
    wttm,
)
from soteacher.objectives.teacher import (
    assistant,
    averaged_predictions,
    class_information,
    class_information_frozen,
    confidence_ranking,
    consistency,
    consistency_released,
    cutmix,
    early_stopped,
    ema,
    joint_lipschitz,
    label_smoothing,
    lipschitz,
    mcmi,
    mcmi_frozen,
    mixup,
    mse,
    sftn,
    soteacher,
    soteacher_released,
    standard,
    swa,
    temperature_calibrated,
    weight_l1,
)

MODULES: tuple[ModuleType, ...] = (
    cross_entropy, view_cross_entropy,
    # teachers: SoTeacher and its terms
    standard, soteacher, soteacher_released, joint_lipschitz, lipschitz, weight_l1, consistency, consistency_released,
    # teachers: other losses, and other ways to the weights
    averaged_predictions, mse, confidence_ranking, class_information, class_information_frozen, mcmi, mcmi_frozen, sftn,
    label_smoothing, mixup, cutmix, early_stopped, swa, ema, temperature_calibrated, assistant,
    # students: labels and logits
    alone, kd, kd_standardized, dkd, dkd_standardized, nkd, dist, ctkd, ctkd_standardized, ttm, wttm, mlkd,
    mlkd_relations, mlkd_standardized, rld, crld, sdd, sdd_dkd, sdd_nkd, wkd_logit, ofa,
    # students: features and relations, and how they are trained
    fitnet, attention, similarity, correlation, vid, rkd, pkt, activation_boundary, factor_transfer, paraphraser, fsp,
    nst, kdsvd, crd, crd_kd, ofd, review, srrl, simkd, semckd, cat, fcfd, norm, norm_kd, norm_crd, itrd, kdpp, srd,
    wkd_feature, wkd, sskd, sskd_head, dot, route,
)  # fmt: skip
"""Every file of this package, in the order of lists: an objective, a method, or both, called as the file is."""


def _own_objectives() -> dict[str, type[ObjectiveConfig]]:
    """Return the settings class that each file defines, by the file's name."""
    return {
        _stem(module): value
        for module in MODULES
        for value in vars(module).values()
        if isinstance(value, type) and issubclass(value, ObjectiveConfig) and value.__module__ == module.__name__
    }


def _stem(module: ModuleType) -> str:
    return module.__name__.rpartition(".")[2]


OBJECTIVES: dict[str, type[ObjectiveConfig]] = _own_objectives()

METHODS: dict[str, Method] = {
    value.name: value for module in MODULES for value in vars(module).values() if isinstance(value, Method)
}


@cache
def objective_configs() -> Mapping[str, type[ObjectiveConfig]]:
    """Return the settings class of every objective by name, ours first; plug-ins are read once.

    Raises:
        InputError: a plug-in cannot be loaded, is not an ``ObjectiveConfig``, or takes a name that is in use.
    """
    configs = dict(OBJECTIVES)
    for name, package, config in _plugins("soteacher.objectives", configs):
        if not (isinstance(config, type) and issubclass(config, ObjectiveConfig)):
            raise InputError(f"objective {name!r} of package {package} must be a subclass of ObjectiveConfig")
        configs[name] = config
    return MappingProxyType(configs)


@cache
def methods() -> Mapping[str, Method]:
    """Return every method by name, ours first; plug-ins are read once.

    Raises:
        InputError: a plug-in cannot be loaded, is not a ``Method`` of its entry point's name, or takes a name in use.
    """
    known = dict(METHODS)
    for name, package, value in _plugins("soteacher.methods", known):
        if not isinstance(value, Method):
            raise InputError(f"method {name!r} of package {package} must be a Method, got {type(value).__name__}")
        if value.name != name:
            raise InputError(f"method {value.name!r} of package {package} has an entry point of another name: {name!r}")
        known[name] = value
    return MappingProxyType(known)


def objective_config(name: str) -> type[ObjectiveConfig]:
    """Return the settings class of one objective.

    Raises:
        InputError: no objective has that name.
    """
    configs = objective_configs()
    if name not in configs:
        raise unknown_name("objective", name, configs)
    return configs[name]


def method(name: str) -> Method:
    """Return one method.

    Raises:
        InputError: no method has that name.
    """
    known = methods()
    if name not in known:
        raise unknown_name("method", name, known)
    return known[name]


def reads_teacher(method: Method) -> bool:
    """Return whether any term of a method reads a teacher."""
    return any(objective_config(term).needs_teacher for term in method.terms)


def _plugins(group: str, taken: Mapping[str, object]) -> Iterator[tuple[str, str, Any]]:
    """Yield name, package and value of a group's entry points; ``taken`` is looked at anew for each."""
    kind = group.removeprefix("soteacher.").removesuffix("s")
    for point in entry_points(group=group):
        package = _package(point)
        if point.name in taken:
            raise InputError(f"{kind} {point.name!r} of package {package} takes a name that is in use")
        try:
            value = point.load()
        except (ImportError, AttributeError) as error:
            raise InputError(f"{kind} {point.name!r} of package {package} cannot be loaded: {error}") from error
        yield point.name, package, value


def _package(point: EntryPoint) -> str:
    return point.dist.name if point.dist is not None else point.value
