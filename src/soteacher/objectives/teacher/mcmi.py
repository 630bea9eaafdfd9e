"""Fine-tuning for conditional mutual information, around class means that are kept current."""

from __future__ import annotations

from soteacher.objective import Method

METHOD = Method(
    name="mcmi",
    role="teacher",
    title="Fine-tuned so that predictions say more about the image than its class: conditional mutual information",
    venue="ICLR 2024",
    source="Ye, Mohajer Hamidi, Tan and Yang, ICLR 2024, arXiv:2401.08732",
    differs=(
        "The weight is that of the authors' CIFAR-100 scripts; for CIFAR-10 they have 0.1 to 0.35. Their learning rate "
        "is 0.005 for MobileNetV2 and the ShuffleNets. They start from the class means of augmented images, seen in "
        "training mode; we from those of the images as they are, seen in evaluation mode. Their running means would "
        "take in 8 stored images of each class in every step, with the share 0.0001; ours take in the step's own "
        "predictions, with the share 0.002 of each example. In their training loops for few and for no examples of a "
        "class this update is commented out, which is `mcmi_frozen`; the loop of their main experiments we have not "
        "seen. Entries of a class mean below 1e-12 count as 1e-12; they have no floor."
    ),
    terms={"cross_entropy": {}, "class_information": {"weight": 0.25}},
    training={
        "epochs": 20,
        "optimizer": {"name": "sgd", "learning_rate": 0.05},
        "schedule": {"name": "cosine"},
    },
    fine_tunes=True,
)
