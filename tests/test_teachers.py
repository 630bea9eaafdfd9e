"""Ways to a teacher that are more than a loss: held-out images, averages, starts, assistants and routes."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.optimize
import torch
from safetensors.torch import load_file
from torch.nn import functional as F

import soteacher
from soteacher.assembly import assemble
from soteacher.data import held_out_rows, load_data
from soteacher.errors import InputError, InterruptedRunError
from soteacher.files import read_json
from soteacher.jobs import (
    Job,
    Study,
    evaluation_batches,
    jobs_of,
    load_finished,
    new_classifier,
    rows_of,
    start_of,
    teacher_of,
)
from soteacher.models.weights import weights_checksum
from soteacher.networks import train_network
from soteacher.recipes import read_study
from soteacher.studies import run_study
from soteacher.train.evaluate import evaluate, predict

pytestmark = pytest.mark.usefixtures("one_core", "no_report")

TRAINING = {"epochs": 4, "batch_size": 16}


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def weights(run: Path, arm: str, file: str = "model", role: str = "teachers") -> dict[str, torch.Tensor]:
    return load_file(run / role / arm / "seed0" / f"{file}.safetensors")


def equal(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def facts(run: Path, arm: str) -> dict[str, Any]:
    return read_json(run / "teachers" / arm / "seed0" / "model.json")


def study_of(tree: dict[str, Any], run: Path, factories: Any = None) -> Study:
    config = read_study(tree)
    return Study(config, run, load_data(config.data, None), "cpu", factories or {})


@pytest.fixture
def teachers(tiny_study) -> Any:
    """Make a study of teachers alone, each a tiny network."""

    def make(**arms: dict[str, Any]) -> dict[str, Any]:
        tree = tiny_study(training=TRAINING, baseline=None, students={})
        tree["teachers"] = {
            name: arm if {"from", "file"} & arm.keys() else {"model": "tiny", **arm} for name, arm in arms.items()
        }
        return tree

    return make


def test_held_out_rows_keep_the_classes_shares_and_leave_one_of_each_to_train_on() -> None:
    labels = torch.tensor([0] * 40 + [1] * 20 + [2] * 1)
    kept, out = held_out_rows(labels, 0.25, seed=3)
    assert sorted([*kept.tolist(), *out.tolist()]) == list(range(61))
    assert torch.bincount(labels[out], minlength=3).tolist() == [10, 5, 0]
    assert kept.tolist() == sorted(kept.tolist())
    again, other = held_out_rows(labels, 0.25, seed=3), held_out_rows(labels, 0.25, seed=4)
    assert torch.equal(again[1], out)
    assert not torch.equal(other[1], out)


def test_nothing_to_hold_out_is_one_line() -> None:
    with pytest.raises(InputError, match=r"held_out is 0.1, and no class has enough of the 4 examples"):
        held_out_rows(torch.tensor([0, 0, 1, 1]), 0.1, seed=0)


def test_a_network_never_sees_what_it_holds_out_and_is_judged_by_it(tmp_path: Path, train, teachers) -> None:
    held = {"training": {"held_out": 0.25}}
    run = tmp_path / "run"
    train(teachers(plain=held, other={"method": "soteacher", **held}), run)
    tree = teachers(plain=held, other={"method": "soteacher", **held})
    study = study_of(tree, run)
    kept, out = rows_of(study, Job("teacher", "plain", 0))
    assert out is not None
    assert (len(kept), len(out)) == (30, 10)  # of 14, 13 and 13 examples 4, 3 and 3
    assert torch.equal(rows_of(study, Job("teacher", "other", 0))[1], out)  # the same for all networks of a seed
    line = lines(run / "teachers/plain/seed0")[-1]
    assert {"held_out_accuracy", "held_out_nll", "held_out_brier", "held_out_ece"} <= line.keys()


def test_held_out_figures_are_those_of_the_network(tmp_path: Path, train, teachers, tiny_network) -> None:
    run = tmp_path / "run"
    tree = teachers(plain={"training": {"held_out": 0.25}})
    train(tree, run)
    study = study_of(tree, run, {"tiny": tiny_network})
    out = rows_of(study, Job("teacher", "plain", 0))[1]
    assert out is not None
    classifier = load_finished(study, Job("teacher", "plain", 0))[0]
    held_out = study.data.train.subset(out)
    logits, labels = predict(classifier, evaluation_batches(held_out, "cpu"))
    line, wanted = lines(run / "teachers/plain/seed0")[-1], evaluate(classifier, evaluation_batches(held_out, "cpu"))
    one_hot = F.one_hot(labels, 3)
    assert line["held_out_accuracy"] == wanted.accuracy
    assert line["held_out_nll"] == pytest.approx(wanted.nll, rel=1e-6)  # in training its channels lie last
    assert line["held_out_ece"] == pytest.approx(wanted.ece, rel=1e-6)
    brier = (logits.softmax(1) - one_hot).square().sum(1).mean().item()
    assert line["held_out_brier"] == pytest.approx(brier, rel=1e-5)


def test_stopping_early_leaves_the_schedule_as_it_is(tmp_path: Path, train, teachers) -> None:
    run = tmp_path / "run"
    tree = teachers(
        whole={"training": {"save_every": 1}},
        early={"training": {"stop_after": 0.5}},
        saved={"from": "whole", "after": 2},
    )
    train(tree, run)
    assert equal(weights(run, "early"), weights(run, "whole", "epochs/after-2"))
    assert equal(weights(run, "early"), weights(run, "saved"))
    assert facts(run, "early")["row"]["epochs"] == 2
    assert [line["learning_rate"] for line in lines(run / "teachers/early/seed0")] == [
        line["learning_rate"] for line in lines(run / "teachers/whole/seed0")
    ][:2]


@pytest.mark.parametrize("criterion", ["nll", "accuracy", "brier", "ece"])
def test_the_best_epoch_is_kept_or_becomes_a_teacher_of_its_own(
    tmp_path: Path, train, teachers, criterion: str
) -> None:
    run = tmp_path / "run"
    held = {"held_out": 0.25, "optimizer": {"learning_rate": 0.5}, "epochs": 5}
    tree = teachers(
        whole={"training": held | {"save_every": 1}},
        keeping={"training": held | {"keep_best": criterion}},
        saved={"from": "whole", "best": criterion},
    )
    train(tree, run)
    values = [line[f"held_out_{criterion}"] for line in lines(run / "teachers/whole/seed0")]
    best = (values.index(max(values)) if criterion == "accuracy" else values.index(min(values))) + 1
    wanted = weights(run, "whole", f"epochs/after-{best}" if best < 5 else "model")
    assert equal(weights(run, "keeping"), wanted)
    assert equal(weights(run, "saved"), wanted)
    assert facts(run, "keeping")["kept_epochs"] == best
    assert facts(run, "saved")["row"]["epochs"] == best


def test_weights_are_averaged_over_the_last_epochs(tmp_path: Path, train, teachers) -> None:
    run = tmp_path / "run"
    average = {"averaging": {"name": "swa", "start": 2}}
    train(teachers(plain={"training": {"save_every": 1}}, swa={"training": average}), run)
    states = [weights(run, "plain", "epochs/after-2"), weights(run, "plain", "epochs/after-3"), weights(run, "plain")]
    averaged = weights(run, "swa")
    for name in ("convolution.weight", "norm.weight", "norm.bias", "head.weight", "head.bias"):
        torch.testing.assert_close(averaged[name], torch.stack([state[name] for state in states]).mean(0))
    assert not torch.equal(averaged["norm.running_mean"], states[-1]["norm.running_mean"])
    assert facts(run, "swa")["averaging"] == "swa"


def test_statistics_of_batch_norm_are_those_of_the_averaged_weights(
    tmp_path: Path, train, teachers, tiny_network
) -> None:
    run = tmp_path / "run"
    tree = teachers(swa={"training": {"averaging": {"name": "swa", "start": 2}, "batch_size": 40}})
    tree["data"]["augment"] = {"crop_padding": 0, "horizontal_flip": False}
    train(tree, run)
    study = study_of(tree, run, {"tiny": tiny_network})
    classifier = load_finished(study, Job("teacher", "swa", 0))[0]
    images = (study.data.train.images.float() / 255 - classifier.mean) / classifier.std
    maps = classifier.network.convolution(images)
    torch.testing.assert_close(classifier.network.norm.running_mean, maps.mean((0, 2, 3)), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(classifier.network.norm.running_var, maps.var((0, 2, 3)), rtol=1e-4, atol=1e-5)


def test_one_temperature_is_fitted_and_becomes_part_of_the_network(
    tmp_path: Path, train, teachers, tiny_network
) -> None:
    run = tmp_path / "run"
    held = {"held_out": 0.25}
    tree = teachers(plain={"training": held}, calibrated={"training": held | {"calibrate": True}})
    train(tree, run)
    study = study_of(tree, run, {"tiny": tiny_network})
    out = rows_of(study, Job("teacher", "plain", 0))[1]
    assert out is not None
    plain = load_finished(study, Job("teacher", "plain", 0))[0]
    logits, labels = predict(plain, evaluation_batches(study.data.train.subset(out), "cpu"))
    best = scipy.optimize.minimize_scalar(
        lambda log_t: F.cross_entropy(logits.double() / torch.tensor(log_t).exp(), labels).item(),
        bounds=(-4, 4), method="bounded", options={"xatol": 1e-9},
    )  # fmt: skip
    temperature = facts(run, "calibrated")["temperature"]
    assert temperature == pytest.approx(float(torch.tensor(best.x).exp()), rel=1e-3)
    for name in ("head.weight", "head.bias"):
        torch.testing.assert_close(weights(run, "calibrated")[name], weights(run, "plain")[name] / temperature)
    assert facts(run, "calibrated")["row"]["accuracy_last"] == facts(run, "plain")["row"]["accuracy_last"]


def test_a_saved_epoch_of_a_calibrated_teacher_is_as_it_was_trained(tmp_path: Path, train, teachers) -> None:
    run = tmp_path / "run"
    held = {"held_out": 0.25, "calibrate": True}
    train(teachers(calibrated={"training": held}, last={"from": "calibrated", "after": 4}), run)
    temperature = facts(run, "calibrated")["temperature"]
    torch.testing.assert_close(
        weights(run, "last")["head.weight"] / temperature, weights(run, "calibrated")["head.weight"]
    )


def test_fine_tuning_goes_on_from_the_finished_network(tmp_path: Path, train, teachers) -> None:
    run = tmp_path / "run"
    slow = {"epochs": 1, "optimizer": {"learning_rate": 1e-12, "weight_decay": 0}}
    tree = teachers(tuned={"start": "first", "training": slow}, first={})
    train(tree, run)
    first, tuned = weights(run, "first"), weights(run, "tuned")
    for name in ("convolution.weight", "head.weight", "head.bias"):
        torch.testing.assert_close(tuned[name], first[name], rtol=0, atol=1e-7)
    config = read_study(tree)
    assert start_of(config, Job("teacher", "tuned", 0)) == Job("teacher", "first", 0)
    assert list(jobs_of(config)) == [Job("teacher", "first", 0), Job("teacher", "tuned", 0)]


def test_mcmi_surveys_what_the_trained_network_says_before_its_first_step(
    tmp_path: Path, train, teachers, tiny_network
) -> None:
    run = tmp_path / "run"
    train(teachers(first={}), run)
    tree = teachers(first={}, tuned={"start": "first", "method": "mcmi_frozen", "training": {"epochs": 1}})
    study = study_of(tree, run, {"tiny": tiny_network})
    with pytest.raises(InterruptedRunError):
        train_network(study, Job("teacher", "tuned", 0), on_event=lambda *_: None, should_stop=lambda: True)
    state = load_file(run / "teachers/tuned/seed0/resume/state.safetensors")
    first = load_finished(study, Job("teacher", "first", 0))[0]
    logits, labels = predict(first, evaluation_batches(study.data.train, "cpu"))
    wanted = torch.stack([logits.softmax(1)[labels == label].mean(0) for label in range(3)])
    torch.testing.assert_close(state["objective.class_information_frozen.centroids"], wanted)


def test_an_assistant_learns_from_the_teacher_and_teaches_the_student(tmp_path: Path, train, tiny_study) -> None:
    tree = tiny_study(baseline=None, students={"kd": {"model": "tiny", "teachers": ["assistant"]}})
    tree["teachers"] = {
        "assistant": {"model": "tiny", "method": "assistant", "teacher": "big"},
        "big": {"model": "tiny"},
        "second": {"model": "tiny", "method": "dkd", "teacher": "assistant"},
    }
    results = train(tree, tmp_path / "run")
    rows = {(row["role"], row["arm"]): row for row in results["rows"]}
    assert rows["teacher", "assistant"]["teacher_arm"] == "big"
    assert rows["teacher", "second"]["teacher_arm"] == "assistant"
    assert rows["student", "assistant-kd"]["teacher_arm"] == "assistant"
    config = read_study(tree)
    assert teacher_of(config, Job("teacher", "second", 0)) == Job("teacher", "assistant", 0)
    assert [job.arm for job in jobs_of(config)] == ["big", "assistant", "second", "assistant-kd"]


def test_a_student_follows_the_route_of_its_teacher(tmp_path: Path, train, tiny_study) -> None:
    tree = tiny_study(training=TRAINING, baseline=None)
    tree["teachers"] = {"standard": {"model": "tiny"}}
    tree["students"] = {
        "route": {"model": "tiny", "training": {"route": [0.5]}},
        "early": {"model": "tiny", "teachers": ["half"], "training": {"stop_after": 2}},
        "kd": {"model": "tiny", "teachers": ["standard"]},
    }
    tree["students"]["route"]["teachers"] = ["standard"]
    tree["teachers"]["half"] = {"from": "standard", "after": 0.5}
    run = tmp_path / "run"
    train(tree, run)
    # In the first half of its run the anchor teaches; so it is, until then, the student of the early-stopped teacher.
    route, early = (lines(run / "students" / arm / "seed0") for arm in ("standard-route", "half-early"))
    assert [line["losses"] for line in route[:2]] == [line["losses"] for line in early]
    assert route[2]["losses"] != lines(run / "students/standard-kd/seed0")[2]["losses"]
    assert (run / "teachers/standard/seed0/epochs/after-2.safetensors").exists()


def test_a_route_through_weights_that_were_not_kept_is_refused_before_anything_is_trained(
    tmp_path: Path, train, tiny_study
) -> None:
    tree = tiny_study(training=TRAINING, baseline=None, students={})
    tree["teachers"] = {"standard": {"model": "tiny"}}
    train(tree, tmp_path / "run")
    tree["students"] = {"route": {"model": "tiny", "training": {"route": [0.25, 0.5]}}}
    with pytest.raises(InputError, match=r"standard-route/seed0: the weights of teacher standard/seed0 after 1 epochs"):
        train(tree, tmp_path / "run", resume=True)


LOOK = {"examples": 12, "views": 2, "gradient_examples": 4, "slope_examples": 2, "slope_steps": 1}


def test_a_study_makes_a_card_and_its_page_for_each_teacher_of_the_images_that_it_was_trained_on(
    tmp_path: Path, train, teachers, tiny_network
) -> None:
    run = tmp_path / "run"
    tree = teachers(plain={"training": {"held_out": 0.25}}, early={"from": "plain", "after": 2}) | {"card": LOOK}
    train(tree, run)
    for arm in ("plain", "early"):
        folder = run / "teachers" / arm / "seed0"
        card = read_json(folder / "card.json")
        assert card["data"]["train_examples"] == 30  # without the held-out ones
        network = soteacher.load(folder, model=tiny_network).network
        assert card["network"]["checksum"] == weights_checksum(network)
        assert "<svg" in (folder / "card.html").read_text()
    cards = [read_json(run / f"teachers/{arm}/seed0/card.json")["figures"] for arm in ("plain", "early")]
    assert cards[0]["test"]["nll"] != cards[1]["test"]["nll"]
    assert cards[0]["test"]["accuracy"] <= 1


def test_cards_compare_with_predictions_of_networks_that_have_not_seen_the_images(
    tmp_path: Path, train, teachers
) -> None:
    run, told = tmp_path / "run", list[str]()
    folds = {"model": "tiny", "folds": 2, "epochs": 1, "repeats": 1}
    tree = teachers(plain={}) | {"card": LOOK, "folds": folds}
    train(tree, run, on_event=lambda job, event: told.append(job.name) if event["event"] == "finished" else None)
    assert told == ["teacher without_fold_1/seed0", "teacher without_fold_2/seed0", "teacher plain/seed0"]
    distance = read_json(run / "teachers/plain/seed0/card.json")["figures"]["distance"]
    assert distance["train_out_of_fold"]["mse"] > 0
    assert "test" not in distance


def test_folds_that_leave_a_class_out_stop_a_study_before_its_first_network(
    tmp_path: Path, train, teachers, tiny_arrays
) -> None:
    path = tmp_path / "rare.npz"
    arrays = dict(tiny_arrays)
    arrays["train_labels"] = np.where(np.arange(40) == 0, 2, np.arange(40) % 2)  # one example of class 2
    np.savez(path, **arrays)
    tree = teachers(plain={}) | {"card": LOOK, "folds": {"model": "tiny", "folds": 4}}
    tree["data"] = {"source": "npz", "path": str(path)}
    with pytest.raises(InputError, match=r"leaves the class '2' out of its networks' training"):
        train(tree, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_finished_teacher_gets_its_card_when_the_study_comes_to_ask_for_one(tmp_path: Path, train, teachers) -> None:
    run = tmp_path / "run"
    train(teachers(plain={}), run)
    assert not (run / "teachers/plain/seed0/card.json").exists()
    folds = {"model": "tiny", "folds": 2, "epochs": 1, "repeats": 1}
    train(teachers(plain={}) | {"card": LOOK, "folds": folds}, run, resume=True)
    assert (run / "teachers/plain/seed0/card.html").exists()
    assert read_json(run / "teachers/plain/seed0/card.json")["figures"]["distance"]["train_out_of_fold"]["mse"] > 0


def test_data_without_the_needed_distribution_are_refused_before_anything_is_trained(
    tmp_path: Path, train, teachers
) -> None:
    tree = teachers(plain={}) | {"card": {"require_distribution": ["test"]}}
    with pytest.raises(InputError, match=r"distribution of the test images, and tiny comes without one"):
        train(tree, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_folds_without_cards_are_refused(teachers) -> None:
    with pytest.raises(InputError, match=r"folds are for the teachers' cards, and card is null; leave one out"):
        read_study(teachers(plain={}) | {"folds": {"model": "tiny"}})


def test_a_fold_that_cannot_be_trained_is_found_before_anything_is(tmp_path: Path, train, teachers) -> None:
    tree = teachers(plain={}) | {"card": LOOK, "folds": {"model": "vgg8", "folds": 2, "training": {"batch_size": 19}}}
    with pytest.raises(InputError, match=r"batch of one example"):
        train(tree, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_the_finished_teacher_teaches_last_also_in_a_run_that_is_stopped_early(
    tmp_path: Path, train, tiny_study
) -> None:
    tree = tiny_study(training=TRAINING, baseline=None)
    tree["teachers"] = {"standard": {"model": "tiny"}, "half": {"from": "standard", "after": 0.5}}
    tree["students"] = {
        "route": {"model": "tiny", "teachers": ["standard"], "training": {"route": [0.5], "stop_after": 2}},
        "kd": {"model": "tiny", "teachers": ["half"], "training": {"stop_after": 2}},
    }
    run = tmp_path / "run"
    train(tree, run)
    route, early = (lines(run / "students" / arm / "seed0") for arm in ("standard-route", "half-kd"))
    assert route[0]["losses"] == early[0]["losses"]
    assert route[1]["losses"]["kd"] != early[1]["losses"]["kd"]


def test_a_preparation_is_taught_by_the_finished_teacher(tmp_path: Path, train, tiny_study) -> None:
    tree = tiny_study(training=TRAINING | {"preparation_epochs": 2}, baseline=None)
    tree["teachers"] = {"standard": {"model": "tiny"}}
    terms = {"kd": {"stage": "preparation"}, "nkd": {}}
    tree["students"] = {
        "route": {"model": "tiny", "terms": terms, "training": {"route": [0.5]}},
        "plain": {"model": "tiny", "terms": terms},
    }
    run = tmp_path / "run"
    train(tree, run)
    first, second = (
        [
            json.loads(line)["losses"]
            for line in (run / f"students/{arm}/seed0/preparation.jsonl").read_text().splitlines()
        ]
        for arm in ("standard-route", "standard-plain")
    )
    assert first == second


def test_an_earlier_state_asked_for_too_late_is_told_at_once(tmp_path: Path, train, teachers) -> None:
    def stop(_: Any, event: dict[str, Any]) -> None:
        if event["event"] == "epoch" and event["epoch"] == 2:
            raise KeyboardInterrupt

    run = tmp_path / "run"
    with pytest.raises(KeyboardInterrupt):
        train(teachers(plain={"training": {"held_out": 0.25}}), run, on_event=stop)
    for saved in ({"after": 1}, {"best": "nll"}):
        tree = teachers(plain={"training": {"held_out": 0.25}}, early={"from": "plain", **saved})
        with pytest.raises(InputError, match=r"early/seed0: the weights of teacher plain/seed0 .* were not kept"):
            train(tree, run, resume=True)
    late = teachers(plain={"training": {"held_out": 0.25}}, early={"from": "plain", "after": 3})
    train(late, run, resume=True)
    assert (run / "teachers/early/seed0/model.json").exists()


def test_contrast_is_drawn_from_what_the_student_is_trained_on(tmp_path: Path, tiny_study, tiny_network) -> None:
    tree = tiny_study(
        baseline=None, students={"crd": {"model": "tiny", "method": "crd", "training": {"held_out": 0.25}}}
    )
    tree["teachers"] = {"standard": {"model": "tiny"}}
    study = study_of(tree, tmp_path / "run", {"tiny": tiny_network})
    teacher = new_classifier(study, "tiny", pretrained=False)[0]
    spec = study.config.students["crd"]
    made = assemble(study, spec, role="student", seed=0, teacher=teacher, teacher_name="teacher")
    kept = rows_of(study, Job("student", "standard-crd", 0))[0]
    others: Any = made.terms["crd"].objective.others
    drawn = others.draw(torch.tensor([0, 1, 2]), 2000, torch.Generator().manual_seed(0))
    assert set(drawn.flatten().tolist()) == set(kept.tolist())


def test_combined_terms_and_settings_all_count(tmp_path: Path, train, teachers) -> None:
    run = tmp_path / "run"
    terms = {"mse": {"weight": 0.5}, "joint_lipschitz": {"weight": 1e-3}}
    training = {"averaging": {"name": "ema", "decay": 0.5, "start": 1}, "held_out": 0.25, "calibrate": True}
    train(teachers(all={"method": "soteacher", "terms": terms, "training": training}), run)
    line = lines(run / "teachers/all/seed0")[-1]
    assert line["losses"].keys() == {"cross_entropy", "lipschitz", "consistency", "mse", "joint_lipschitz"}
    assert line["train_loss"] == pytest.approx(sum(line["losses"].values()))
    assert {"averaging", "temperature"} <= facts(run, "all").keys()


@pytest.mark.parametrize(
    ("arms", "message"),
    [
        ({"a": {"method": "mcmi"}}, "teachers.a: mcmi goes on from a trained network; name its teacher as start"),
        ({"a": {"start": "b"}}, "teachers.a.start: unknown teacher 'b'; known: a"),
        ({"a": {"start": "a"}}, "teachers.a: it needs itself to be finished before, by way of a"),
        ({"a": {"start": "b"}, "b": {"start": "a"}}, "teachers.a: it needs itself to be finished before, by way of a"),
        ({"a": {"start": "b"}, "b": {"model": "wrn_10_1"}}, "teachers.a.start: b is a wrn_10_1, and a tiny was to go"),
        ({"c": {"start": "a"}, "a": {"from": "a", "after": 1}}, "teachers.c: it needs itself to be finished before"),
        ({"a": {}, "b": {"from": "a", "after": 1}, "c": {"from": "b", "after": 1}}, "teachers.c.from: b is an earlier"),
        ({"a": {"training": {"route": [2, 1]}}}, "teachers.a.training: route must rise, got [2.0, 1.0]"),
        ({"a": {"start": "b", "method": "assistant", "teacher": "b"}, "b": {}}, "teachers.a: start and teacher cannot"),
        ({"a": {"method": "assistant"}}, "teachers.a: kd reads a teacher; name the one that it learns from"),
        (
            {"a": {"teacher": "b"}, "b": {}},
            "teachers.a.teacher: no term of the loss reads a teacher; leave teacher out",
        ),
        ({"a": {"method": "kd"}}, "teachers.a.method: kd is a method for a student, wanted one for a teacher"),
        ({"a": {}, "b": {"from": "a"}}, "teachers.b: an earlier state is chosen by after or by best, got neither"),
        ({"a": {}, "b": {"from": "a", "after": 1, "best": "nll"}}, "teachers.b: an earlier state is chosen by after"),
        ({"a": {}, "b": {"from": "a", "best": "nll"}}, "teachers.b.best: a holds no training images out"),
        ({"a": {}, "b": {"from": "a", "best": "loss"}}, "teachers.b.best: should be 'nll', 'accuracy', 'brier' or"),
        ({"a": {"training": {"keep_best": "nll"}}}, "teachers.a.training: keep_best is judged on held-out"),
        ({"a": {"training": {"calibrate": True}}}, "teachers.a.training: calibrate is judged on held-out"),
        ({"a": {"training": {"stop_after": 5}}}, "teachers.a.training: stop_after: 5 is past the end of 4 epochs"),
        ({"a": {"training": {"held_out": 0.7}}}, "teachers.a.training.held_out: should be less than or equal to 0.5"),
        (
            {"a": {"training": {"averaging": {"name": "swa", "start": 3}, "stop_after": 2}}},
            "teachers.a.training: averaging.start: 3 epochs are past the end of 2 epochs",
        ),
        (
            {"a": {"training": {"averaging": {"name": "swa"}, "keep_best": "nll", "held_out": 0.1}}},
            "teachers.a.training: keep_best keeps one epoch's weights, and averaging makes them of several",
        ),
        (
            {"a": {"method": "soteacher", "training": {"mixing": {"name": "mixup"}}}},
            "teachers.a: consistency is about single images, and training.mixing mixup blends them; leave one out",
        ),
        ({"a": {"training": {"route": [0.5]}}}, "teachers.a.training.route: it is a route through a teacher's run"),
    ],
)
def test_what_makes_no_sense_is_refused_in_one_line(teachers, arms: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError) as caught:
        read_study(teachers(**arms))
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)


def test_a_route_needs_a_teacher_that_is_trained_here(tiny_study) -> None:
    tree = tiny_study(baseline=None, students={"kd": {"model": "tiny", "training": {"route": [0.5]}}})
    tree["teachers"] = {"old": {"file": "old"}}
    with pytest.raises(InputError, match=r"students.kd.training.route: the teacher old is not trained in this study"):
        read_study(tree)


def test_a_network_whose_logits_are_not_of_a_linear_layer_cannot_be_calibrated(
    tmp_path: Path, teachers, tiny_network
) -> None:
    class Squashed(tiny_network):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return super().forward(images).tanh()

    tree = teachers(a={"training": {"held_out": 0.25, "calibrate": True}})
    config = read_study(tree)
    with pytest.raises(InputError, match=r"teachers.a: calibrate: the logits of Squashed are not those of its last"):
        run_study(config, tmp_path / "run", factories={"tiny": Squashed})
    assert not (tmp_path / "run").exists()
