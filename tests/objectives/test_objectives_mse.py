from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.special import softmax
from torch import Tensor, nn

from soteacher.errors import InputError
from soteacher.mixing import mixed_labels
from soteacher.objectives.cross_entropy import cross_entropy
from soteacher.objectives.teacher.mse import METHOD, MSEConfig, squared_label_distance
from soteacher.types import DistillStep, Mixture, Task

TASK = Task(num_examples=12, num_classes=5)


def test_squared_label_distance_by_hand() -> None:
    logits = torch.tensor([[0.0, 0.0], [np.log(3), 0.0]], dtype=torch.float64)
    labels = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    torch.testing.assert_close(
        squared_label_distance(logits, labels), torch.tensor([0.5, 2 * 0.75**2], dtype=torch.float64)
    )


def test_squared_label_distance_equals_the_brier_score() -> None:
    torch.manual_seed(0)
    logits, labels = torch.randn(50, 7), torch.randint(0, 7, (50,))
    predictions = softmax(logits.double().numpy(), axis=1)
    expected = ((predictions - np.eye(7)[labels.numpy()]) ** 2).sum(1)
    found = squared_label_distance(logits, F.one_hot(labels, 7).float())
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-5)


def test_squared_label_distance_is_zero_at_the_label_and_blind_to_shifts_and_orders() -> None:
    torch.manual_seed(0)
    logits, soft, order = torch.randn(4, 5), torch.rand(4, 5).softmax(dim=-1), torch.randperm(5)
    torch.testing.assert_close(squared_label_distance(soft.log(), soft), torch.zeros(4))
    value = squared_label_distance(logits, soft)
    torch.testing.assert_close(squared_label_distance(logits + 3, soft), value)
    torch.testing.assert_close(squared_label_distance(logits[:, order], soft[:, order]), value)


def test_squared_label_distance_gradient_reaches_the_logits_only() -> None:
    torch.manual_seed(0)
    logits, soft = (torch.rand(3, 4, dtype=torch.float64, requires_grad=True) for _ in range(2))
    assert torch.autograd.gradcheck(lambda z: squared_label_distance(z, soft.detach()), logits)
    squared_label_distance(logits, soft).sum().backward()
    assert soft.grad is None
    assert logits.grad is not None


def test_gradient_from_a_constant_prediction_is_that_of_cross_entropy_times_two_over_k() -> None:
    logits, labels = torch.zeros(3, 8, dtype=torch.float64, requires_grad=True), torch.tensor([0, 3, 7])
    (found,) = torch.autograd.grad(squared_label_distance(logits, F.one_hot(labels, 8)).sum(), logits)
    (expected,) = torch.autograd.grad(cross_entropy(logits, labels).sum(), logits)
    torch.testing.assert_close(found, 2 / 8 * expected)


def test_minimiser_is_the_true_label_distribution() -> None:
    """Repeat one input with labels by their true shares: gradient descent on its logits ends at these shares."""
    true = torch.tensor([0.5, 0.3, 0.15, 0.05], dtype=torch.float64)
    labels = torch.arange(4).repeat_interleave((true * 100).round().long())
    soft, logits = F.one_hot(labels, 4).double(), torch.zeros(1, 4, dtype=torch.float64, requires_grad=True)

    def loss() -> Tensor:
        return squared_label_distance(logits.expand(len(labels), -1), soft).mean()

    for _ in range(1000):
        (gradient,) = torch.autograd.grad(loss(), logits)
        logits = (logits - 4 * gradient).detach().requires_grad_()
    torch.testing.assert_close(logits.softmax(dim=-1)[0], true, rtol=0, atol=1e-6)
    assert loss().item() == pytest.approx(1 - true.square().sum().item())  # what is left is the labels' own scatter


@pytest.mark.parametrize(("logits", "soft"), [((2, 3), (2, 4)), ((3,), (3,)), ((2, 3), (2,))], ids=str)
def test_wrong_shapes_are_refused(logits: tuple[int, ...], soft: tuple[int, ...]) -> None:
    with pytest.raises(InputError, match=r"of one shape \[B, K\]"):
        squared_label_distance(torch.zeros(logits), torch.zeros(soft))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_objective_is_the_mean_in_single_precision(
    network: nn.Module, make_step: Callable[..., DistillStep], dtype: torch.dtype
) -> None:
    step = make_step(network, dtype=dtype)
    expected = squared_label_distance(step.outputs.logits.float(), F.one_hot(step.labels, 5).float()).mean()
    assert torch.equal(MSEConfig().build(TASK)(step), expected)


def test_objective_on_blended_images_takes_both_labels_and_has_the_gradient_of_their_sum(
    network: nn.Module, make_step: Callable[..., DistillStep]
) -> None:
    other, share = torch.tensor([0, 1, 2, 3]), torch.tensor([0.0, 0.3, 0.9, 1.0])
    mixture = Mixture(labels=other, share=share)
    leaf = torch.randn(4, 5, generator=torch.Generator().manual_seed(1)).requires_grad_()
    step = make_step(network, logits=leaf, mixture=mixture)
    loss = MSEConfig().build(TASK)(step)
    torch.testing.assert_close(
        loss, squared_label_distance(leaf, mixed_labels(step.labels, mixture, num_classes=5)).mean()
    )

    def distance(labels: Tensor) -> Tensor:
        return squared_label_distance(leaf, F.one_hot(labels, 5).float())

    parts = (share * distance(step.labels) + (1 - share) * distance(other)).mean()
    torch.testing.assert_close(torch.autograd.grad(loss, leaf)[0], torch.autograd.grad(parts, leaf)[0])


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # the compiler's own look
def test_objective_on_blended_images_compiles(network: nn.Module, make_step: Callable[..., DistillStep]) -> None:
    step = make_step(network, mixture=Mixture(labels=torch.tensor([0, 1, 2, 3]), share=torch.full((4,), 0.3)))
    objective = MSEConfig().build(TASK)
    torch.compiler.reset()
    compiled = torch.compile(objective, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(step), objective(step))


def test_method_has_no_other_term() -> None:
    assert METHOD.terms == {"mse": {"weight": 1.0}}
