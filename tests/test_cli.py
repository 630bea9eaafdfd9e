import json
import os
import re
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.error import URLError

import numpy as np
import pytest
import torch
import yaml

from soteacher import cli, studies
from soteacher.errors import InterruptedRunError, WorkerDiedError
from soteacher.pool import available_cores
from soteacher.published_settings import method_recipe_names, pair_names
from soteacher.recipes import read_study, recipe_names, recipe_text

Answer = tuple[int, str, str]


@pytest.fixture
def soteacher(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Answer]:
    """Run the command line in this process; return exit status, standard output and standard error."""

    def run(*words: object) -> Answer:
        monkeypatch.setattr(sys, "argv", ["soteacher", *map(str, words)])
        with pytest.raises(SystemExit) as end:
            cli.main()
        said = capsys.readouterr()
        return end.value.code or 0, said.out, said.err

    return run


@pytest.fixture
def study(tmp_path: Path, tiny_tree: Callable[..., dict[str, Any]]) -> Callable[..., Path]:
    """Write the tiny study as a file."""

    def write(**over: Any) -> Path:
        path = tmp_path / "study.yaml"
        path.write_text(yaml.safe_dump(tiny_tree(**over), sort_keys=False))
        return path

    return write


def _is_refusal(answer: Answer, message: str) -> bool:
    """Return whether bad input ended as it must: one line on standard error, exit status 2."""
    status, _, said = answer
    assert status == 2
    assert said.startswith("soteacher: ")
    assert said.count("\n") == 1
    return message in said


