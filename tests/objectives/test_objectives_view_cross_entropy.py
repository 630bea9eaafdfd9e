from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from soteacher.errors import InputError
from soteacher.functional import cross_entropy
from soteacher.objectives.view_cross_entropy import ViewCrossEntropyConfig
from soteacher.objectives.views import student_view, teacher_view
from soteacher.types import DistillStep, Outputs, Task


def test_view_cross_entropy_is_that_of_the_strong_view(
    network: nn.Module, make_step: Callable[..., DistillStep], task: Task
) -> None:
    strong = torch.randn(4, 5, generator=torch.Generator().manual_seed(3))
    step = make_step(network, views={"strong": Outputs(logits=strong, features={})})
    objective = ViewCrossEntropyConfig().build(task)
    assert objective.views == ("strong",)
    torch.testing.assert_close(objective(step), cross_entropy(strong, step.labels).mean(), rtol=0, atol=0)


def test_view_cross_entropy_needs_no_teacher_and_no_standardised_logits() -> None:
    assert not ViewCrossEntropyConfig.needs_teacher
    assert not ViewCrossEntropyConfig.standardizable


def test_views_are_given_by_name(network: nn.Module, make_step: Callable[..., DistillStep]) -> None:
    student, teacher = (Outputs(logits=torch.full((4, 5), float(value)), features={}) for value in (1, 2))
    step = make_step(network, views={"second": student}, teacher_views={"second": teacher})
    assert student_view(step, "second") is student
    assert teacher_view(step, "second") is teacher


@pytest.mark.parametrize("read", [student_view, teacher_view])
def test_a_view_that_the_loop_does_not_give_is_refused(
    network: nn.Module, make_step: Callable[..., DistillStep], read: Callable[..., Any]
) -> None:
    with pytest.raises(InputError, match=r"the view 'strong'.*the step must have it in"):
        read(make_step(network), "strong")
