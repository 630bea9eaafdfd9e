import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from scipy.special import logsumexp
from torch import nn

from soteacher.errors import InputError
from soteacher.functional import cross_entropy
from soteacher.mixing import mixed_labels
from soteacher.objectives.cross_entropy import CrossEntropyConfig
from soteacher.types import DistillStep, Mixture, Task

LOGITS = torch.tensor([[2.0, 0.0, -1.0], [0.5, 0.5, 0.5]])
LABELS = torch.tensor([0, 2])


def test_cross_entropy_by_hand() -> None:
    first = math.log(math.exp(2) + 1 + math.exp(-1)) - 2
    torch.testing.assert_close(cross_entropy(LOGITS, LABELS), torch.tensor([first, math.log(3)]))


def test_cross_entropy_smooths_labels_by_hand() -> None:
    log_p = torch.from_numpy(LOGITS.numpy() - logsumexp(LOGITS.numpy(), axis=1, keepdims=True))
    expected = torch.stack([-(0.7 + 0.1) * row[y] - 0.1 * (row.sum() - row[y]) for row, y in zip(log_p, LABELS)])  # noqa: B905 - tensors
    torch.testing.assert_close(cross_entropy(LOGITS, LABELS, label_smoothing=0.3), expected)


def test_cross_entropy_ignores_a_shift_of_the_logits() -> None:
    torch.testing.assert_close(cross_entropy(LOGITS + 7, LABELS), cross_entropy(LOGITS, LABELS))


def test_cross_entropy_takes_any_integer_labels() -> None:
    assert torch.equal(cross_entropy(LOGITS, LABELS.int()), cross_entropy(LOGITS, LABELS))


def test_cross_entropy_gradient() -> None:
    logits = LOGITS.double().requires_grad_()
    assert torch.autograd.gradcheck(lambda z: cross_entropy(z, LABELS, label_smoothing=0.1), logits)


@pytest.mark.parametrize(
    ("logits", "labels", "smoothing", "message"),
    [
        (LOGITS[0], LABELS, 0.0, r"\[3\] and \[2\]"),
        (LOGITS, LABELS[:1], 0.0, r"\[2, 3\] and \[1\]"),
        (LOGITS, LOGITS, 0.0, r"\[2, 3\] and \[2, 3\]"),
        (LOGITS, LABELS.float(), 0.0, "torch.float32"),
        (LOGITS, LABELS, 1.0, "got 1.0"),
        (LOGITS, LABELS, -0.1, "got -0.1"),
        (LOGITS, LABELS, float("nan"), "got nan"),
    ],
)
def test_cross_entropy_refuses(logits: torch.Tensor, labels: torch.Tensor, smoothing: float, message: str) -> None:
    with pytest.raises(InputError, match=message):
        cross_entropy(logits, labels, label_smoothing=smoothing)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_objective_on_blended_images_is_cross_entropy_with_soft_labels(
    network: nn.Module, make_step: Callable[..., DistillStep], smoothing: float
) -> None:
    mixture = Mixture(labels=torch.tensor([0, 1, 2, 3]), share=torch.tensor([0.0, 0.3, 0.9, 1.0]))
    step = make_step(network, mixture=mixture)
    objective = CrossEntropyConfig(label_smoothing=smoothing).build(Task(num_examples=12, num_classes=5))
    soft = mixed_labels(step.labels, mixture, num_classes=5)
    expected = F.cross_entropy(step.outputs.logits, soft, label_smoothing=smoothing)
    torch.testing.assert_close(objective(step), expected)


def test_objective_on_whole_images_is_that_of_images_that_are_all_their_own(
    network: nn.Module, make_step: Callable[..., DistillStep]
) -> None:
    objective = CrossEntropyConfig().build(Task(num_examples=12, num_classes=5))
    mixture = Mixture(labels=torch.zeros(4, dtype=torch.int64), share=torch.ones(4))
    torch.testing.assert_close(objective(make_step(network, mixture=mixture)), objective(make_step(network)))


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # the compiler's own look
def test_objective_on_blended_images_compiles(network: nn.Module, make_step: Callable[..., DistillStep]) -> None:
    step = make_step(network, mixture=Mixture(labels=torch.tensor([0, 1, 2, 3]), share=torch.full((4,), 0.3)))
    objective = CrossEntropyConfig().build(Task(num_examples=12, num_classes=5))
    torch.compiler.reset()
    compiled = torch.compile(objective, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(step), objective(step))
