import json
import time
from itertools import pairwise

import benchmarks.gpu as gpu
import benchmarks.gpu_cells as gpu_cells
import pytest
import torch
from benchmarks.gpu_cells import Clock, Plan, measure_cell
from benchmarks.gpu_counts import Traffic, count_step, peaks
from benchmarks.gpu_packed import Packed, order
from benchmarks.gpu_steps import FIELD, VARIANTS, Cell, cell_study, field_steps, own_cell, random_data
from torch import nn

from soteacher.errors import InputError
from soteacher.models.classifier import Classifier

TEACHER, PAIR = Cell("resnet8", None, 8), Cell("resnet8", "resnet8", 8)
EAGER = [variant for variant in VARIANTS if variant.compiled == "no"]


@pytest.fixture(scope="module")
def data():
    return random_data(32, 16)


def _plan(data, **over):
    settings = {
        "data": data, "device": "cpu", "workers": 0, "rounds": 2, "block_seconds": 0.001, "packed": (1,),
        "packed_seconds": 0.01, "threads": 1,
    }  # fmt: skip
    return Plan(**(settings | over))


def _operations_of_layers(classifier, images):
    """Count what convolutions and linear layers multiply and add: all layers, and the first."""
    counts = []

    def look(module, _, output):
        counts.append(2 * output.numel() * module.weight[0].numel())

    layers = [module for module in classifier.modules() if isinstance(module, (nn.Conv2d, nn.Linear))]
    handles = [layer.register_forward_hook(look) for layer in layers]
    classifier(images)
    for handle in handles:
        handle.remove()
    return sum(counts), counts[0]


def test_count_step_counts_a_teachers_forward_and_two_backward_passes(data):
    training = own_cell(TEACHER, VARIANTS[1], data, "cpu")
    forward, first = _operations_of_layers(training.classifier, torch.rand(8, 3, 32, 32))
    training.step()
    # Backward, each layer has the gradients of its weights and of its input; the first layer's input wants none.
    assert count_step(training.step)["operations"] == 3 * forward - first


def test_count_step_counts_the_frozen_teacher_once(data):
    training = own_cell(PAIR, VARIANTS[1], data, "cpu")
    forward, first = _operations_of_layers(training.classifier, torch.rand(8, 3, 32, 32))
    training.step()
    assert count_step(training.step)["operations"] == 4 * forward - first


def test_count_step_finds_half_the_bytes_in_half_precision(data):
    counts = {}
    for variant in (VARIANTS[3], VARIANTS[4]):
        training = own_cell(TEACHER, variant, data, "cpu")
        training.step()
        counts[variant.precision] = count_step(training.step)
    assert counts["fp32"]["operations"] == counts["bf16-mixed"]["operations"]
    share = counts["bf16-mixed"]["bytes_least"] / counts["fp32"]["bytes_least"]
    assert 0.5 < share < 0.6  # weights and their statistics stay in float32
    assert counts["fp32"]["bytes_least"] < counts["fp32"]["bytes_each_operation"]


def test_traffic_adds_what_each_operation_reads_and_writes():
    first, second = torch.rand(4, 6), torch.rand(6, 10)
    with Traffic() as traffic:
        product = first @ second
        product.t()
        product + 1
    assert traffic.least == 4 * (24 + 60 + 40)
    assert traffic.all == traffic.least + 4 * (40 + 40)


def test_peaks_are_positive():
    found = peaks("cpu", size=16, copied_bytes=1024)
    assert found.keys() == {"bf16_operations_per_second", "bytes_per_second"}
    assert min(found.values()) > 0


