import pytest
import torch
from benchmarks.distillation import FORWARD_WAYS, STEP_WAYS, field_name, measure_forward, measure_steps
from benchmarks.ours import data_of

from soteacher.errors import InputError
from soteacher.train.answer_store import AnswerStore
from soteacher.train.teacher_signal import LiveTeacher

FORWARD = {name: way for name, way in FORWARD_WAYS.items() if not way["compiled"]}
STEPS = {name: way for name, way in STEP_WAYS.items() if not way["compile"]}
CALL = {"batch_size": 8, "rounds": 2, "peak": 1e11}


def _check(found, names):
    assert list(found["ways"]) == names
    for name, row in found["ways"].items():
        seconds = row["milliseconds"] / 1000
        assert row["images_per_second"] == pytest.approx(8 / seconds)
        assert row["share_of_matrix_peak"] == pytest.approx(found["operations"][name] / seconds / 1e11)
        ratio = row["times_as_fast_as_field"]
        assert ratio["quartile_low"] <= ratio["median"] <= ratio["quartile_high"]
    best = found["ways"][found["fastest_of_the_field"]]
    assert best["times_as_fast_as_field"]["median"] == 1


def test_measure_forward_compares_the_ways_to_the_same_answers():
    found = measure_forward("resnet8", FORWARD, **CALL)
    _check(found, list(FORWARD))
    # By hand: 3 x 3 convolutions of 32^2 x (3 x 16 + 2 x 16 x 16), ..., 1 x 1 shortcuts and the last layer.
    first = 32**2 * 9 * (3 * 16 + 2 * 16 * 16)
    second = 16**2 * (9 * (16 * 32 + 32 * 32) + 16 * 32)
    third = 8**2 * (9 * (32 * 64 + 64 * 64) + 32 * 64)
    assert found["operations"]["field"] == 8 * 2 * (first + second + third + 64 * 100)


def test_measure_steps_asks_the_teacher_nothing_that_was_kept(monkeypatch):
    asked, written = [], []
    answer, write = LiveTeacher.answer, AnswerStore.write
    monkeypatch.setattr(LiveTeacher, "answer", lambda self, images: asked.append(len(images)) or answer(self, images))
    monkeypatch.setattr(AnswerStore, "write", lambda self, *given: written.append(1) or write(self, *given))
    found = measure_steps("resnet14:resnet8", data_of(examples=64), STEPS, steps_a_round=1, field_workers=(0,), **CALL)
    _check(found, [field_name(0), *STEPS])
    calls = 2 + 2
    assert len(written) == calls  # by the first pass alone
    assert asked == [8] * 3 * calls  # two live students, and the first pass
    kept, live = (found["operations"][name] for name in ("kept answers, channels last", "live, channels last"))
    assert 0 < kept < live


def test_measure_steps_wants_a_pair():
    with pytest.raises(InputError, match="TEACHER:STUDENT, got 'resnet8'"):
        measure_steps("resnet8", data_of(examples=8), STEPS, steps_a_round=1, **CALL)


def test_the_ways_of_a_frozen_teacher_must_agree(monkeypatch):
    monkeypatch.setattr("benchmarks.distillation._answering", lambda *_, channels_last, **__: lambda: (
        torch.ones(2) * (1 + channels_last)
    ))  # fmt: skip
    with pytest.raises(InputError, match="channels last: the answers are 1 away"):
        measure_forward("resnet8", FORWARD, **CALL)
