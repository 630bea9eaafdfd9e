import copy
from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from scipy.special import log_softmax
from torch import Tensor, nn

from soteacher.errors import InputError
from soteacher.models.classifier import Classifier
from soteacher.models.inspection import inspect_network
from soteacher.models.parts import Parts
from soteacher.models.taps import Tapped, resolve_taps
from soteacher.models.zoo import build_network
from soteacher.objectives.teacher.sftn import METHOD, SFTN, SFTNConfig, branch_loss
from soteacher.objectives.teacher.student_branches import branch_points
from soteacher.types import BuiltNetwork, NetworkFacts, Outputs, Step, Task

CLASSES, SIDE = 5, 32
IMAGES = torch.full((2, 3, SIDE, SIDE), 0.5)
PAIRS = {  # teacher, student, where branches leave and enter
    "same family": ("resnet14", "resnet8", [("stage1", "stage1"), ("stage2", "stage2")]),
    "other family": ("wrn_10_1", "shufflenet_v2", [("stage1", "stage1"), ("stage2", "stage2")]),
    "transformer teacher": ("timm/test_vit", "resnet8", [("stage2", "stage1"), ("stage3", "stage2")]),
    "transformer student": ("resnet8", "timm/test_vit", [("stage1", "stage2"), ("stage2", "stage3")]),
    "fewer stages": ("resnet8", "vgg8", [("stage1", "stage2"), ("stage2", "stage3")]),
}
WEIGHTS = {"temperature": 2.0, "divergence_weight": 3.0, "cross_entropy_weight": 1.0}


def classifier(name: str) -> Classifier:
    size = 160 if name.startswith("timm/") else None
    return Classifier(build_network(name, num_classes=CLASSES), mean=[0.5] * 3, std=[0.25] * 3, input_size=size)


def built(name: str) -> BuiltNetwork:
    made = classifier(name)
    return BuiltNetwork(classifier=made, parts=Parts(made), facts=inspect_network(made, IMAGES, name=f"student {name}"))


@cache
def original(name: str) -> tuple[Classifier, NetworkFacts]:
    torch.manual_seed(1)
    teacher = classifier(name)
    return teacher, inspect_network(teacher, IMAGES, name=f"teacher {name}")


def make(pair: str = "same family", **settings: Any) -> tuple[SFTN, Classifier, Task]:
    """Return the objective and the teacher that it is to train."""
    teacher_name, student_name, _ = PAIRS[pair]
    teacher, facts = original(teacher_name)
    task = Task(num_examples=24, num_classes=CLASSES, network=facts, build_network=built)
    torch.manual_seed(0)
    return SFTNConfig(student=student_name, **settings).build(task), copy.deepcopy(teacher), task


def step_of(teacher: Classifier, objective: SFTN, *, batch: int = 4, seed: int = 0, dtype: Any = torch.float32) -> Step:
    generator = torch.Generator().manual_seed(seed)
    images = torch.rand(batch, 3, SIDE, SIDE, generator=generator)
    tapped = Tapped(teacher.train(), resolve_taps(teacher, objective.features))
    logits, features = tapped(images)
    tapped.close()
    return Step(
        images=images, labels=torch.randint(0, CLASSES, (batch,), generator=generator), indices=torch.arange(batch),
        outputs=Outputs(logits=logits.to(dtype), features={key: value.to(dtype) for key, value in features.items()}),
        model=teacher.network, epoch=0, num_epochs=4, progress=0.0, seed=seed, parts=Parts(teacher),
    )  # fmt: skip


def branches_of(objective: SFTN) -> list[Any]:
    return list(objective.branches)


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 2


def by_hand(branch: Tensor, teacher: Tensor, labels: Tensor, *, temperature: float) -> np.ndarray:
    """The published weights, 3 and 1."""
    branch, teacher = branch.detach().double(), teacher.detach().double()
    log_branch, log_teacher = (log_softmax(value.numpy() / temperature, axis=1) for value in (branch, teacher))
    divergence = temperature**2 * (np.exp(log_teacher) * (log_teacher - log_branch)).sum(axis=1)
    return 3 * divergence - log_softmax(branch.numpy(), axis=1)[np.arange(len(labels)), labels]


def norm(parameters: Any) -> float:
    return sum(value.grad.norm().item() for value in parameters if value.grad is not None)


