from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from soteacher.config import FileTeacher
from soteacher.data import load_data
from soteacher.errors import InputError
from soteacher.jobs import Job, Study, find_network, in_turn, jobs_of, load_teacher_file, new_classifier
from soteacher.models.weights import save_classifier
from soteacher.models.zoo import build_network
from soteacher.recipes import read_study


@pytest.fixture
def study(tiny_tree: Callable[..., dict[str, Any]], tmp_path: Path) -> Study:
    config = read_study(tiny_tree())
    return Study(config, tmp_path / "run", load_data(config.data), "cpu")


def test_jobs_come_after_what_they_need(tiny_tree: Callable[..., dict[str, Any]]) -> None:
    tree = tiny_tree(seeds=[4, 2], baseline=None)
    tree["teachers"] = {"early": {"from": "standard", "after": 1}, **tree["teachers"], "old": {"file": "old"}}
    jobs = jobs_of(read_study(tree))
    names = [job.name for job in jobs]
    assert len(names) == len(set(names)) == 2 * (3 + 1 + 4) + 1
    for job, needed in jobs.items():
        assert needed is None or names.index(needed.name) < names.index(job.name)
    assert jobs[Job("teacher", "early", 2)] == Job("teacher", "standard", 2)
    assert jobs[Job("student", "early-kd", 4)] == Job("teacher", "early", 4)
    assert jobs[Job("student", "alone", 4)] is None
    assert names[0] == "teacher standard/seed4"
    assert [job.role for job in jobs] == ["teacher"] * 7 + ["student"] * 10


