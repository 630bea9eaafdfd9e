"""Fine-tuning for conditional mutual information, around the class means of the network as it was before."""

from __future__ import annotations

from dataclasses import replace

from soteacher.objectives.teacher import mcmi

METHOD = replace(
    mcmi.METHOD,
    name="mcmi_frozen",
    title=f"{mcmi.METHOD.title}, around the class means of before the fine-tuning",
    differs=(
        "This is what the authors' training loops for few and for no examples of a class do, whose update of the "
        "class means is commented out. Their learning rate is 0.005 for MobileNetV2 and the ShuffleNets, and their "
        "weight for CIFAR-10 0.1 to 0.35. They find the class means on augmented images, seen in training mode; we on "
        "the images as they are, seen in evaluation mode, where a trained network is surer. Entries of a class mean "
        "below 1e-12 count as 1e-12; they have no floor."
    ),
    terms={"cross_entropy": {}, "class_information_frozen": {"weight": 0.25}},
)
