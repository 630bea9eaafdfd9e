"""A student that takes over its teacher's classifier, from the settings to the deployed file."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from soteacher import objectives
from soteacher.assembly import Assembled, assemble
from soteacher.config import Student
from soteacher.data import load_data
from soteacher.deployment import export_classifier
from soteacher.errors import InputError
from soteacher.jobs import Study, evaluation_batches, new_classifier
from soteacher.models.classifier import Classifier
from soteacher.models.parts import Parts
from soteacher.models.reused_classifier import ProjectedPooling
from soteacher.models.weights import load_classifier
from soteacher.objectives.student import simkd
from soteacher.recipes import read_study
from soteacher.studies import run_study

pytestmark = pytest.mark.usefixtures("one_core", "no_report", "tables")


class OtherConfig(simkd.SimKDConfig):
    """Settings of another term that takes the classifier over."""


@pytest.fixture
def tables(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Put the objective, and another one that reuses the classifier, in the tables."""
    monkeypatch.setitem(objectives.OBJECTIVES, "simkd", simkd.SimKDConfig)
    monkeypatch.setitem(objectives.OBJECTIVES, "other", OtherConfig)
    monkeypatch.setitem(objectives.METHODS, "simkd", simkd.METHOD)
    objectives.objective_configs.cache_clear()
    objectives.methods.cache_clear()
    yield
    objectives.objective_configs.cache_clear()
    objectives.methods.cache_clear()


@pytest.fixture
def study_of(tiny_tree: Callable[..., dict[str, Any]], tmp_path: Path) -> Callable[..., Study]:
    def make(student: dict[str, Any], factories: dict[str, Any] | None = None) -> Study:
        tree = tiny_tree(students={"student": student}, baseline=None)
        tree["teachers"] = {"standard": {"model": "resnet8x2"}}
        config = read_study(tree)
        return Study(config, tmp_path / "run", load_data(config.data, None), "cpu", factories or {})

    return make


def assembled(study: Study, teacher: Classifier | None, seed: int = 0) -> Assembled:
    spec = study.config.students["student"]
    assert isinstance(spec, Student)
    return assemble(study, spec, role="student", seed=seed, teacher=teacher, teacher_name="teacher resnet8x2")


def teacher_of(study: Study) -> Classifier:
    torch.manual_seed(7)
    return new_classifier(study, "resnet8x2", pretrained=False)[0]


def test_the_arms_of_a_seed_start_from_the_same_backbone(study_of: Callable[..., Study]) -> None:
    study = study_of({"model": "resnet8", "method": "simkd"})
    teacher = teacher_of(study)
    made = assembled(study, teacher)
    plain = assembled(study_of({"model": "resnet8", "method": "kd"}), teacher)
    assert plain.network.reused is None
    mine, theirs = made.classifier.state_dict(), plain.classifier.state_dict()
    shared = [name for name in theirs if not name.startswith("network.fc.")]
    assert all(torch.equal(mine[name], theirs[name]) for name in shared)
    again, other = assembled(study, teacher).classifier.state_dict(), assembled(study, teacher, seed=1).classifier
    assert all(torch.equal(mine[name], again[name]) for name in mine)
    name = "network.avgpool.projector.0.weight"
    assert not torch.equal(mine[name], other.state_dict()[name])
    assert torch.equal(Parts(other).classifier.weight, Parts(teacher).classifier.weight)


def test_the_network_is_inspected_as_it_will_be_trained(study_of: Callable[..., Study]) -> None:
    study = study_of({"model": "resnet8", "method": "simkd", "terms": {"simkd": {"reduction": 4}}})
    made = assembled(study, teacher_of(study))
    assert made.network.reused is not None
    assert made.network.reused.reduction == 4
    assert made.terms["simkd"].objective.teacher_features == ("maps",)
    assert made.extra_parameters() == 0  # all of it is the student's own
    assert isinstance(made.classifier.get_submodule("network.avgpool"), ProjectedPooling)
    assert "projected" in made.terms["simkd"].objective.features


