from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from scipy.special import log_softmax, rel_entr, softmax
from scipy.stats import rankdata
from torch import Tensor

from soteacher import objectives
from soteacher.errors import InputError
from soteacher.objective import Objective
from soteacher.objectives.student.sskd import METHOD, SSKD, SSKDConfig, kept_by_rank, selected_divergence
from soteacher.objectives.student.sskd_head import (
    SelfSupervisionHead,
    SSKDHead,
    SSKDHeadConfig,
    own_images,
    view_contrast,
    view_similarity,
)
from soteacher.types import DistillStep, Outputs, Task

PAIRS = ("same family", "other family", "transformer teacher", "transformer student")


def _randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def test_view_similarity_equals_numpy() -> None:
    views, images = _randn(6, 4), _randn(2, 4, seed=1)
    wanted = np.array([[v @ x / np.linalg.norm(v) / np.linalg.norm(x) for x in images.numpy()] for v in views.numpy()])
    torch.testing.assert_close(view_similarity(views, images), torch.from_numpy(wanted))
    torch.testing.assert_close(view_similarity(3 * views, images / 7), torch.from_numpy(wanted))


def test_view_similarity_of_nothing_has_finite_gradients() -> None:
    views, images = torch.zeros(3, 4, requires_grad=True), torch.ones(1, 4)
    view_similarity(views, images).sum().backward()
    assert views.grad is not None
    assert views.grad.isfinite().all()


def test_view_similarity_refuses_other_widths() -> None:
    with pytest.raises(InputError, match=r"got \[3, 4\] \(views\) and \[1, 5\] \(images\)"):
        view_similarity(torch.zeros(3, 4), torch.zeros(1, 5))


def test_view_contrast_equals_scipy() -> None:
    similarity = _randn(6, 2)
    own = [0, 1, 0, 1, 0, 1]
    wanted = -log_softmax(similarity.numpy(), axis=1)[range(6), own]
    torch.testing.assert_close(view_contrast(similarity), torch.from_numpy(wanted))
    assert own_images(similarity).tolist() == own
    assert torch.autograd.gradcheck(view_contrast, similarity.requires_grad_())


def test_view_contrast_refuses_views_of_unknown_images() -> None:
    with pytest.raises(InputError, match="as many views of each image are wanted, got 5 views of 2 images"):
        view_contrast(torch.zeros(5, 2))


def _kept_by_hand(scores: np.ndarray, right: np.ndarray, share: float) -> np.ndarray:
    """Keep rows one by one: the right ones, then the wrong ones in the order of the right entry's place."""
    ranks = [rankdata(-row, method="min")[entry] - 1 for row, entry in zip(scores, right, strict=True)]
    wrong = sorted((rank, row) for row, rank in enumerate(ranks) if rank)
    kept = np.array([rank == 0 for rank in ranks])
    for _, row in wrong[: int(len(wrong) * share)]:
        kept[row] = True
    return kept


@pytest.mark.parametrize("share", [0.0, 0.3, 0.7, 0.75, 1.0])
def test_kept_by_rank_is_the_choice_by_hand(share: float) -> None:
    for seed in range(5):
        scores = _randn(30, 4, seed=seed)
        right = torch.randint(0, 4, (30,), generator=torch.Generator().manual_seed(seed))
        wanted = _kept_by_hand(scores.numpy(), right.numpy(), share)
        assert kept_by_rank(scores, right, share=share).tolist() == wanted.tolist()


def test_kept_by_rank_with_equal_scores() -> None:
    right = torch.tensor([0, 1, 2])
    assert kept_by_rank(torch.zeros(3, 3), right, share=0.0).all()