def test_branch_loss_by_hand() -> None:
    branch, teacher, labels = draw(6, CLASSES), draw(6, CLASSES, seed=1), torch.arange(6) % CLASSES
    for temperature in (1.0, 2.0):
        found = branch_loss(branch, teacher, labels, **{**WEIGHTS, "temperature": temperature})
        np.testing.assert_allclose(found, by_hand(branch, teacher, labels, temperature=temperature), rtol=1e-12)


def test_branch_loss_at_agreement_is_the_cross_entropy_and_shifts_do_not_matter() -> None:
    branch, labels = draw(6, CLASSES), torch.arange(6) % CLASSES
    wanted = nn.functional.cross_entropy(branch, labels, reduction="none")
    torch.testing.assert_close(branch_loss(branch, branch + 2, labels, **WEIGHTS), wanted)


def test_branch_loss_gradient_is_right_for_branch_and_teacher() -> None:
    branch, teacher = draw(3, CLASSES).requires_grad_(), draw(3, CLASSES, seed=1).requires_grad_()
    labels = torch.arange(3)
    assert torch.autograd.gradcheck(
        lambda ours, theirs: branch_loss(ours, theirs, labels, **WEIGHTS), (branch, teacher)
    )


def test_extreme_logits_stay_finite() -> None:
    branch = torch.tensor([[60.0, -60.0], [-60.0, 60.0]], requires_grad=True)
    teacher = (-branch).detach().requires_grad_()
    loss = branch_loss(branch, teacher, torch.tensor([1, 1]), **WEIGHTS).mean()
    loss.backward()
    assert loss.isfinite()
    assert all(value.grad is not None and value.grad.isfinite().all() for value in (branch, teacher))


@pytest.mark.parametrize(
    ("shapes", "message"),
    [(((4, 5), (4, 6), (4,)), r"one shape \[B, K\]"), (((4,), (4,), (4,)), r"one shape \[B, K\]"),
     (((4, 5), (4, 5), (3,)), r"labels \[B\], got .* and \[3\]")],
)  # fmt: skip
def test_shapes_that_do_not_fit_are_refused(shapes: Any, message: str) -> None:
    branch, teacher, labels = shapes
    with pytest.raises(InputError, match=message):
        branch_loss(draw(*branch), draw(*teacher), torch.zeros(labels, dtype=torch.int64), **WEIGHTS)


@pytest.mark.parametrize(
    "change", [{"temperature": 0.0}, {"divergence_weight": -1.0}, {"cross_entropy_weight": float("inf")}], ids=str
)
def test_impossible_numbers_are_refused(change: dict[str, float]) -> None:
    (name,) = change
    with pytest.raises(InputError, match=f"{name} must be"):
        branch_loss(draw(2, 3), draw(2, 3), torch.tensor([0, 1]), **(WEIGHTS | change))
    with pytest.raises(ValidationError):
        SFTNConfig.model_validate(change)


def test_labels_must_be_class_ids() -> None:
    with pytest.raises(InputError, match=r"labels must be integer class ids, got torch\.float32"):
        branch_loss(draw(2, 3), draw(2, 3), torch.zeros(2), **WEIGHTS)


@pytest.mark.parametrize("pair", PAIRS)
def test_branches_leave_and_enter_at_the_stages_before_the_last(pair: str) -> None:
    objective, _, task = make(pair)
    points = PAIRS[pair][2]
    assert objective.features == tuple(teacher for teacher, _ in points)
    assert [branch.tap for branch in branches_of(objective)] == [student for _, student in points]
    assert task.network is not None
    assert (
        len(branch_points(task.network, task.network))
        == len([tap for tap in task.network.taps if tap.startswith("stage")]) - 1
    )


@pytest.mark.parametrize("pair", PAIRS)
def test_it_trains_the_teacher_and_its_branches(pair: str) -> None:
    objective, teacher, _ = make(pair)
    loss = objective(step_of(teacher, objective))
    assert loss.shape == ()
    assert loss.dtype == torch.float32
    assert loss.isfinite()
    loss.backward()
    assert norm(teacher.network.parameters()) > 0
    for branch in branches_of(objective):
        assert norm(branch.connector.parameters()) > 0
        trained = [value for value in branch.student.parameters() if value.requires_grad]
        left = [value for value in branch.student.parameters() if not value.requires_grad]
        assert left
        assert all(value.grad is not None and value.grad.isfinite().all() for value in trained)
        assert all(value.grad is None for value in left)


