"""A name becomes a network: our families by their own names, timm's architectures as ``timm/NAME``."""

from __future__ import annotations

from difflib import get_close_matches
from types import ModuleType
from typing import TYPE_CHECKING

from torch import nn

from soteacher.errors import InputError, unknown_name
from soteacher.models import bottleneck_resnet, mobilenet_v2, patchwise, resnet, shufflenet_v1, shufflenet_v2, vgg, wrn
from soteacher.models.family import Family
from soteacher.torchvision_operators import define_missing_operators

if TYPE_CHECKING:
    from timm.models import PretrainedCfg

FAMILIES = (
    resnet.FAMILY, bottleneck_resnet.FAMILY, wrn.FAMILY, vgg.FAMILY,
    mobilenet_v2.FAMILY, shufflenet_v1.FAMILY, shufflenet_v2.FAMILY,
    patchwise.FAMILY,
)  # fmt: skip
"""Every family of ours, one line each."""

TIMM_PREFIX = "timm/"


def network_names() -> tuple[str, ...]:
    """Return the listed names of our families.

    ``resnetD``, ``resnetDxW``, ``wrn_D_W`` and ``patchwise_P_W`` take other numbers too. Not listed are the field's
    spellings of a network that has a name here: ``ResNet50``, ``MobileNetV2``, ``ShuffleV1`` or ``ShuffleNetV1``,
    ``ShuffleV2`` or ``ShuffleNetV2``.
    """
    return tuple(name for family in FAMILIES for name in family.names)


def check_network(name: str) -> None:
    """See to it that there is a network of this name, at no cost: nothing is built or downloaded.

    timm is imported only for its own names, and to offer the nearest ones in an error.

    Raises:
        InputError: there is no such network.
    """
    if name.startswith(TIMM_PREFIX):
        _timm_name(name, _import_timm())
    else:
        _family_of(name)


def build_network(name: str, *, num_classes: int, in_channels: int = 3, pretrained: bool = False) -> nn.Module:
    """Return a network for images of any size, or of the size that a fixed-size network of timm wants.

    Random weights come from PyTorch's global generator.

    Args:
        name: of one of our families, or ``timm/NAME``.
        num_classes: K of the logits ``[B, K]``.
        in_channels: channels of the images.
        pretrained: take timm's published weights (a download); the classifier is new where K differs from theirs.

    Raises:
        InputError: there is no such network, a number is not positive, there are no published weights, or the download
            fails.
    """
    for what, number in (("num_classes", num_classes), ("in_channels", in_channels)):
        if number < 1:
            raise InputError(f"{name}: {what} must be at least 1, got {number}")
    if name.startswith(TIMM_PREFIX):
        return _build_timm(name, num_classes=num_classes, in_channels=in_channels, pretrained=pretrained)
    network = _family_of(name).build(name, num_classes=num_classes, in_channels=in_channels)
    if pretrained:
        raise InputError(f"{name} has no published weights; pretrained networks are those named timm/NAME")
    return network


def timm_config(name: str) -> PretrainedCfg | None:
    """Return what timm says about the input of the network's published weights; ``None`` for networks of ours.

    Raises:
        InputError: there is no such network in timm.
    """
    if not name.startswith(TIMM_PREFIX):
        return None
    timm = _import_timm()
    return timm.get_pretrained_cfg(_timm_name(name, timm))


def _family_of(name: str) -> Family:
    """Return the family that knows the name."""
    try:
        for family in FAMILIES:
            if family.knows(name):
                return family
    except InputError as error:  # resnet18 and the like: a family's pattern, but only timm has the network
        if _import_timm().is_model(name):
            raise InputError(f"{error}; timm has one of that name: {TIMM_PREFIX}{name}") from None
        raise
    raise _unknown_network(name, _import_timm())


def _build_timm(name: str, *, num_classes: int, in_channels: int, pretrained: bool) -> nn.Module:
    """Return a network of timm."""
    timm = _import_timm()
    timm_name = _timm_name(name, timm)
    try:
        return timm.create_model(timm_name, pretrained=pretrained, num_classes=num_classes, in_chans=in_channels)
    except Exception as error:  # the hub, its cache and each architecture have errors of their own
        reason = next(iter(str(error).splitlines()), "") or type(error).__name__
        aim = "get pretrained weights for" if pretrained else "build"
        raise InputError(f"cannot {aim} {name} ({num_classes} classes, {in_channels} channels): {reason}") from error


def _timm_name(name: str, timm: ModuleType) -> str:
    """Return timm's own name, which may end in the tag of its weights."""
    bare = name.removeprefix(TIMM_PREFIX)
    architecture, _, tag = bare.partition(".")
    if not timm.is_model(architecture):
        raise _unknown_network(name, timm)
    if tag and bare not in (known := timm.list_models(f"{architecture}.*", pretrained=True)):
        raise unknown_name("network", name, [TIMM_PREFIX + other for other in (architecture, *known)])
    return bare


def _unknown_network(name: str, timm: ModuleType) -> InputError:
    """Return the error that offers the nearest names of ours and of timm."""
    bare = name.removeprefix(TIMM_PREFIX).partition(".")[0]
    near = get_close_matches(bare, timm.list_models(), n=3, cutoff=0.6)
    offered = [TIMM_PREFIX + other for other in near]
    if not (name.startswith(TIMM_PREFIX) and near):
        offered += network_names()
    return unknown_name("network", name, offered)


def _import_timm() -> ModuleType:
    """Import timm when it is needed: it takes seconds."""
    define_missing_operators()
    import timm

    return timm
