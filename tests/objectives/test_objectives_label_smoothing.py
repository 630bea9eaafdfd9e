import pytest
import torch

from soteacher.mixing import MixingConfig
from soteacher.objective import Method
from soteacher.objectives.cross_entropy import CrossEntropyConfig, cross_entropy
from soteacher.objectives.teacher import cutmix, label_smoothing, mixup
from soteacher.types import Task


def test_label_smoothing_is_cross_entropy_with_a_tenth_spread_evenly() -> None:
    (settings,) = label_smoothing.METHOD.terms.values()
    objective = CrossEntropyConfig.model_validate(settings).build(Task(num_examples=2, num_classes=4))
    assert objective.config.label_smoothing == 0.1
    log_odds = torch.tensor([[0.925, 0.025, 0.025, 0.025]], dtype=torch.float64).log().requires_grad_()
    loss = cross_entropy(log_odds, torch.tensor([0]), label_smoothing=0.1)
    assert torch.autograd.grad(loss, log_odds)[0].abs().max() < 1e-9  # the smoothed label itself is the minimiser


@pytest.mark.parametrize(
    ("method", "expected"),
    [
        (mixup.METHOD, MixingConfig(name="mixup", alpha=1.0)),
        (cutmix.METHOD, MixingConfig(name="cutmix", alpha=1.0, probability=0.5)),
    ],
)
def test_methods_of_blended_images_have_the_released_settings(method: Method, expected: MixingConfig) -> None:
    assert method.training.keys() == {"mixing"}
    assert MixingConfig.model_validate(method.training["mixing"]) == expected
    assert method.terms == {"cross_entropy": {}}
    assert CrossEntropyConfig.takes_mixtures


@pytest.mark.parametrize("method", [label_smoothing.METHOD, mixup.METHOD, cutmix.METHOD], ids=lambda each: each.name)
def test_methods_are_of_teachers(method: Method) -> None:
    assert method.role == "teacher"