@pytest.mark.parametrize("share", [-0.1, 1.1, float("nan")])
def test_kept_by_rank_refuses_a_share(share: float) -> None:
    with pytest.raises(InputError, match=rf"share must be in \[0, 1\], got {share}"):
        kept_by_rank(torch.zeros(2, 2), torch.zeros(2, dtype=torch.int64), share=share)


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_selected_divergence_equals_scipy(share: float) -> None:
    student, teacher = _randn(20, 5), _randn(20, 5, seed=1)
    right = torch.arange(20) % 5
    kept = _kept_by_hand(teacher.numpy(), right.numpy(), share)
    divergences = rel_entr(softmax(teacher.numpy() / 3, axis=1), softmax(student.numpy() / 3, axis=1)).sum(1)
    found = selected_divergence(student, teacher, right, temperature=3.0, share=share)
    assert found.item() == pytest.approx(9 * divergences[kept].mean(), rel=1e-12)


def test_selected_divergence_is_zero_at_agreement_and_where_nothing_is_kept() -> None:
    teacher, right = _randn(6, 3), torch.arange(6) % 3
    assert selected_divergence(teacher + 2, teacher, right, temperature=4.0, share=1.0).item() == pytest.approx(0)
    wrong = torch.eye(3)[[1, 2, 0]]
    assert selected_divergence(torch.randn(3, 3), wrong, torch.arange(3), temperature=1.0, share=0.3).item() == 0


def test_selected_divergence_ignores_the_order_of_the_rows() -> None:
    student, teacher, right = _randn(9, 4), _randn(9, 4, seed=1), torch.arange(9) % 4
    order = torch.randperm(9, generator=torch.Generator().manual_seed(0))
    for share in (0.0, 1.0):  # between the two, equals are chosen by their order
        values = [
            selected_divergence(student[rows], teacher[rows], right[rows], temperature=2.0, share=share)
            for rows in (torch.arange(9), order)
        ]
        torch.testing.assert_close(*values)


def test_selected_divergence_gradient_reaches_the_student_only() -> None:
    student, teacher, right = _randn(6, 3).requires_grad_(), _randn(6, 3, seed=1).requires_grad_(), torch.arange(6) % 3
    assert torch.autograd.gradcheck(
        lambda z: selected_divergence(z, teacher.detach(), right, temperature=2.0, share=0.5), student
    )
    selected_divergence(student, teacher, right, temperature=2.0, share=0.5).backward()
    assert teacher.grad is None


def test_selected_divergence_refuses() -> None:
    right = torch.zeros(2, dtype=torch.int64)
    with pytest.raises(InputError, match=r"got \[2, 3\] \(student\) and \[2, 4\] \(teacher\)"):
        selected_divergence(torch.zeros(2, 3), torch.zeros(2, 4), right, temperature=1.0, share=1.0)
    for temperature in (0.0, float("nan"), float("inf")):
        with pytest.raises(InputError, match=f"temperature must be positive and finite, got {temperature}"):
            selected_divergence(torch.zeros(2, 3), torch.zeros(2, 3), right, temperature=temperature, share=1.0)


@pytest.fixture
def made() -> tuple[SSKD, SSKDHead, DistillStep]:
    """The objectives for hand-made features: 2 images, 6 views, 4 and 6 channels, 3 classes."""
    torch.manual_seed(0)

    def outputs(rows: int, width: int, seed: int) -> Outputs:
        features = {"pooled": _randn(rows, width, seed=seed).float()}
        return Outputs(logits=_randn(rows, 3, seed=seed + 9).float(), features=features)

    labels = torch.tensor([2, 0])
    step = DistillStep(
        images=torch.zeros(2, 3, 4, 4), labels=labels, indices=labels, outputs=outputs(2, 4, 1),
        views={"rotated": outputs(6, 4, 2)}, model=torch.nn.Identity(), epoch=0, num_epochs=2, progress=0.0,
        teacher=outputs(2, 6, 3), teacher_views={"rotated": outputs(6, 6, 4)},
    )  # fmt: skip
    return SSKD(SSKDConfig(), 4, 6), SSKDHead(6), step


