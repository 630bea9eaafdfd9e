"""A temperature that a network keeps: its logits are divided once and for all, in its last layer."""

from __future__ import annotations

import torch
from torch import Tensor

from soteacher.errors import InputError
from soteacher.models.classifier import Classifier
from soteacher.models.parts import Parts, evaluating


@torch.no_grad()
def divide_logits(classifier: Classifier, temperature: float, images: Tensor) -> None:
    """Divide the logits of a network by a temperature, by dividing the weights of its last linear layer.

    So the temperature goes wherever the network goes: into its file, its export, and what is read of its classifier.

    Args:
        classifier: changed in place.
        temperature: positive.
        images: ``[B, C, H, W]`` examples of its input, to see that the logits have followed.

    Raises:
        InputError: the network does not end in a linear layer that makes the logits.
    """
    layer = Parts(classifier).classifier
    with evaluating(classifier):
        before = classifier(images)
        for parameter in layer.parameters():
            parameter.div_(temperature)
        after = classifier(images)
    if not torch.allclose(after * temperature, before, rtol=1e-4, atol=1e-4 * float(before.abs().max())):
        raise InputError(f"the logits of {type(classifier.network).__name__} are not those of its last linear layer")