def rest_of_resnet(network: Any, stage: int, maps: Tensor) -> Tensor:
    for layer in (network.layer1, network.layer2, network.layer3)[stage:]:
        maps = layer(maps)
    return network.fc(maps.mean((2, 3)))


def connected(connector: Any, maps: Tensor) -> Tensor:
    values = nn.functional.conv2d(maps, connector.convolution.weight)
    mean = values.mean((0, 2, 3), keepdim=True)
    return (values - mean) / torch.sqrt(values.var((0, 2, 3), unbiased=False, keepdim=True) + 1e-5)


def test_loss_by_hand() -> None:
    objective, teacher, _ = make(temperature=2.0)
    step = step_of(teacher, objective)
    wanted = np.zeros(4)
    for number, branch in enumerate(branches_of(objective), start=1):
        bridged = connected(branch.connector, step.outputs.features[f"stage{number}"])
        logits = rest_of_resnet(copy.deepcopy(branch.student.network), number, bridged)
        wanted += by_hand(logits, step.outputs.logits, step.labels, temperature=2.0)
    assert objective(step).item() == pytest.approx(wanted.mean(), rel=1e-4)


def test_what_does_not_run_is_neither_trained_nor_counted() -> None:
    objective, _, _ = make()
    for number, branch in enumerate(branches_of(objective), start=1):
        before = {f"network.layer{stage}." for stage in range(1, number + 1)} | {"network.conv1.", "network.bn1."}
        for name, parameter in branch.student.named_parameters():
            assert parameter.requires_grad != any(name.startswith(prefix) for prefix in before), name


def test_each_branch_has_weights_of_its_own() -> None:
    objective, _, _ = make()
    first, second = (branch.student.network.fc.weight for branch in branches_of(objective))
    assert not torch.equal(first, second)
    assert len({id(value) for value in objective.parameters()}) == len(list(objective.parameters()))


def test_gradients_reach_the_teacher_over_features_and_logits() -> None:
    objective, teacher, _ = make()
    step = step_of(teacher, objective)
    loss = objective(step)
    sources = [step.outputs.logits, *step.outputs.features.values()]
    assert all(gradient.norm() > 0 for gradient in torch.autograd.grad(loss, sources))


@pytest.mark.parametrize("pair", ["same family", "other family"])
def test_forward_leaves_networks_and_generators_as_they_were(pair: str) -> None:
    objective, teacher, _ = make(pair)
    step = step_of(teacher, objective)
    modules = {"objective": objective, "teacher": teacher}
    before = {
        f"{key} {name}": value.clone() for key, module in modules.items() for name, value in module.state_dict().items()
    }
    random = torch.get_rng_state()
    assert torch.equal(objective(step), objective(step))
    assert torch.equal(torch.get_rng_state(), random)
    after = {f"{key} {name}": value for key, module in modules.items() for name, value in module.state_dict().items()}
    assert all(torch.equal(value, before[name]) for name, value in after.items())


def test_building_leaves_the_facts_and_hooks_alone() -> None:
    objective, _, _ = make()
    for branch in branches_of(objective):
        assert not any(vars(module)["_forward_pre_hooks"] for module in branch.modules())
        assert all(int(value) == 0 for name, value in branch.named_buffers() if name.endswith("num_batches_tracked"))
        assert all(value.grad is None for value in branch.parameters())


def test_a_resumed_objective_has_the_same_next_loss() -> None:
    objective, teacher, task = make()
    step = step_of(teacher, objective)
    torch.manual_seed(9)
    resumed = SFTNConfig(student="resnet8").build(task)
    assert not torch.equal(resumed(step), objective(step))
    resumed.load_state_dict(objective.state_dict())
    assert torch.equal(resumed(step), objective(step))


def test_steps_lower_the_loss() -> None:
    objective, teacher, _ = make()
    parameters = [*teacher.parameters(), *(value for value in objective.parameters() if value.requires_grad)]
    optimizer = torch.optim.SGD(parameters, lr=0.01)
    losses: list[float] = []
    for _ in range(3):
        loss = objective(step_of(teacher, objective))
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[2] < losses[1] < losses[0]


