"""Every method, of teachers and of students, in a whole, tiny study: trained, killed, resumed, and what is left."""

import subprocess
import sys
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from soteacher.config import StudyConfig
from soteacher.data import load_data
from soteacher.errors import InterruptedRunError
from soteacher.files import read_json
from soteacher.jobs import Job, Study
from soteacher.models.weights import load_classifier
from soteacher.models.zoo import build_network
from soteacher.networks import train_network
from soteacher.objectives import METHODS, OBJECTIVES

STUDENTS = [name for name, method in METHODS.items() if method.role == "student"]
TEACHERS = [name for name, method in METHODS.items() if method.role == "teacher"]
NEEDS = {  # what has to be said besides the method
    "assistant": {"teacher": "standard"},
    "mcmi": {"start": "standard"},
    "mcmi_frozen": {"start": "standard"},
    "sftn": {"terms": {"sftn": {"student": "resnet8"}}},
}
SHORT = {"epochs": 2, "averaging": {"start": 1}}
"""Of methods that say how long they train, or from when on they average."""
REUSING = [name for name in STUDENTS if any(OBJECTIVES[term]().reuse() for term in METHODS[name].terms)]


@pytest.fixture(scope="module")
def study(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Study:
    """A study of all methods, whose teacher is trained."""
    config = StudyConfig.model_validate(
        {
            "data": {"source": "npz", "path": str(tiny_data), "augment": {"crop_padding": 1}},
            "seeds": [0],
            "training": {"epochs": 2, "batch_size": 16, "preparation_epochs": 1},
            "teachers": {name: teacher_settings(name) for name in TEACHERS},
            "students": {
                name: {"model": "resnet8", "method": name, **({} if name == "alone" else {"teachers": ["standard"]})}
                for name in STUDENTS
            },
            "logging": [],
            "card": None,
        }
    )
    made = Study(config, tmp_path_factory.mktemp("methods"), load_data(config.data, None), "cpu")
    train(made, Job("teacher", "standard", 0))
    return made


def teacher_settings(name: str) -> dict[str, Any]:
    """Return a teacher of a method, trained for two epochs at most."""
    changed = {key: value for key, value in SHORT.items() if key in METHODS[name].training}
    changed |= {"epochs": 4} if "stop_after" in METHODS[name].training else {}
    return {"model": "resnet8", "method": name, "training": changed, **NEEDS.get(name, {})}


def train(study: Study, job: Job, *, stop_after: int | None = None) -> None:
    """Train a network, or a few steps of it."""
    steps = count(1)
    train_network(study, job, on_event=lambda *_: None, should_stop=lambda: next(steps) == stop_after)


def job_of(name: str) -> Job:
    if name in TEACHERS:
        return Job("teacher", name, 0)
    return Job("student", name if name == "alone" else f"standard-{name}", 0)


def outcome(study: Study, job: Job) -> dict[str, torch.Tensor]:
    return load_file(study.folder_of(job) / "model.safetensors")


@pytest.mark.parametrize("name", [*STUDENTS, *TEACHERS])
def test_method_killed_and_resumed_gives_the_same_numbers(name: str, study: Study, tmp_path: Path) -> None:
    job = job_of(name)
    if not study.finished(job):
        train(study, job)
    whole, row = outcome(study, job), read_json(study.folder_of(job) / "model.json")["row"]

    other = Study(study.config, tmp_path, study.data, "cpu")
    link_standard_teacher(study, tmp_path, name)
    for steps in (2, 3):  # in the first epoch of a preparation, or of the training; then in what comes after
        with pytest.raises(InterruptedRunError):
            train(other, job, stop_after=steps)
    train(other, job)
    again = outcome(other, job)
    assert whole.keys() == again.keys()
    assert all(torch.equal(value, again[key]) for key, value in whole.items())
    assert not (other.folder_of(job) / "resume").exists()

    plain = build_network("resnet8", num_classes=3, in_channels=1)
    if name not in REUSING:
        assert whole.keys() == plain.state_dict().keys()  # nothing of the objective is left in the student
    assert row["parameters"] == sum(parameter.numel() for parameter in load(study, job).parameters())
    assert row["extra_parameters"] >= 0
    assert row["seconds_per_step"] > 0


def link_standard_teacher(study: Study, folder: Path, name: str) -> None:
    """Put the teacher that a network of a method may need into another run's folder."""
    (folder / "teachers").mkdir()
    if name != "standard":
        (folder / "teachers" / "standard").symlink_to(study.folder / "teachers" / "standard")


def load(study: Study, job: Job) -> Any:
    return load_classifier(study.folder_of(job))[0]


@pytest.mark.parametrize("name", ["kd", *REUSING])
def test_student_runs_without_any_objective(name: str, study: Study) -> None:
    folder = study.folder_of(job_of(name))
    if not folder.exists():
        train(study, job_of(name))
    program = (
        "import sys, torch\n"
        "from pathlib import Path\n"
        "from soteacher.models.weights import load_classifier\n"
        f"print(load_classifier(Path({str(folder)!r}))[0](torch.rand(2, 1, 12, 12)).shape)\n"
        "print([name for name in sys.modules if name.startswith('soteacher.objective')])\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout == "torch.Size([2, 3])\n[]\n"


@pytest.mark.parametrize(
    "device",
    [
        "cpu",
        pytest.param(
            "cuda",
            marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")],
        ),
    ],
)
@pytest.mark.parametrize("name", [*STUDENTS, *TEACHERS])
def test_method_trains_in_half_precision(name: str, device: str, study: Study, tmp_path: Path) -> None:
    link_standard_teacher(study, tmp_path, name)
    settings = {"precision": "bf16-mixed", "channels_last": True, "epochs": 1}
    training = study.config.training.model_copy(update=settings)
    there = Study(study.config.model_copy(update={"training": training}), tmp_path, study.data, device)
    train(there, job_of(name))
    assert all(value.isfinite().all() for value in outcome(there, job_of(name)).values())
