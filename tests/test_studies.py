import json
import os
import signal
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.stats
import torch
from torch import nn

from soteacher import studies
from soteacher.errors import InputError, InterruptedRunError
from soteacher.jobs import Job, OnEvent
from soteacher.recipes import read_study
from soteacher.report import write_report
from soteacher.studies import collect_results, pick_device, report_again, run_study, stop_requested

ROW = {
    "role", "arm", "teacher_arm", "method", "model", "data", "seed", "epochs", "accuracy_last", "accuracy_best",
    "accuracy_mean_last_10", "nll", "ece", "train_seconds", "images_per_second",
}  # fmt: skip
SUMMARY = {
    "seeds", "accuracy_mean", "accuracy_ci95", "baseline", "difference_mean", "difference_ci95", "verdict",
}  # fmt: skip


pytestmark = pytest.mark.usefixtures("one_core", "no_report")


class KilledError(BaseException):
    """Ends a run as a kill does: nothing catches it."""


def test_a_run_leaves_what_it_promises(tmp_path: Path, train, tiny_study, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(studies, "write_report", write_report)
    run = tmp_path / "run"
    results = train(tiny_study(logging=["tensorboard"]), run)
    left = {str(path.relative_to(run)) for path in run.rglob("*") if path.is_file() and "tfevents" not in path.name}
    networks = [
        "teachers/standard",
        "teachers/soteacher",
        "students/alone",
        "students/standard-kd",
        "students/soteacher-kd",
    ]
    files = ["model.safetensors", "model.json", "metrics.jsonl"]
    wanted = {f"{network}/seed0/{file}" for network in networks for file in files}
    assert left == wanted | {"config.yaml", "run.json", "results.json", "report.html"}
    assert len(list(run.rglob("*tfevents*"))) == 5
    assert json.loads((run / "results.json").read_text()) == results
    assert read_study(run / "config.yaml") == read_study(tiny_study(logging=["tensorboard"]))


def test_results_keep_the_contract(tmp_path: Path, train, tiny_study) -> None:
    results = train(tiny_study(seeds=[3, 1], name="mine"), tmp_path / "run")
    assert results["schema"] == 1
    assert results["soteacher_version"] == "0.1.0"
    assert results["recipe"] == "mine"
    assert {"python", "torch", "device", "threads", "commit"} <= results["environment"].keys()
    assert len(results["rows"]) == 10
    for row in results["rows"]:
        assert row.keys() >= ROW
        assert row["role"] in ("teacher", "student")
        assert (row["model"], row["data"], row["epochs"]) == ("tiny", "tiny", 2)
        for name in ("accuracy_last", "accuracy_best", "accuracy_mean_last_10", "ece"):
            assert 0 <= row[name] <= 1
        assert row["accuracy_best"] >= row["accuracy_mean_last_10"]
        assert row["nll"] > 0
        assert row["train_seconds"] > 0
        assert row["images_per_second"] == pytest.approx(2 * 40 / row["train_seconds"], rel=1e-6)
    arms = {(row["role"], row["arm"]): (row["teacher_arm"], row["method"]) for row in results["rows"]}
    assert arms == {
        ("teacher", "standard"): (None, "standard"), ("teacher", "soteacher"): (None, "soteacher"),
        ("student", "alone"): (None, "alone"), ("student", "standard-kd"): ("standard", "kd"),
        ("student", "soteacher-kd"): ("soteacher", "kd"),
    }  # fmt: skip
    assert {row["seed"] for row in results["rows"]} == {1, 3}
    assert all(entry.keys() >= SUMMARY for entry in results["summary"])


def test_the_summary_is_that_of_scipy(tmp_path: Path, train, tiny_study) -> None:
    results = train(tiny_study(seeds=[0, 1, 2]), tmp_path / "run")
    accuracy = {(row["arm"], row["seed"]): row["accuracy_last"] for row in results["rows"] if row["role"] == "student"}
    assert [entry["arm"] for entry in results["summary"]] == ["alone", "standard-kd", "soteacher-kd"]
    for entry in results["summary"]:
        own = np.array([accuracy[entry["arm"], seed] for seed in (0, 1, 2)])
        base = np.array([accuracy["standard-kd", seed] for seed in (0, 1, 2)])
        assert entry["accuracy_mean"] == pytest.approx(own.mean())
        wanted = scipy.stats.t.interval(0.95, 2, loc=own.mean(), scale=scipy.stats.sem(own)) if own.std() else own[:2]
        assert entry["accuracy_ci95"] == pytest.approx(list(wanted))
        if entry["arm"] == "standard-kd":
            assert entry["baseline"] is entry["difference_mean"] is entry["difference_ci95"] is entry["verdict"] is None
            continue
        assert entry["baseline"] == "standard-kd"
        difference = own - base
        assert entry["difference_mean"] == pytest.approx(difference.mean())
        interval = (difference.mean(),) * 2
        if difference.std():
            interval = scipy.stats.ttest_rel(own, base).confidence_interval(0.95)
        assert entry["difference_ci95"] == pytest.approx(list(interval))
        excludes = interval[0] > 0 or interval[1] < 0
        assert entry["verdict"] == (("better" if interval[0] > 0 else "worse") if excludes else "inconclusive")


def test_figures_in_the_row_are_those_of_the_epochs(tmp_path: Path, train, tiny_study) -> None:
    tree = tiny_study(training={"epochs": 12, "batch_size": 40}, students={})
    tree["baseline"] = None
    results = train(tree, tmp_path / "run")
    lines = (tmp_path / "run" / "teachers" / "standard" / "seed0" / "metrics.jsonl").read_text().splitlines()
    accuracies = [json.loads(line)["test_accuracy"] for line in lines]
    row = results["rows"][0]
    assert len(accuracies) == 12
    assert row["accuracy_last"] == accuracies[-1]
    assert row["accuracy_best"] == max(accuracies)
    assert row["accuracy_mean_last_10"] == pytest.approx(np.mean(accuracies[2:]))
    assert row["nll"] == pytest.approx(json.loads(lines[-1])["test_nll"], rel=1e-6)  # in another layout than at the end
    assert results["summary"] == []


def test_two_runs_are_equal_bit_for_bit(tmp_path: Path, train, tiny_study, outcome_of) -> None:
    for name in ("one", "two"):
        torch.manual_seed(len(name))  # what the process drew before is of no account
        train(tiny_study(), tmp_path / name)
    assert outcome_of(tmp_path / "one") == outcome_of(tmp_path / "two")


def test_seeds_give_other_networks_and_arms_of_a_seed_start_alike(tmp_path: Path, train, tiny_study) -> None:
    tree = tiny_study(seeds=[0, 1], training={"epochs": 1, "batch_size": 16, "optimizer": {"learning_rate": 1e-12}})
    train(tree, tmp_path / "run")
    weights = {
        (path.parts[-3], path.parts[-2]): _head(path) for path in (tmp_path / "run").glob("*/*/*/model.safetensors")
    }
    assert torch.allclose(weights["standard", "seed0"], weights["soteacher", "seed0"], atol=1e-6)
    assert torch.allclose(weights["alone", "seed0"], weights["standard-kd", "seed0"], atol=1e-6)
    assert not torch.allclose(weights["alone", "seed0"], weights["alone", "seed1"], atol=1e-3)
    assert not torch.allclose(weights["alone", "seed0"], weights["standard", "seed0"], atol=1e-3)


def _kill_at(monkeypatch: pytest.MonkeyPatch, number: int, *, before: bool) -> list[str]:
    """Let the ``number``-th file that is put into its place be the last thing that happens."""
    written: list[str] = []
    replace = Path.replace

    def counting(part: Path, target: Path) -> Path:
        if len(written) == number and before:
            raise KilledError
        written.append(f"{target.parent.name}/{target.name}")
        moved = replace(part, target)
        if len(written) == number + 1 and not before:
            raise KilledError
        return moved

    monkeypatch.setattr(Path, "replace", counting)
    return written


def test_a_run_killed_around_any_write_resumes_bit_for_bit(
    tmp_path: Path, train, tiny_study, outcome_of, monkeypatch: pytest.MonkeyPatch
) -> None:
    tree = tiny_study(students={"kd": {"model": "tiny"}})
    del tree["teachers"]["standard"]
    tree["baseline"] = None
    with monkeypatch.context() as patch:
        written = _kill_at(patch, -1, before=False)
        train(tree, tmp_path / "whole")
    wanted = outcome_of(tmp_path / "whole")
    kinds = [name.split("/")[1] for name in written]
    network = ["metrics.jsonl", "state.safetensors"] * 2 + ["model.safetensors", "model.json"]
    assert kinds == ["config.yaml", "run.json", *network, *network, "results.json"]
    for number in range(len(written)):
        for before in (True, False):
            run = tmp_path / f"killed-{number}-{before}"
            with monkeypatch.context() as patch:
                _kill_at(patch, number, before=before)
                with pytest.raises(KilledError):
                    train(tree, run)
            train(tree, run, resume=run.exists())
            assert outcome_of(run) == wanted, (written[number], before)
            assert not list(run.rglob("resume")), (written[number], before)


def test_a_run_killed_and_killed_again_resumes_bit_for_bit(
    tmp_path: Path, train, tiny_study, outcome_of, monkeypatch: pytest.MonkeyPatch
) -> None:
    tree = tiny_study()
    train(tree, tmp_path / "whole")
    run, kills = tmp_path / "killed", 0
    while True:
        with monkeypatch.context() as patch:
            _kill_at(patch, 5, before=bool(kills % 2))
            try:
                train(tree, run, resume=run.exists())
                break
            except KilledError:
                kills += 1
    assert kills > 3
    assert outcome_of(run) == outcome_of(tmp_path / "whole")


def _after_steps(steps: int, number: signal.Signals) -> OnEvent:
    """Send this process a signal after so many steps."""
    left = steps

    def take(_: Job, event: dict[str, Any]) -> None:
        nonlocal left
        if event["event"] == "step":
            left -= 1
            if left == 0:
                os.kill(os.getpid(), number)

    return take


def _interrupt(*_: object) -> None:
    os.kill(os.getpid(), signal.SIGINT)


@pytest.mark.parametrize("stops", [(2,), (1, 1, 1, 1), (7, 4)])
def test_a_run_stopped_by_a_signal_resumes_bit_for_bit(
    tmp_path: Path, train, tiny_study, outcome_of, monkeypatch: pytest.MonkeyPatch, stops: tuple[int, ...]
) -> None:
    monkeypatch.setattr("soteacher.train.loop.CHECK_EVERY", 1)
    tree = tiny_study()
    train(tree, tmp_path / "whole")
    run = tmp_path / "stopped"
    for number, steps in enumerate(stops):
        stop = _after_steps(steps, signal.SIGTERM if number % 2 else signal.SIGINT)
        with pytest.raises(InterruptedRunError):
            train(tree, run, resume=number > 0, on_event=stop)
    assert not (run / "results.json").exists()
    train(tree, run, resume=True)
    assert outcome_of(run) == outcome_of(tmp_path / "whole")


def test_a_stop_in_the_first_epoch_leaves_no_line(
    tmp_path: Path, train, tiny_study, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("soteacher.train.loop.CHECK_EVERY", 1)
    with pytest.raises(InterruptedRunError):
        train(tiny_study(), tmp_path / "run", on_event=_interrupt)
    assert not list((tmp_path / "run").rglob("metrics.jsonl"))


def test_signals_are_as_they_were_after_a_run(tmp_path: Path, train, tiny_study) -> None:
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    train(
        tiny_study(teachers={}, students={"alone": {"model": "tiny", "method": "alone"}}, baseline=None), tmp_path / "r"
    )
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before


def test_a_second_signal_ends_the_process_at_once() -> None:
    with stop_requested() as asked:
        assert not asked()
        os.kill(os.getpid(), signal.SIGINT)
        assert asked()
        assert signal.getsignal(signal.SIGINT) == signal.SIG_DFL
    assert signal.getsignal(signal.SIGINT) != signal.SIG_DFL


def test_a_thread_other_than_the_main_one_cannot_be_asked() -> None:
    answers: list[bool] = []

    def inside() -> None:
        with stop_requested() as asked:
            answers.append(asked())

    thread = threading.Thread(target=inside)
    thread.start()
    thread.join()
    assert answers == [False]


def test_finished_networks_are_not_trained_again(tmp_path: Path, train, tiny_study, outcome_of) -> None:
    train(tiny_study(), tmp_path / "run")
    times = {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("model.safetensors")}
    before, events = outcome_of(tmp_path / "run"), []
    train(tiny_study(), tmp_path / "run", resume=True, on_event=lambda *event: events.append(event))
    assert events == []
    assert {path: path.stat().st_mtime_ns for path in times} == times
    assert outcome_of(tmp_path / "run") == before


def test_a_grown_study_trains_only_what_is_new(tmp_path: Path, train, tiny_study, outcome_of) -> None:
    grown = tiny_study(seeds=[0, 1])
    grown["students"]["hot"] = {"model": "tiny", "terms": {"kd": {"temperature": 8}}, "teachers": ["soteacher"]}
    grown["teachers"]["early"] = {"from": "standard", "after": 2}
    train(tiny_study(), tmp_path / "run")
    trained: set[str] = set()
    train(grown, tmp_path / "run", resume=True, on_event=lambda job, _: trained.add(job.name))
    old = {"standard", "soteacher", "alone", "standard-kd", "soteacher-kd"}
    assert not {name for name in trained if name.split()[1] in {f"{arm}/seed0" for arm in old}}
    assert {"teacher early/seed0", "student soteacher-hot/seed0", "teacher standard/seed1"} <= trained
    train(grown, tmp_path / "at once")
    assert outcome_of(tmp_path / "run") == outcome_of(tmp_path / "at once")


def test_changed_settings_are_refused_and_the_key_is_named(tmp_path: Path, train, tiny_study) -> None:
    train(tiny_study(), tmp_path / "run")
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*")}
    changed = tiny_study()
    changed["students"]["kd"]["terms"] = {"kd": {"temperature": 2}}
    with pytest.raises(InputError, match=r"students.kd.terms.kd.temperature: nothing in the folder, 2 now"):
        train(changed, tmp_path / "run", resume=True)
    with pytest.raises(InputError, match="holds this run already; go on with --resume"):
        train(tiny_study(), tmp_path / "run")
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*")} == before


def test_changed_data_are_refused(tmp_path: Path, train, tiny_study, tiny_arrays) -> None:
    data = tmp_path / "data.npz"
    np.savez(data, **tiny_arrays)
    tree = tiny_study(data={"source": "npz", "path": str(data)})
    train(tree, tmp_path / "run")
    np.savez(data, **tiny_arrays | {"train_labels": tiny_arrays["train_labels"][::-1]})
    with pytest.raises(InputError, match="was started on other data: its checksum was"):
        train(tree, tmp_path / "run", resume=True)


def test_a_state_of_other_settings_is_refused(
    tmp_path: Path, train, tiny_study, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("soteacher.train.loop.CHECK_EVERY", 1)
    with pytest.raises(InterruptedRunError):
        train(tiny_study(), tmp_path / "run", on_event=_interrupt)
    changed = tiny_study(training={"epochs": 3, "batch_size": 16})
    text = (tmp_path / "run" / "config.yaml").read_text().replace("epochs: 2", "epochs: 3")
    (tmp_path / "run" / "config.yaml").write_text(text)  # by hand, past the check of the folder
    with pytest.raises(InputError, match=r"teacher standard/seed0: .*belongs to a training with other settings"):
        train(changed, tmp_path / "run", resume=True)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"data": {"source": "npz", "path": "nowhere.npz"}}, "npz file nowhere.npz does not exist"),
        ({"teachers": {"standard": {"model": "resnet9999"}}, "baseline": None}, "resnet9999"),
        (
            {"teachers": {"standard": {"model": "wrm_16_2"}}, "baseline": None},
            "unknown network 'wrm_16_2'; did you mean",
        ),
        ({"teachers": {"old": {"file": "nowhere"}}, "baseline": None}, "no network at nowhere: wanted a run folder"),
    ],
)
def test_what_cannot_work_is_refused_before_anything_is_written(
    tmp_path: Path, tiny_tree, change: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError) as caught:
        run_study(read_study(tiny_tree(**change)), tmp_path / "run")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("network", "message"),
    [
        (lambda *_: nn.Flatten(), "gives 144 logits for 3 classes"),
        (lambda *_: nn.Conv2d(1, 3, 3), "wanted logits [B, K] from Conv2d, got [2, 3, 10, 10]"),
        (
            lambda *_: nn.Linear(5, 3),
            "own cannot take images of shape [1, 12, 12]: mat1 ",
        ),
    ],
)
def test_a_network_that_does_not_fit_is_refused_before_anything_is_written(
    tmp_path: Path, tiny_tree, network: Any, message: str
) -> None:
    tree = tiny_tree(teachers={"own": {"model": "own"}}, students={}, baseline=None)
    with pytest.raises(InputError) as caught:
        run_study(read_study(tree), tmp_path / "run", factories={"own": network})
    assert message in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_a_loss_that_is_not_finite_names_the_network(tmp_path: Path, train, tiny_study) -> None:
    tree = tiny_study(training={"epochs": 4, "batch_size": 16, "optimizer": {"learning_rate": 1e30}})
    with pytest.raises(InputError) as caught:
        train(tree, tmp_path / "run")
    message = str(caught.value)
    assert message.startswith("teacher standard/seed0: the loss is not finite ")
    assert "learning rate" in message
    assert "\n" not in message