@pytest.mark.parametrize("pair", ["same family", "transformer teacher"])
def test_a_batch_of_one_is_finite(pair: str) -> None:
    objective, teacher, _ = make(pair)
    loss = objective(step_of(teacher, objective, batch=1))
    loss.backward()
    assert loss.isfinite()
    assert all(value.grad is None or value.grad.isfinite().all() for value in objective.parameters())


def test_half_precision_features_give_a_float32_loss() -> None:
    objective, teacher, _ = make("other family")
    step = step_of(teacher, objective, dtype=torch.bfloat16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = objective(step)
    loss = objective(step)
    assert mixed.dtype == loss.dtype == torch.float32
    torch.testing.assert_close(mixed, loss, rtol=2e-2, atol=0)  # the branches' own layers are rounded


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # the compiler's own look
def test_compiled_it_gives_the_same() -> None:
    objective, teacher, _ = make()
    step = step_of(teacher, objective)
    torch.compiler.reset()
    compiled: Any = torch.compile(objective, backend="eager")
    torch.testing.assert_close(compiled(step), objective(step), rtol=1e-6, atol=0)


def test_a_student_must_be_named() -> None:
    _, _, task = make()
    with pytest.raises(InputError, match=r"^sftn needs the student's network: set terms\.sftn\.student \("):
        SFTNConfig().build(task)


@pytest.mark.parametrize("missing", ["network", "build_network"])
def test_a_task_that_says_too_little_is_refused(missing: str) -> None:
    _, _, task = make()
    changes: dict[str, Any] = {missing: None}
    with pytest.raises(InputError, match=r"give Task\(network=\.\.\., build_network=\.\.\.\)"):
        SFTNConfig(student="resnet8").build(replace(task, **changes))


def test_an_unknown_student_is_named() -> None:
    _, _, task = make()
    with pytest.raises(InputError, match="'resnet9000x'"):
        SFTNConfig(student="resnet9000x").build(task)


def test_a_student_of_other_classes_is_refused() -> None:
    _, _, task = make()
    with pytest.raises(InputError, match="student resnet8 gives 5 logits for 7 classes"):
        SFTNConfig(student="resnet8").build(replace(task, num_classes=7))


def test_networks_without_inner_stages_are_refused() -> None:
    bare = NetworkFacts(name="teacher mlp", taps={"stage1": (8, 4, 4), "pooled": (8,)}, num_logits=CLASSES)
    _, _, task = make()
    with pytest.raises(
        InputError, match="need two stages of both networks: teacher mlp has stage1, student resnet8 has"
    ):
        SFTNConfig(student="resnet8").build(replace(task, network=bare))


def test_a_student_that_cannot_go_on_from_a_stage_is_refused() -> None:
    class Refusing:
        @property
        def classifier(self) -> nn.Linear:
            raise NotImplementedError

        def run_from(self, tap: str, feature: Tensor, images: Tensor) -> Tensor:
            assert feature.shape == (2, 16, 32, 32)
            assert images.shape == IMAGES.shape
            raise InputError(f"the network cannot go on from {tap!r}")

    _, _, task = make()
    with pytest.raises(InputError, match="student resnet8 makes no branch: the network cannot go on from 'stage1'"):
        SFTNConfig(student="resnet8").build(
            replace(task, build_network=lambda name: replace(built(name), parts=Refusing()))
        )


def test_facts_without_a_network_behind_them_are_refused() -> None:
    def from_table(name: str) -> BuiltNetwork:
        found = built(name)
        return replace(found, facts=replace(found.facts, taps=dict(found.facts.taps)))

    _, _, task = make()
    with pytest.raises(InputError, match="facts of student resnet8 must give the shape at any module's path"):
        SFTNConfig(student="resnet8").build(replace(task, build_network=from_table))


def test_the_published_terms() -> None:
    assert METHOD.terms == {"cross_entropy": {"weight": 1.0}, "sftn": {"weight": 1.0}}
    config = SFTNConfig()
    assert (config.divergence_weight, config.cross_entropy_weight, config.temperature) == (3.0, 1.0, 1.0)
    assert not config.needs_teacher
