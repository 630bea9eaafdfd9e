import math

import pytest
import torch
from torch import nn

from soteacher.train.evaluate import evaluate, predict
from soteacher.train.teacher_signal import LiveTeacher
from soteacher.types import Batch


class _Table(nn.Module):
    """Gives the logits that its images hold in their first row."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return images[:, 0, 0] * (2 if self.training else 1)


def _batches() -> list[Batch]:
    logits = torch.tensor([[2.0, 0, 0], [0, 3, 0], [0, 0, 1], [0, 1, 0]])
    labels = torch.tensor([0, 1, 1, 2])
    images = logits[:, None, None, :].expand(-1, 1, 3, 3)
    rows = torch.arange(4).split(3)
    return [Batch(images=images[part], labels=labels[part], indices=part) for part in rows]


def test_predict_keeps_the_order_and_the_mode() -> None:
    table = _Table().train()
    logits, labels = predict(table, _batches())
    assert logits.tolist() == [[2, 0, 0], [0, 3, 0], [0, 0, 1], [0, 1, 0]]
    assert labels.tolist() == [0, 1, 1, 2]
    assert table.training
    assert not predict(table.eval(), _batches())[0].requires_grad
    assert not table.training


def test_evaluate_gives_figures_by_hand() -> None:
    result = evaluate(_Table().eval(), _batches())
    assert result.accuracy == 0.5
    wrong = -math.log(1 / (math.e + 2))
    right = [-math.log(math.exp(value) / (math.exp(value) + 2)) for value in (2, 3)]
    assert result.nll == pytest.approx((sum(right) + 2 * wrong) / 4)
    confident = [math.exp(-value) for value in right]
    unsure = math.e / (math.e + 2)
    # Three bins: each right one alone in its own, the two wrong ones share theirs.
    assert result.ece == pytest.approx((1 - confident[0]) / 4 + (1 - confident[1]) / 4 + unsure / 2)
    assert sum(entry["count"] for entry in result.reliability) == 4


def test_the_mode_is_put_back_after_an_error() -> None:
    table = _Table().train()
    batch = Batch(images=torch.zeros(1), labels=torch.zeros(1), indices=torch.zeros(1))
    with pytest.raises(IndexError):
        predict(table, [batch])
    assert table.training


def test_a_live_teacher_gives_no_gradients() -> None:
    layer = nn.Linear(2, 3)
    teacher = LiveTeacher(lambda images: (layer(images), {"pooled": layer(images) * 2}))
    images = torch.ones(4, 2)
    outputs = teacher(Batch(images=images, labels=torch.zeros(4), indices=torch.arange(4)))
    assert torch.equal(outputs.logits, layer(images))
    assert torch.equal(outputs.features["pooled"], layer(images) * 2)
    assert not outputs.logits.requires_grad