def test_a_full_disk_leaves_no_half_file_and_the_run_goes_on(
    tmp_path: Path, train, tiny_study, outcome_of, monkeypatch: pytest.MonkeyPatch
) -> None:
    train(tiny_study(), tmp_path / "whole")
    run, sync, count = tmp_path / "full", os.fsync, 0

    def full(descriptor: int) -> None:
        nonlocal count
        count += 1
        if count > 9:
            raise OSError(28, "No space left on device")
        sync(descriptor)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="No space left") as caught:
            train(tiny_study(), run)
    assert str(run) in str(caught.value.filename)
    assert not list(run.rglob("*.part"))
    train(tiny_study(), run, resume=True)
    assert outcome_of(run) == outcome_of(tmp_path / "whole")


def test_a_full_disk_at_the_start_leaves_nothing(
    tmp_path: Path, train, tiny_study, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        train(tiny_study(), tmp_path / "run")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("workers", "message"), [(0, "workers must be at least 1, got 0"), (2, "workers must be 1 or")]
)
def test_workers_that_cannot_be_are_refused(tmp_path: Path, train, tiny_study, workers: int, message: str) -> None:
    with pytest.raises(InputError, match=message):
        train(tiny_study(), tmp_path / "run", workers=workers)
    assert list(tmp_path.iterdir()) == []