def test_help_and_version(soteacher) -> None:
    status, out, _ = soteacher()
    assert status == 0
    assert "distill" in out
    assert soteacher("--help")[:2] == (0, out)
    assert soteacher("--version") == (0, "0.1.0\n", "")
    for command in (
        "run",
        "teach",
        "distill",
        "evaluate",
        "card",
        "export",
        "report",
        "recipes",
        "methods",
        "models",
        "data",
    ):
        assert soteacher(command, "--help")[0] == 0


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("runn",), "No such command 'runn'. Did you mean 'run'?; see 'soteacher --help'"),
        (("run",), "Missing argument"),
        (("run", "quickstart"), "Missing option '--out'; see 'soteacher run --help'"),
        (("run", "quickstart", "--out"), "'--out' requires an argument"),
        (("run", "quickstart", "--outt", "x"), "No such option"),
        (("run", "quickstart", "--out", "OUT", "--device", "tpu"), "'--device'"),
        (("run", "quickstart", "--out", "OUT", "--workers", "0"), "'--workers'"),
        (("run", "quickstart", "--out", "OUT", "--workers", "two"), "'--workers'"),
        (("run", "quickstart", "more", "--out", "OUT"), "unexpected extra argument"),
        (("teach", "--data", "x", "--out", "OUT"), "Missing option '--model'"),
        (("export", "x", "--data", "y", "--out", "OUT", "--format", "tflite"), "'--format'"),
    ],
)
def test_words_that_are_no_command_line_end_in_one_line(
    soteacher, tmp_path: Path, words: tuple[str, ...], message: str
) -> None:
    answer = soteacher(*(str(tmp_path / "run") if word == "OUT" else word for word in words))
    assert _is_refusal(answer, message), answer
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("run", "quickstrat"), "unknown recipe 'quickstrat'; did you mean quickstart?"),
        (("run", "quickstart", "--pair", "vgg13-vgg8"), "quickstart is a whole study with networks of its own"),
        (("run", "kd", "--pair", "vgg13-vgg9"), "unknown pair 'vgg13-vgg9'; did you mean vgg13-vgg8"),
        (("run", "fsp", "--pair", "resnet50-vgg8"), "fsp does not suit the pair resnet50-vgg8: "),
        (("run", "nowhere.yaml"), "nowhere.yaml: no readable study: No such file or directory"),
        (("run", "quickstart", "--set", "epochs"), "--set wants path.to.field=value, got 'epochs'"),
        (("run", "quickstart", "--set", "training.epoch=1"), "unknown key 'epoch'; did you mean epochs"),
        (("run", "quickstart", "--set", "training.epochs=soon"), "training.epochs: wanted a whole number, got 'soon'"),
        (("run", "quickstart", "--set", "training.epochs=0"), "should be greater than or equal to 1, got 0"),
        (("run", "quickstart", "--set", "training.schedule.milestones=[1, 99]"), "99 is past the end of"),
        (("run", "quickstart", "--set", "students.kd.terms.kd.temperature=-1"), "should be greater than 0, got -1"),
        (("run", "quickstart", "--set", "students.kd.terms.kd.weight=-1"), "should be greater than 0, got -1"),
        (
            ("run", "quickstart", "--set", "teachers.standard.method=standart"),
            "unknown method 'standart'; did you mean st",
        ),
        (
            ("run", "quickstart", "--set", "teachers.standard.terms={lipshitz: {}}"),
            "unknown objective 'lipshitz'; did you",
        ),
        (("run", "quickstart", "--set", "students.kd.model=resnet8x"), "resnet8x"),
        (
            ("run", "quickstart", "--set", "baseline=standart-kd"),
            "unknown baseline arm 'standart-kd'; did you mean stand",
        ),
        (("run", "quickstart", "--set", "data={source: cifar}"), "unknown source 'cifar'; did you mean cifar10"),
        (("run", "quickstart", "--set", "data.train_examples=99999"), "train_examples is 99999, but there are 6000"),
        (("run", "quickstart", "--device", "cuda"), "device cuda was asked for, and PyTorch finds no CUDA device here"),
        (("teach", "--model", "resnt8", "--data", "fashion_mnist_small"), "unknown network 'resnt8'; did you mean"),
        (("teach", "--model", "resnet8", "--data", "fashion_mnist_smal"), "did you mean fashion_mnist_small"),
        (("teach", "--model", "resnet8", "--data", "./nowhere"), "nowhere"),
        (("teach", "--model", "resnet8", "--data", "nowhere.npz"), "npz file nowhere.npz does not exist"),
        (
            ("distill", "--teacher", "nowhere", "--model", "resnet8", "--data", "fashion_mnist_small"),
            "no network at nowh",
        ),
    ],
)
def test_bad_input_ends_in_one_line_and_leaves_nothing(
    soteacher, tmp_path: Path, words: tuple[str, ...], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    answer = soteacher(*words, "--out", tmp_path / "run")
    assert _is_refusal(answer, message), answer
    assert list(tmp_path.iterdir()) == []


def test_an_archive_that_is_missing_offline_says_where_to_put_it(
    soteacher, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def offline(*_: object, **__: object) -> None:
        raise URLError(OSError(-3, "Temporary failure in name resolution"))

    monkeypatch.setattr(urllib.request, "urlopen", offline)
    words = ("teach", "--model", "resnet8", "--data", "cifar100", "--data-root", tmp_path, "--out", tmp_path / "run")
    answer = soteacher(*words)
    assert _is_refusal(answer, "Temporary failure in name resolution; put the archive at"), answer
    assert not (tmp_path / "run").exists()


def test_a_folder_that_holds_something_else_is_left_as_it_is(soteacher, tmp_path: Path, study) -> None:
    run = tmp_path / "photos"
    run.mkdir()
    (run / "cat.txt").write_text("mine")
    for resume in ((), ("--resume",)):
        answer = soteacher("run", study(), "--out", run, *resume)
        assert _is_refusal(answer, f"{run} exists and holds no run; choose another folder with --out"), answer
    assert [path.name for path in run.iterdir()] == ["cat.txt"]
    answer = soteacher("run", study(), "--out", run / "cat.txt")
    assert _is_refusal(answer, "a file is in its place"), answer
    assert (run / "cat.txt").read_text() == "mine"


@pytest.mark.usefixtures("one_core")
def test_a_study_from_its_start_to_its_page(soteacher, tmp_path: Path, study, tiny_data: Path) -> None:
    run = tmp_path / "run"
    status, out, said = soteacher("run", study(), "--out", run, "--set", "training.epochs=1", "--workers", 1)
    assert (status, said) == (0, "")
    assert "student alone/seed0: finished, test accuracy" in out
    assert f"report: {run / 'report.html'}" in out
    assert "soteacher-kd" in out
    assert json.loads((run / "results.json").read_text())["recipe"] == "tiny"
    assert "</html>" in (run / "report.html").read_text()
    assert "teacher standard/seed0: finished" in (run / "log.txt").read_text()

    answer = soteacher("run", study(), "--out", run, "--set", "training.epochs=1")
    assert _is_refusal(answer, f"{run} holds this run already; go on with --resume"), answer
    answer = soteacher("run", study(), "--out", run, "--resume")
    assert _is_refusal(answer, "training.epochs: 1 in the folder, 2 now"), answer
    (run / "results.json").unlink()
    (run / "report.html").unlink()
    status, out, _ = soteacher("report", run)
    assert (status, "finished" in out) == (0, False)
    assert (run / "report.html").exists()
    assert (run / "results.json").exists()

    teacher, student = run / "teachers/soteacher/seed0", run / "students/soteacher-kd/seed0"
    row = json.loads((student / "model.json").read_text())["row"]
    status, out, _ = soteacher("evaluate", student, "--data", tiny_data, "--device", "cpu")
    assert status == 0
    assert f"accuracy  {100 * row['accuracy_last']:.2f} %" in out
    status, out, _ = soteacher(
        "export", student, "--data", tiny_data, "--out", tmp_path / "out", "--format", "safetensors"
    )
    assert status == 0
    assert (tmp_path / "out/model.safetensors").read_bytes() == (student / "model.safetensors").read_bytes()
    answer = soteacher("export", student, "--data", tiny_data, "--out", tmp_path / "out")
    assert _is_refusal(answer, "out exists; choose another place with --out"), answer
    answer = soteacher("evaluate", run / "teachers", "--data", tiny_data)
    assert _is_refusal(answer, "no network at"), answer

    words = (
        "--model",
        "resnet8",
        "--data",
        tiny_data,
        "--epochs",
        1,
        "--set",
        "logging=[]",
        "--set",
        "data.augment={}",
    )
    status, out, _ = soteacher("distill", "--teacher", teacher, *words, "--out", tmp_path / "more")
    assert status == 0
    assert (tmp_path / "more/students/teacher-kd/seed0/model.json").exists()
    status, out, _ = soteacher(
        "teach", "--method", "standard", "--seeds", 2, *words, "--workers", 1, "--out", tmp_path / "t"
    )
    assert status == 0
    assert "standard/seed1: test accuracy" in out


@pytest.mark.usefixtures("one_core", "no_report")
def test_a_card_from_a_run_to_its_page(soteacher, tmp_path: Path, tiny_data: Path) -> None:
    words = ("--data", tiny_data, "--epochs", 1, "--set", "logging=[]", "--set", "card=null")
    assert soteacher("teach", "--model", "resnet8", "--out", tmp_path / "run", *words, "--workers", 1)[0] == 0
    words = ("card", tmp_path / "run", "--data", tiny_data, "--out", tmp_path / "card", "--device", "cpu")
    status, out, said = soteacher(*words, "--examples", 20, "--views", 3)
    assert (status, said) == (0, "")
    card = json.loads((tmp_path / "card/card.json").read_text())
    assert card["sampled"]["train"] == card["sampled"]["test"] == 20
    assert card["sampled"]["views"] == 3
    for part in (
        f"{100 * card['figures']['test']['accuracy']:.2f}\n",
        "largest slope found",
        "search for the largest slope",
        f"{card['passes']:.1f} evaluation passes over 40 images",
        "note: no true label distribution is known for tiny; give --folds",
        f"card: {tmp_path / 'card/card.json'}",
        f"page: {tmp_path / 'card/card.html'}",
    ):
        assert part in out, part
    assert "</html>" in (tmp_path / "card/card.html").read_text()
    folds = ("--folds", 2, "--fold-epochs", 1, "--fold-repeats", 2, "--fold-model", "resnet8")
    status, out, said = soteacher(*words, *folds, "--set", "card.views=2", "--set", "folds.training.batch_size=8")
    assert (status, said) == (0, "")
    assert out.count("network without fold 1, seed ") == 2
    assert "train, to out-of-fold predictions" in out
    answer = soteacher(*words, "--fold-epochs", 1)
    assert _is_refusal(answer, "--fold-model, --fold-epochs and --fold-repeats are about folds; give --folds too")
    for word, message in (("--views=1", "card.views"), ("--folds=1", "folds.folds"), ("--set=card.x=1", "key 'x'")):
        assert _is_refusal(soteacher(*words, word), message)
    assert _is_refusal(soteacher("card", tmp_path / "no", *words[2:]), "no network at")


def test_lists_name_what_there_is(soteacher) -> None:
    for words, names in {
        ("recipes", "list"): (*recipe_names(), *method_recipe_names(), *pair_names()),
        ("methods", "list"): ("soteacher", "teacher  ICLR 2024", "dkd ", "student  CVPR 2022"),
        ("data", "list"): ("cifar100", "folder", "npz"),
        ("models",): ("resnet8x4", "wrn_16_2", "timm/NAME"),
    }.items():
        status, out, said = soteacher(*words)
        assert (status, said) == (0, "")
        assert all(name in out for name in names)
        assert all(line.strip() for line in out.splitlines())
        assert soteacher(*words[:1]) == (0, out, "")  # the name alone lists as well


def test_what_is_shown_is_what_is_run(soteacher) -> None:
    assert soteacher("recipes", "show", "quickstart") == (0, recipe_text("quickstart"), "")
    shown = recipe_text("kd_standardized", "vgg13-vgg8")
    assert soteacher("recipes", "show", "kd_standardized", "--pair", "vgg13-vgg8") == (0, shown, "")
    answer = soteacher("recipes", "show", "kd", "--pair", "vgg13-vgg")
    assert _is_refusal(answer, "unknown pair 'vgg13-vgg'; did you mean vgg13-vgg8"), answer
    status, out, _ = soteacher("methods", "show", "soteacher")
    assert (status, out.startswith("# soteacher\n")) == (0, True)
    assert _is_refusal(soteacher("recipes", "show", "quick"), "unknown recipe 'quick'; did you mean quickstart?")
    assert _is_refusal(soteacher("methods", "show", "sotecher"), "unknown method 'sotecher'; did you mean soteacher")


def test_fetch_says_what_is_in_a_data_set(soteacher, tiny_data: Path, tmp_path: Path) -> None:
    assert soteacher("data", "fetch", tiny_data) == (
        0, "tiny: 40 training and 24 test images, 12 x 12 x 1, 3 classes\n", "",
    )  # fmt: skip
    assert "6000 training and 2000 test images" in soteacher("data", "fetch", "fashion_mnist_small")[1]
    np.savez(tmp_path / "bad.npz", train_images=np.zeros(3))
    assert _is_refusal(soteacher("data", "fetch", tmp_path / "bad.npz"), "it has no array train_labels")


@pytest.mark.usefixtures("one_core", "no_report")
def test_a_loss_that_is_not_finite_is_told_in_one_line(soteacher, tmp_path: Path, study) -> None:
    words = ("--set", "training.optimizer.learning_rate=1e30", "--set", "training.epochs=4", "--workers", 1)
    answer = soteacher("run", study(), "--out", tmp_path / "run", *words)
    assert _is_refusal(answer, "soteacher: teacher standard/seed0: the loss is not finite "), answer
    assert "in the term cross_entropy" in answer[2] or "in test_nll" in answer[2]


@pytest.mark.usefixtures("one_core", "no_report")
def test_a_full_disk_is_told_in_one_line(soteacher, tmp_path: Path, study, monkeypatch: pytest.MonkeyPatch) -> None:
    sync, count = os.fsync, 0

    def full(descriptor: int) -> None:
        nonlocal count
        count += 1
        if count > 3:
            raise OSError(28, "No space left on device")
        sync(descriptor)

    monkeypatch.setattr(os, "fsync", full)
    answer = soteacher("run", study(), "--out", tmp_path / "run", "--workers", 1)
    place = tmp_path / "run/teachers/standard/seed0/resume/state.safetensors"
    assert _is_refusal(answer, f"the disk is full at {place}; make room and go on with --resume"), answer
    assert not list(tmp_path.rglob("*.part"))


@pytest.mark.parametrize(
    ("error", "status", "message"),
    [
        (
            PermissionError(13, "Permission denied", "/run"),
            2,
            "soteacher: /run may not be written: Permission denied\n",
        ),
        (WorkerDiedError("a worker process was killed"), 1, "soteacher: a worker process was killed\n"),
        (
            InterruptedRunError("stopped"),
            130,
            "soteacher: stopped; the state is saved. Go on with the same command and ",
        ),
        (KeyboardInterrupt(), 130, "soteacher: stopped\n"),
    ],
)
def test_what_ends_a_run_too_early_is_told_in_one_line(
    soteacher, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException, status: int, message: str
) -> None:
    def ends(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr("soteacher.api.run", ends)
    answer = soteacher("run", "quickstart", "--out", tmp_path / "run")
    assert answer[0] == status
    assert answer[2].startswith(message)
    assert answer[2].count("\n") == 1


def test_an_error_of_ours_keeps_its_trace(soteacher, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: object, **__: object) -> None:
        raise FileNotFoundError(2, "No such file", "metrics.jsonl")

    monkeypatch.setattr("soteacher.api.run", fails)
    with pytest.raises(FileNotFoundError):
        soteacher("run", "quickstart", "--out", tmp_path / "run")


# From here on whole processes, killed for good. Two teachers and their students, long enough to be caught at work.
EPOCHS = 12


class Process:
    """A run of the command line in a process group of its own, as from a terminal."""

    def __init__(self, study: Path, run: Path, *words: object) -> None:
        self.run = run
        environment = dict(os.environ)
        environment.pop("OMP_NUM_THREADS", None)
        self.process = subprocess.Popen(
            [sys.executable, "-m", "soteacher", "run", str(study), "--out", str(run), *map(str, words)],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True, env=environment,
        )  # fmt: skip

    def wait_until(self, *, epochs: int) -> None:
        """Wait until so many epochs are finished, of all networks together."""
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            lines = sum(len(path.read_text().splitlines()) for path in self.run.rglob("metrics.jsonl"))
            if lines >= epochs:
                return
            assert self.process.poll() is None, self.process.stderr.read()
            time.sleep(0.002)
        raise AssertionError("no epoch within a minute")

    def end(self) -> Answer:
        """Wait for the end of the process and of all that it started."""
        out, said = self.process.communicate(timeout=60)
        deadline = time.monotonic() + 20
        while time.monotonic() < deadline and self._group_lives():
            time.sleep(0.02)
        assert not self._group_lives(), "somebody lives on"
        return self.process.returncode, out, said

    def _group_lives(self) -> bool:
        try:
            os.killpg(self.process.pid, 0)
        except ProcessLookupError:
            return False
        return True


@pytest.fixture
def unbroken(
    tmp_path: Path, tiny_tree: Callable[..., dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> Callable[..., tuple[Path, Path]]:
    """Run a study in this process, without a break; return its file and its folder."""

    def run(*, threads: int) -> tuple[Path, Path]:
        tree = tiny_tree(training={"epochs": EPOCHS, "batch_size": 16}, students={"kd": {"model": "resnet8"}})
        (tmp_path / "study.yaml").write_text(yaml.safe_dump(tree, sort_keys=False))
        monkeypatch.setattr(studies, "available_cores", lambda: threads)
        studies.run_study(read_study(tree), tmp_path / "whole", workers=1, device="cpu")
        return tmp_path / "study.yaml", tmp_path / "whole"

    return run


STOPPED = re.compile(r"soteacher: stopped; the state is saved. Go on with the same command and --resume: \S+/killed\n")


@pytest.mark.slow
@pytest.mark.usefixtures("no_report")
@pytest.mark.timeout(300)
def test_a_killed_run_with_workers_resumes_bit_for_bit(tmp_path: Path, unbroken, outcome_of) -> None:
    study, whole = unbroken(threads=1)
    run, words = tmp_path / "killed", ("--device", "cpu", "--workers", available_cores())  # a thread for each
    first = Process(study, run, *words)
    first.wait_until(epochs=2)
    first.process.kill()  # the workers are left alone, and leave
    assert first.end()[0] == -signal.SIGKILL
    assert len(list(run.rglob("model.json"))) < len(list(whole.rglob("model.json")))  # it came in the middle

    second = Process(study, run, *words, "--resume")
    second.wait_until(epochs=EPOCHS + 3)
    os.killpg(second.process.pid, signal.SIGINT)  # Ctrl-C reaches the whole group
    status, _, said = second.end()
    assert (status, bool(STOPPED.fullmatch(said))) == (130, True), said
    assert list(run.rglob("state.safetensors"))

    studies.run_study(read_study(study), run, resume=True, workers=1, device="cpu")
    assert outcome_of(run) == outcome_of(whole)
    assert not list(run.rglob("resume"))


@pytest.fixture
def one_core_for_all() -> Iterator[None]:
    """Let this process and those it starts use a single core: two threads on tiny tensors mostly wait."""
    if not hasattr(os, "sched_setaffinity"):
        yield
        return
    cores = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {max(cores)})
    yield
    os.sched_setaffinity(0, cores)


@pytest.mark.slow
@pytest.mark.usefixtures("no_report", "one_core_for_all")
@pytest.mark.timeout(300)
def test_a_killed_run_in_one_process_resumes_bit_for_bit(tmp_path: Path, unbroken, outcome_of) -> None:
    study, whole = unbroken(threads=available_cores())
    run, words = tmp_path / "killed", ("--device", "cpu", "--workers", 1)
    first = Process(study, run, *words)
    first.wait_until(epochs=2)
    first.process.terminate()
    status, _, said = first.end()
    assert (status, bool(STOPPED.fullmatch(said))) == (130, True), said

    second = Process(study, run, *words, "--resume")
    second.wait_until(epochs=EPOCHS + 3)
    second.process.kill()
    assert second.end()[0] == -signal.SIGKILL

    studies.run_study(read_study(study), run, resume=True, device="cpu")
    assert outcome_of(run) == outcome_of(whole)


def test_a_student_is_named_for_sftn_alone(soteacher, tmp_path: Path, tiny_data: Path) -> None:
    words = ["teach", "--model", "resnet8", "--data", tiny_data, "--method", "standard", "--student", "resnet8"]
    answer = soteacher(*words, "--out", tmp_path / "x")
    assert _is_refusal(answer, "--student names the network that sftn's branches are of, and standard has no such term")