def _embedded(head: SelfSupervisionHead, feature: Tensor) -> np.ndarray:
    first, _, second = head.layers
    w1, b1, w2, b2 = (p.detach().double().numpy() for p in (first.weight, first.bias, second.weight, second.bias))
    return np.maximum(feature.double().numpy() @ w1.T + b1, 0) @ w2.T + b2


def _similarity_by_hand(head: SelfSupervisionHead, views: Tensor, images: Tensor) -> np.ndarray:
    rows, columns = (value / np.linalg.norm(value, axis=1, keepdims=True) for value in (
        _embedded(head, views), _embedded(head, images)
    ))  # fmt: skip
    return rows @ columns.T


def test_the_loss_is_that_by_hand(made: tuple[SSKD, SSKDHead, DistillStep]) -> None:
    objective, head, step = made
    student, teacher = step.views["rotated"], step.teacher_views["rotated"]
    student_similarity = _similarity_by_hand(
        objective.head, student.features["pooled"], step.outputs.features["pooled"]
    )
    images = step.teacher.features["pooled"]
    similarity = _similarity_by_hand(objective.teacher_head, teacher.features["pooled"], images)

    def divergence(logits: Any, target: Any, right: list[int], temperature: float, share: float) -> float:
        logits, target = np.asarray(logits, dtype=np.float64), np.asarray(target, dtype=np.float64)
        kept = _kept_by_hand(target, np.array(right), share)
        rows = rel_entr(softmax(target / temperature, axis=1), softmax(logits / temperature, axis=1)).sum(1)
        return temperature**2 * rows[kept].mean()

    rotated = divergence(student.logits, teacher.logits, [2, 0] * 3, 4.0, 1.0)
    relations = divergence(student_similarity, similarity, [0, 1] * 3, 0.5, 0.75)
    assert objective(step).item() == pytest.approx(2.7 * rotated + 10 * relations, rel=1e-5)

    own = _similarity_by_hand(head.head, teacher.features["pooled"], images)
    assert head(step).item() == pytest.approx(-log_softmax(own, axis=1)[range(6), [0, 1] * 3].mean(), rel=1e-5)


def test_the_training_takes_the_prepared_head_over_and_leaves_it(made: tuple[SSKD, SSKDHead, DistillStep]) -> None:
    objective, head, step = made
    before = objective(step)
    with pytest.raises(InputError, match=r"^sskd takes over a trained head: add the term 'sskd_head: \{"):
        objective.start({})
    assert torch.equal(objective(step), before)
    objective.start({"sskd_head": head})
    assert not torch.equal(objective(step), before)
    for taken, made_before in zip(objective.teacher_head.parameters(), head.head.parameters(), strict=True):
        assert torch.equal(taken, made_before)
        assert not taken.requires_grad
    assert sum(p.numel() for p in objective.parameters() if p.requires_grad) == 2 * (4 * 4 + 4)
    objective(step).backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in objective.head.parameters())
    assert not SSKDHead.trains_network


def _steps_lower(objective: Objective[Any], step: DistillStep) -> bool:
    parameters = [parameter for parameter in objective.parameters() if parameter.requires_grad]
    optimizer = torch.optim.SGD(parameters, lr=0.05)
    losses = []
    for _ in range(3):
        loss = objective(step)
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return losses[2] < losses[1] < losses[0]


def test_heads_learn(made: tuple[SSKD, SSKDHead, DistillStep]) -> None:
    objective, head, step = made
    assert _steps_lower(head, step)
    assert _steps_lower(objective, step)


@pytest.mark.parametrize("pair", PAIRS)
def test_real_networks_give_gradients(make_pair: Callable[[str], Any], pair: str) -> None:
    networks = make_pair(pair)
    torch.manual_seed(0)
    objective, head = SSKDConfig().build(networks.task), SSKDHeadConfig().build(networks.task)
    step = networks.step(objective, batch=3)
    loss, prepared = objective(step), head(step)
    for value in (loss, prepared):
        assert value.shape == ()
        assert value.dtype == torch.float32
        assert value.isfinite()
        assert value > 0
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(objective(step), loss, rtol=1e-6, atol=0)
        torch.testing.assert_close(head(step), prepared, rtol=1e-6, atol=0)
    loss.backward()
    gradients = [parameter.grad for parameter in networks.student.parameters() if parameter.grad is not None]
    assert gradients
    assert all(gradient.isfinite().all() for gradient in gradients)