def test_a_resumed_run_keeps_its_threads(tmp_path: Path, train, tiny_study, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    count = torch.get_num_threads()
    monkeypatch.setattr(studies, "available_cores", lambda: 3)
    train(tiny_study(), tmp_path / "run", on_event=lambda *_: seen.append(torch.get_num_threads()))
    monkeypatch.setattr(studies, "available_cores", lambda: 1)
    results = train(
        tiny_study(seeds=[0, 1]), tmp_path / "run", resume=True,
        on_event=lambda *_: seen.append(torch.get_num_threads()),
    )  # fmt: skip
    assert set(seen) == {3}
    assert results["environment"]["threads"] == 3
    assert torch.get_num_threads() == count


def test_pick_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert pick_device("auto") == pick_device("cpu") == "cpu"
    with pytest.raises(InputError, match="device cuda was asked for, and PyTorch finds no CUDA device here"):
        pick_device("cuda")
    with pytest.raises(InputError, match="unknown device 'tpu'; known: auto, cpu, cuda"):
        pick_device("tpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert pick_device("auto") == pick_device("cuda") == "cuda"
    assert pick_device("cpu") == "cpu"


def test_report_again_takes_what_is_finished(
    tmp_path: Path, train, tiny_study, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(studies, "write_report", write_report)

    def stop(job: Job, event: dict[str, Any]) -> None:
        if event["event"] == "finished" and job.role == "student":
            raise KilledError

    with pytest.raises(KilledError):
        train(tiny_study(), tmp_path / "run", on_event=stop)
    assert not (tmp_path / "run" / "results.json").exists()
    results = report_again(tmp_path / "run")
    assert [row["arm"] for row in results["rows"]] == ["standard", "soteacher", "alone"]
    assert (tmp_path / "run" / "report.html").exists()
    config = read_study(tiny_study())
    assert (
        collect_results(config, tmp_path / "run", json.loads((tmp_path / "run/run.json").read_text()))["rows"]
        == results["rows"]
    )


def test_report_again_refuses_a_folder_without_a_run(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="holds no run"):
        report_again(tmp_path)
    assert list(tmp_path.iterdir()) == []


def _head(path: Path) -> torch.Tensor:
    from safetensors.torch import load_file

    return load_file(path)["head.weight"]


def test_names_are_checked_before_the_data_is_read(tmp_path: Path, tiny_tree, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(studies, "load_data", lambda *_, **__: pytest.fail("the data was read first"))
    tree = tiny_tree()
    tree["students"]["kd"]["model"] = "resnet9"
    with pytest.raises(InputError, match="depth must be"):
        run_study(read_study(tree), tmp_path / "run")
    with pytest.raises(InputError, match="needs its package"):
        run_study(read_study(tiny_tree(logging=["wandb"])), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_last_batch_of_one_that_cannot_be_trained_on_is_refused(tmp_path: Path, tiny_study) -> None:
    class OnePixel(nn.Module):
        def __init__(self, num_classes: int, in_channels: int) -> None:
            super().__init__()
            self.layers = nn.Sequential(
                nn.AdaptiveAvgPool2d(1), nn.BatchNorm2d(in_channels), nn.Flatten(), nn.Linear(in_channels, num_classes)
            )

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return self.layers(images)

    config = read_study(tiny_study(training={"epochs": 1, "batch_size": 13}))
    with pytest.raises(InputError, match="40 examples in batches of 13 leave one: choose another batch_size"):
        run_study(config, tmp_path / "run", factories={"tiny": OnePixel})
    assert not (tmp_path / "run").exists()


def test_a_state_that_was_not_kept_is_refused_and_the_run_stays_as_it_is(tmp_path: Path, train, tiny_study) -> None:
    run, tree = tmp_path / "run", tiny_study()
    train(tree, run)
    before = (run / "config.yaml").read_text()
    tree["teachers"]["early"] = {"from": "standard", "after": 1}
    with pytest.raises(InputError, match=r"teacher early/seed0: the weights of .* after 1 epochs were not kept"):
        train(tree, run, resume=True)
    assert (run / "config.yaml").read_text() == before
    train(tiny_study(), run, resume=True)


def test_what_changes_no_number_may_change(tmp_path: Path, train, tiny_study) -> None:
    run = tmp_path / "run"
    train(tiny_study(), run)
    weights = {path: path.read_bytes() for path in run.rglob("*.safetensors")}
    again = train(tiny_study(baseline="alone", description="new", logging=["tensorboard"]), run, resume=True)
    assert {path: path.read_bytes() for path in run.rglob("*.safetensors")} == weights
    assert {entry["arm"]: entry["baseline"] for entry in again["summary"]}["standard-kd"] == "alone"


def test_other_networks_of_ones_own_are_refused(tmp_path: Path, train, tiny_study, tiny_network) -> None:
    run = tmp_path / "run"
    train(tiny_study(), run)

    class Wider(tiny_network):
        def __init__(self, num_classes: int, in_channels: int) -> None:
            super().__init__(num_classes, in_channels)
            self.more = nn.Linear(2, 2)

    with pytest.raises(InputError, match="other networks of your own"):
        run_study(read_study(tiny_study()), run, factories={"tiny": Wider}, resume=True)


def test_the_environment_is_that_of_the_training(
    tmp_path: Path, train, tiny_study, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    first = train(tiny_study(), run)["environment"]
    monkeypatch.setattr(studies, "environment", lambda device, threads: {"device": device, "threads": threads})
    assert report_again(run)["environment"] == first
    facts = json.loads((run / "teachers/standard/seed0/model.json").read_text())
    assert facts["environment"].keys() == first.keys()


def test_a_run_that_has_not_started_has_no_report(tmp_path: Path, tiny_study, train) -> None:
    run = tmp_path / "run"
    train(tiny_study(), run)
    (run / "run.json").unlink()
    with pytest.raises(InputError, match="has not started"):
        report_again(run)


def test_images_that_are_left_out_are_named(tmp_path: Path, tiny_study, tiny_network) -> None:
    from PIL import Image

    for split in ("train", "test"):
        for label in ("a", "b"):
            (tmp_path / "photos" / split / label).mkdir(parents=True)
            for number in range(4):
                Image.new("RGB", (12, 12), (40 * number, 10 * number, 90 - number)).save(
                    tmp_path / "photos" / split / label / f"{number}.png"
                )
    broken = tmp_path / "photos/train/a/broken.png"
    broken.write_bytes(b"no image")
    data = {"source": "folder", "path": str(tmp_path / "photos"), "image_size": 12, "skip_unreadable": True}
    config = read_study(tiny_study(data=data | {"augment": {"crop_padding": 0}}))
    results = run_study(config, tmp_path / "run", factories={"tiny": tiny_network})
    assert [Path(path).name for path in results["skipped_images"]] == [broken.name]


def test_a_given_teacher_is_one_network_for_all_seeds(tmp_path: Path, train, tiny_study) -> None:
    train(tiny_study(), tmp_path / "first")
    tree = tiny_study(seeds=[4, 5], baseline=None)
    tree["teachers"] = {"given": {"file": str(tmp_path / "first/teachers/standard/seed0")}}
    tree["students"] = {"kd": {"model": "tiny"}}
    results = train(tree, tmp_path / "run")
    assert [(row["role"], row["seed"]) for row in results["rows"]] == [("teacher", 0), ("student", 4), ("student", 5)]
    assert results["summary"][0]["seeds"] == [4, 5]