def test_two_terms_that_take_the_classifier_over_are_refused(study_of: Callable[..., Study]) -> None:
    study = study_of({"model": "resnet8", "method": "simkd", "terms": {"other": {}}})
    with pytest.raises(InputError) as caught:
        assembled(study, teacher_of(study))
    assert str(caught.value) == (
        "the terms simkd and other each put the teacher's classifier into the student; leave one of them"
    )


def test_a_teacher_whose_classifier_is_not_linear_is_refused(study_of: Callable[..., Study]) -> None:
    study = study_of({"model": "resnet8", "method": "simkd"})
    network = nn.Sequential(nn.Conv2d(1, 3, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    channels = study.data.in_channels
    network[0] = nn.Conv2d(channels, 3, 1)
    teacher = Classifier(network, mean=[0.5] * channels, std=[0.25] * channels)
    with pytest.raises(InputError) as caught:
        assembled(study, teacher)
    assert str(caught.value) == (
        "simkd: teacher resnet8x2 has no classifier to exchange or reuse: wanted a linear layer as the classifier of "
        "Sequential, got none"
    )


@pytest.fixture
def run(tiny_tree: Callable[..., dict[str, Any]], tmp_path: Path) -> Path:
    tree = tiny_tree(students={"simkd": {"model": "resnet8", "method": "simkd"}}, baseline=None)
    tree["teachers"] = {"standard": {"model": "resnet8x2", "method": "standard"}}
    run_study(read_study(tree), tmp_path / "run", device="cpu", workers=1)
    return tmp_path / "run"


def images_of(run: Path) -> Tensor:
    data = load_data(read_study(run / "config.yaml").data, None)
    return next(iter(evaluation_batches(data.test, "cpu"))).images


def test_a_study_leaves_a_student_that_is_read_and_deployed_like_any_other(run: Path, tmp_path: Path) -> None:
    folder, images = run / "students/standard-simkd/seed0", images_of(run)
    student, spec, facts = load_classifier(folder)
    teacher, _, _ = load_classifier(run / "teachers/standard/seed0")
    assert spec.reused is not None
    assert facts["row"]["parameters"] == sum(value.numel() for value in student.parameters())
    assert torch.equal(Parts(student).classifier.weight, Parts(teacher).classifier.weight)
    with torch.no_grad():
        logits = student(images)
    labels = next(iter(evaluation_batches(load_data(read_study(run / "config.yaml").data, None).test, "cpu"))).labels
    assert (logits.argmax(1) == labels).float().mean().item() == pytest.approx(facts["row"]["accuracy_last"])
    assert export_classifier(student, spec, images, tmp_path / "copy", form="safetensors") == 0
    copied, read, _ = load_classifier(tmp_path / "copy")
    assert read == spec
    with torch.no_grad():
        assert torch.equal(copied(images), logits)


def test_its_losses_fall_and_its_projector_was_trained(run: Path) -> None:
    folder = run / "students/standard-simkd/seed0"
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [list(line["losses"]) for line in lines] == [["simkd"], ["simkd"]]
    assert lines[1]["train_loss"] < lines[0]["train_loss"]
    weights = load_classifier(folder)[0].state_dict()
    assert weights["network.avgpool.projector.1.num_batches_tracked"] == 6
    assert weights["network.avgpool.projector.1.weight"].std() > 0


def test_it_becomes_an_onnx_graph(run: Path, tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    student, spec, _ = load_classifier(run / "students/standard-simkd/seed0")
    assert export_classifier(student, spec, images_of(run), tmp_path / "student.onnx", form="onnx") < 1e-4


def test_a_finished_run_is_gone_on_in(run: Path) -> None:
    before = (run / "students/standard-simkd/seed0/model.safetensors").read_bytes()
    results = run_study(read_study(run / "config.yaml"), run, device="cpu", workers=1, resume=True)
    assert (run / "students/standard-simkd/seed0/model.safetensors").read_bytes() == before
    assert len(results["rows"]) == 2