@pytest.mark.parametrize("value", [0.0, 1.0])
def test_one_example_and_constant_features_are_finite(made: tuple[SSKD, SSKDHead, DistillStep], value: float) -> None:
    objective, head, step = made
    constant = {"pooled": torch.full((3, 4), value, requires_grad=True)}
    teacher = {"pooled": torch.full((3, 6), value)}
    one = replace(
        step, labels=torch.tensor([1]),
        outputs=Outputs(logits=torch.zeros(1, 3), features={"pooled": torch.full((1, 4), value)}),
        teacher=Outputs(logits=torch.zeros(1, 3), features={"pooled": torch.full((1, 6), value)}),
        views={"rotated": Outputs(logits=60 * torch.eye(3).bfloat16(), features=constant)},
        teacher_views={"rotated": Outputs(logits=-60 * torch.eye(3).bfloat16(), features=teacher)},
    )  # fmt: skip
    loss = objective(one)
    loss.backward()
    assert loss.isfinite()
    assert constant["pooled"].grad is not None
    assert constant["pooled"].grad.isfinite().all()
    assert head(one).item() == pytest.approx(0, abs=1e-6)  # there is one image to choose from


def test_it_compiles(made: tuple[SSKD, SSKDHead, DistillStep]) -> None:
    objective, _, step = made
    compiled: Any = torch.compile(objective, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(step), objective(step))


def test_settings_are_checked() -> None:
    for settings in ({"rotated_weight": 0}, {"rotated_share": 1.5}, {"similarity_temperature": 0}, {"ratio": 1}):
        with pytest.raises(ValidationError):
            SSKDConfig.model_validate(settings)
    with pytest.raises(InputError, match="needs to know both networks"):
        SSKDConfig().build(Task(num_examples=4, num_classes=3))
    with pytest.raises(InputError, match="needs to know both networks"):
        SSKDHeadConfig().build(Task(num_examples=4, num_classes=3))


def test_the_method_prepares_the_teachers_head() -> None:
    assert list(METHOD.terms) == ["sskd_head", "cross_entropy", "kd", "sskd"]
    assert SSKDHeadConfig().stage == "preparation"
    assert SSKDConfig().stage == "training"


@pytest.fixture
def sskd_known(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let studies know the method, whether or not the tables list it."""
    terms = dict(objectives.objective_configs()) | {"sskd": SSKDConfig, "sskd_head": SSKDHeadConfig}
    known = {**objectives.methods(), "sskd": METHOD}
    monkeypatch.setattr(objectives, "objective_configs", lambda: terms)
    monkeypatch.setattr(objectives, "methods", lambda: known)


@pytest.mark.usefixtures("sskd_known", "one_core", "no_report")
def test_a_study_trains_by_the_method(tmp_path: Path, train, tiny_study, figures_of) -> None:
    tree = tiny_study(training={"epochs": 4, "batch_size": 16}, baseline=None)
    del tree["teachers"]["soteacher"]
    tree["students"] = {"sskd": {"model": "tiny", "method": "sskd", "training": {"preparation_epochs": 3}}}
    results = train(tree, tmp_path / "run")
    folder = tmp_path / "run/students/standard-sskd/seed0"
    before, lines = figures_of(folder / "preparation.jsonl"), figures_of(folder / "metrics.jsonl")
    assert [set(line["losses"]) for line in before] == [{"sskd_head"}] * 3
    assert [set(line["losses"]) for line in lines] == [{"cross_entropy", "kd", "sskd"}] * 4
    width = 18  # of the tiny network's pooled feature
    assert results["rows"][-1]["extra_parameters"] == 2 * 2 * (width + 1) * width  # the student's head, the teacher's