def test_students_that_share_kept_answers_are_not_side_by_side(tiny_tree: Callable[..., dict[str, Any]]) -> None:
    plain, cached = (read_study(tiny_tree(seeds=[4, 2], **over)) for over in ({}, {"teacher_cache": {}}))
    jobs = jobs_of(plain)
    assert list(in_turn(plain, jobs)) == list(jobs)
    turns = list(in_turn(cached, jobs_of(cached)))
    assert set(turns) == set(jobs)
    assert [job.role for job in turns] == [job.role for job in jobs]
    students = [job for job in turns if job.role == "student"]
    assert [job.seed for job in students] == [4, 2] * (len(students) // 2)
    assert [job.arm for job in students[::2]] == [job.arm for job in students[1::2]]


def test_finished_is_decided_by_the_file_that_is_written_last(study: Study) -> None:
    job = Job("teacher", "standard", 0)
    folder = study.folder_of(job)
    assert folder == study.folder / "teachers" / "standard" / "seed0"
    folder.mkdir(parents=True)
    (folder / "model.safetensors").touch()
    assert not study.finished(job)
    (folder / "model.json").touch()
    assert study.finished(job)


def test_new_classifier_has_the_shape_of_the_data(study: Study) -> None:
    classifier, network = new_classifier(study, "resnet8", pretrained=False)
    assert (network.num_classes, network.in_channels) == (3, 1)
    assert network.mean == study.data.mean
    assert classifier(torch.rand(2, 1, 12, 12)).shape == (2, 3)


def test_find_network_takes_files_folders_and_runs(tmp_path: Path) -> None:
    def make(*parts: str) -> Path:
        path = tmp_path.joinpath(*parts)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
        return path

    weights = make("run", "teachers", "soteacher", "seed0", "model.safetensors")
    foreign = make("old.pth")
    assert find_network(foreign) == foreign
    assert find_network(weights) == find_network(weights.parent) == find_network(tmp_path / "run") == weights
    student = make("run", "students", "soteacher-kd", "seed0", "model.safetensors")
    assert find_network(tmp_path / "run") == weights
    assert find_network(tmp_path / "run", ("student", "teacher")) == student
    make("run", "teachers", "soteacher", "seed1", "model.safetensors")
    with pytest.raises(InputError, match=r"run holds 2 teachers; name one: .*seed0, .*seed1$"):
        find_network(tmp_path / "run")
    for nothing in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(InputError, match=r"no network at .*: wanted a run folder, a model.safetensors or a check"):
            find_network(nothing)


def test_load_teacher_file_reads_our_own(study: Study, tmp_path: Path) -> None:
    classifier, network = new_classifier(study, "resnet8", pretrained=False)
    save_classifier(tmp_path / "one", classifier, network, {})
    loaded, found = load_teacher_file(study, FileTeacher(file=tmp_path / "one"))
    images = torch.rand(2, 1, 12, 12)
    assert found == network
    assert torch.equal(loaded.eval()(images), classifier.eval()(images))


def test_load_teacher_file_reads_a_foreign_checkpoint(study: Study, tmp_path: Path) -> None:
    network = build_network("resnet8", num_classes=3, in_channels=1)
    wrapped = {f"module.{name}": value for name, value in network.state_dict().items()}
    torch.save({"epoch": 3, "state_dict": wrapped}, tmp_path / "old.pth")
    loaded, found = load_teacher_file(study, FileTeacher(file=tmp_path / "old.pth", model="resnet8"))
    images = torch.rand(2, 1, 12, 12)
    normalised = (images - loaded.mean) / loaded.std
    assert torch.allclose(loaded.eval()(images), network.eval()(normalised))
    assert (found.model, found.mean) == ("resnet8", study.data.mean)


class _Runs:
    """Code that a pickle would run."""

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return (__import__("os").system, ("touch /tmp/must-not-be-there",))


def _foreign(content: Any) -> Callable[[Path], None]:
    return lambda path: torch.save(content, path)


def _state(**over: Any) -> dict[str, torch.Tensor]:
    return build_network("resnet8", num_classes=over.pop("num_classes", 3), in_channels=1).state_dict() | over


@pytest.mark.parametrize(
    ("write", "model", "message"),
    [
        (_foreign({"weight": _Runs()}), "resnet8", "is refused: reading it would run code ("),
        (
            _foreign(_state()),
            None,
            "does not say which network it is: name its model (in a command --model or --teacher-model; see",
        ),
        (_foreign(_state()), "resnet9", "resnet9"),
        (_foreign(_state(strange=torch.zeros(2))), "resnet8", "1 not known to it (strange)"),
        (_foreign({k: v for k, v in _state().items() if "conv1" not in k}), "resnet8", "missing ("),
        (_foreign(_state(num_classes=7)), "resnet8", "has 7 classes, wanted 3"),
        (_foreign({"best": 0.7}), "resnet8", "holds no weights: wanted only tensors by name"),
        (lambda path: path.write_bytes(b"PK\x03\x04 half of it"), "resnet8", "cannot be read, it may be damaged"),
        (lambda path: path.write_bytes(b""), "resnet8", "cannot be read, it may be damaged"),
    ],
)
def test_load_teacher_file_refuses_in_one_line(
    study: Study, tmp_path: Path, write: Callable[[Path], None], model: str | None, message: str
) -> None:
    path = tmp_path / "old.pth"
    write(path)
    with pytest.raises(InputError) as caught:
        load_teacher_file(study, FileTeacher(file=path, model=model))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not Path("/tmp/must-not-be-there").exists()


def test_load_teacher_file_refuses_a_truncated_one_of_ours(study: Study, tmp_path: Path) -> None:
    classifier, network = new_classifier(study, "resnet8", pretrained=False)
    save_classifier(tmp_path / "one", classifier, network, {})
    weights = tmp_path / "one" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-10])
    with pytest.raises(InputError, match="cannot be read as safetensors, it may be damaged"):
        load_teacher_file(study, FileTeacher(file=weights))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_classes": 5, "class_names": ()}, "knows 5 classes, and the data tiny has 3"),
        ({"in_channels": 3, "mean": (0.5,) * 3, "std": (0.5,) * 3}, "wants images of 3 channels, and tiny has 1"),
    ],
)
def test_load_teacher_file_refuses_a_teacher_of_other_data(
    study: Study, tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    _, network = new_classifier(study, "resnet8", pretrained=False)
    other = network.model_copy(update=change)
    from soteacher.models.classifier import build_classifier

    save_classifier(tmp_path / "one", build_classifier(other), other, {})
    with pytest.raises(InputError, match=message):
        load_teacher_file(study, FileTeacher(file=tmp_path / "one"))


def test_a_name_that_is_given_goes_before_that_of_the_file(study: Study, tmp_path: Path) -> None:
    classifier, network = new_classifier(study, "resnet8", pretrained=False)
    save_classifier(tmp_path / "one", classifier, network, {})
    with pytest.raises(InputError, match="does not fit ResNet"):
        load_teacher_file(study, FileTeacher(file=tmp_path / "one", model="resnet20"))