@pytest.mark.parametrize("cell", [TEACHER, PAIR])
def test_our_ways_in_float32_train_the_same_network(cell, data):
    weights = []
    for variant in VARIANTS[1:4]:
        training = own_cell(cell, variant, data, "cpu")
        training.step()
        training.step()
        weights.append(torch.cat([parameter.flatten() for parameter in training.classifier.parameters()]))
    torch.testing.assert_close(weights[1], weights[0], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(weights[2], weights[0], rtol=1e-3, atol=1e-4)  # sums in another order


@pytest.mark.parametrize("cell", [TEACHER, PAIR])
def test_field_steps_go_on_beyond_an_epoch(cell, data):
    step = field_steps(cell, data, "cpu", workers=0)
    for _ in range(6):  # of which four are an epoch
        step()


def test_compiled_code_is_that_of_student_and_teacher(data, monkeypatch):
    compiled = []
    monkeypatch.setattr(Classifier, "compile", lambda self, **options: compiled.append((self, options)))
    training = own_cell(PAIR, VARIANTS[5], data, "cpu")
    assert [options for _, options in compiled] == [{"dynamic": False}] * 2
    assert compiled[0][0] is training.classifier
    assert training.study.config.training.compile is False


def test_each_variant_adds_one_change():
    names = ("channels_last", "precision", "compiled", "waits", "free")
    for before, after in pairwise(VARIANTS[1:]):
        assert sum(getattr(before, name) != getattr(after, name) for name in names) == 1
    assert [variant.offered for variant in VARIANTS] == [False, False, True, True, True, False, True, False]


def test_clock_expects_what_the_slowest_took():
    clock = Clock(time.monotonic() + 100)
    assert not clock.fits("compiled", 50.0)
    clock.learn("compiled", 10.0)
    clock.learn("compiled", 4.0)
    assert clock.guesses["compiled"] == 10.0
    assert clock.fits("compiled", 50.0)


def test_measure_cell_says_what_there_is_no_time_for(data):
    found = measure_cell(_plan(data), TEACHER, EAGER, Clock(time.monotonic() + 1), {})
    assert found["rows"] == {}
    assert found["skipped"].keys() == {variant.name for variant in EAGER}
    assert "6 s to set up" in found["skipped"][FIELD.name]


def test_measure_cell_goes_on_without_a_way_that_fails(data, monkeypatch):
    def fail(*_):
        raise RuntimeError("out of memory\nand more")

    monkeypatch.setattr(gpu_cells, "own_cell", fail)
    peak = {"bf16_operations_per_second": 1.0, "bytes_per_second": 1.0}
    found = measure_cell(_plan(data), TEACHER, EAGER[:2], Clock(time.monotonic() + 100), peak)
    assert list(found["rows"]) == [FIELD.name]
    assert found["skipped"] == {EAGER[1].name: "failed: out of memory"}


def test_the_fields_block_is_longer_than_what_its_workers_hold(data):
    way = gpu_cells.Way(FIELD, lambda: None, None)
    gpu_cells._choose_steps(_plan(data, workers=3, block_seconds=0.0), way)
    assert way.steps == 5 * 2 * 3


def _expectations(times, minutes):
    pair = {"rows": {"+ CUDA graphs": {"times_the_field": {"median": times}}}}
    return gpu.expectations({gpu.PAIR.name: pair, gpu.TEACHER.name: {"whole_training": {"seconds": 60 * minutes}}})


def test_expectations_are_met_or_not():
    assert [one["met"] for one in _expectations(8.0, 4.9)] == [True, True]
    assert [one["met"] for one in _expectations(7.9, 5.0)] == [False, False]
    assert [one["found"] for one in _expectations(7.9, 5.0)] == [7.9, 5.0]
    assert [one["met"] for one in gpu.expectations({})] == [None, None]


def test_only_ways_that_the_library_offers_count():
    rows = {name: {"times_the_field": {"median": 9.0}} for name in ("+ compile", "+ free choice of algorithms")}
    assert gpu.expectations({gpu.PAIR.name: {"rows": rows}})[0]["met"] is None


def test_main_measures_every_way_of_a_tiny_network(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(gpu, "measure_packed", lambda *_: {"skipped": "elsewhere"})
    monkeypatch.setattr(gpu, "random_data", lambda *_: random_data(32, 16))
    monkeypatch.setattr(gpu, "TINY", (Cell("resnet8", "resnet8", 4), Cell("resnet8", None, 4)))
    path = tmp_path / "gpu.json"
    gpu.main(["--tiny", "--device", "cpu", "--rounds", "2", "--workers", "0", "--threads", "1", "--json", str(path)])
    found = json.loads(path.read_text())
    assert list(found["cells"]) == [cell.name for cell in gpu.TINY]
    for cell in found["cells"].values():
        assert list(cell["rows"]) == [variant.name for variant in EAGER]
        row = cell["rows"]["+ bf16-mixed"]
        assert row["images_per_second"] == pytest.approx(4 / row["seconds_per_step"])
        assert len(row["seconds"]) == 2
        operations = row["share_of_bf16_peak"] * row["seconds_per_step"] * found["peak"]["bf16_operations_per_second"]
        assert operations == pytest.approx(row["operations"])
    whole = found["cells"][gpu.TINY[1].name]["whole_training"]
    assert whole["seconds"] == pytest.approx(sum(value for key, value in whole.items() if key.endswith("_seconds")))
    assert found["machine"]["torch"] == torch.__version__
    assert "times the field" in capsys.readouterr().out


def test_main_wants_a_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(InputError, match="this measures a GPU"):
        gpu.main([])


@pytest.mark.slow
def test_packed_processes_train_and_say_what_is_wrong():
    told = order(
        cell_study(TEACHER, VARIANTS[2]), "teacher", "soteacher", device="cpu", threads=1, random_images=(32, 16)
    )
    with Packed([told, {**told, "name": "nobody"}]) as processes:
        with pytest.raises(InputError, match="ended with status 1: KeyError: 'nobody'"):
            processes._answer(1, 100.0)
        cost = json.loads(json.dumps(processes._answer(0, 100.0)[1]))
        assert cost["steps_per_epoch"] == 4
        assert cost["parameters"] == sum(
            p.numel() for p in own_cell(TEACHER, VARIANTS[2], random_data(8, 8), "cpu").classifier.parameters()
        )
        (answer,) = processes.run([0], 0.05)
    assert answer["images"] == 8 * answer["steps"] > 0
    assert answer["seconds"] >= 0.05


def test_packed_processes_must_answer_in_time():
    told = order({}, "teacher", "soteacher", device="cpu", threads=1)
    with pytest.raises(InputError, match="did not answer within 0 s"), Packed([told]) as processes:
        processes.ready(0.0)
