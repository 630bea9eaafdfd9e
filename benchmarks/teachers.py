"""How fast is a teacher trained? Times steps of SoTeacher's training, input included, beside the field's way.

The field's way and ours, with each of our optimisations by itself, train copies of one network side by side in one
process, and in a second one that keeps the pages which a step frees, as the processes of a study do; all take turns.
Beside the ratios stand the share of the machine's best arithmetic that a step reaches, and where its time goes.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks import timing
from benchmarks.apart import KEPT, Apart
from benchmarks.field import LEARNING_RATE, MOMENTUM, WEIGHT_DECAY, FieldTeacher, field_loader, soteacher_regularizers
from benchmarks.ours import (
    UNACCELERATED,
    allow_compilations,
    assembled,
    batches,
    data_of,
    steps,
    study_of,
    trainee_of,
)
from benchmarks.profiling import KINDS, labelled, operations, shares
from soteacher.data import DataSet
from soteacher.models.zoo import build_network
from soteacher.train.config import TrainingConfig
from soteacher.train.loop import Trainee

WORKERS = (0, 2)
"""Processes of the field's loader; the faster of the two ways is what ours are compared with."""
PLAIN = "plain"
OURS: dict[str, dict[str, bool]] = {
    PLAIN: {},
    "fused_sgd": {},
    "channels_last": {"channels_last": True},
    "compiled": {"compile": True},
    "both": {"channels_last": True, "compile": True},
}
"""Each way of ours, and what is switched on in it. All have the fused optimiser that the loop always has, except
``plain``, which has PyTorch's default as the field has."""

SHARES = "shares of "
WITH_KEPT_PAGES = (PLAIN, "channels_last", "both")
"""Ways of ours that are measured with kept pages as well; so is the field's without workers."""


def main() -> None:
    """Measure, print a table for each network and write the numbers to a JSON file if one is named."""
    given = _arguments()
    data, peak = data_of(given.data_root), timing.matrix_peak()
    found: dict[str, dict[str, Any]] = {}
    for model in given.models:
        found[model] = measure(
            data, model, batch_size=given.batch_size, rounds=given.rounds, calls=given.steps,
            peak=peak["operations_per_second"],
        )  # fmt: skip
        _print(model, found[model], f"batch {given.batch_size}, {given.threads} threads", peak)
    settings = {
        "data": data.name, "batch_size": given.batch_size, "rounds": given.rounds, "steps_per_round": given.steps
    }  # fmt: skip
    timing.record(given.json, settings=settings, results={"peak": peak, "networks": found}, threads=given.threads)


def measure(
    data: DataSet, model: str, *, batch_size: int, rounds: int, calls: int, peak: float
) -> dict[str, dict[str, Any]]:
    """Return the figures of each way to train one network.

    Args:
        data: to train on.
        model: the network's name.
        batch_size: examples of a step.
        rounds: counted.
        calls: steps of each way in a round.
        peak: the machine's operations per second.
    """
    ways = _ways(data, model, batch_size, calls, WORKERS, tuple(OURS))
    with Apart(_ways, data, model, batch_size, calls, WORKERS[:1], WITH_KEPT_PAGES) as beside:
        ways |= {way + KEPT: call for way, call in beside.calls().items()}
        steps_alone = {way: call for way, call in ways.items() if not way.startswith(SHARES)}
        seconds = timing.alternate(steps_alone, rounds=rounds)
        field = min(map(_field_way, WORKERS), key=lambda way: statistics.median(seconds[way]))
        arithmetic = operations(build_network(model, num_classes=data.num_classes), batch_size)
        found: dict[str, dict[str, Any]] = {}
        for way in steps_alone:
            step_seconds = statistics.median(seconds[way]) / calls
            found[way] = {
                "milliseconds": 1000 * step_seconds,
                "images_per_second": batch_size / step_seconds,
                "times_as_fast_as_field": timing.ratio(seconds, field, way),
                "share_of_peak": arithmetic / step_seconds / peak,
                "shares": ways[SHARES + way](),
            }
    return found


def _ways(
    data: DataSet, model: str, batch_size: int, calls: int, workers: Sequence[int], ours: Sequence[str]
) -> dict[str, Callable[[], Any]]:
    """Return functions that make some steps in each way, and functions that say where the time of a step goes."""
    made = {_field_way(number): _field_steps(data, model, batch_size, number) for number in workers}
    made |= _our_steps(data, model, batch_size, ours)
    ways: dict[str, Callable[[], Any]] = {way: partial(_repeat, step, calls) for way, step in made.items()}
    return ways | {SHARES + way: partial(shares, step) for way, step in made.items()}


def _field_way(workers: int) -> str:
    return f"field, {workers} workers"


def _repeat(step: Callable[[], object], calls: int) -> None:
    for _ in range(calls):
        step()


def _field_steps(data: DataSet, model: str, batch_size: int, workers: int) -> Callable[[], object]:
    torch.manual_seed(0)
    network = build_network(model, num_classes=data.num_classes)
    ramp = 2 / TrainingConfig().epochs  # that of our steps, which are of the second epoch
    teacher = FieldTeacher(network, soteacher_regularizers(data.train.num_examples, data.num_classes, ramp=ramp))
    loader = field_loader(data.train, data.mean, data.std, batch_size=batch_size, workers=workers, seed=0)

    def endless() -> Iterator[Any]:
        while True:
            yield from loader

    source = labelled(endless())
    return lambda: teacher.step(*next(source))


def _our_steps(data: DataSet, model: str, batch_size: int, ways: Sequence[str]) -> dict[str, Callable[[], object]]:
    allow_compilations()
    study = study_of(
        data,
        teachers={
            way: {
                "model": model, "method": "soteacher",
                "training": {**UNACCELERATED, **options},
            } for way, options in OURS.items() if way in ways
        },
        students={"alone": {"model": model, "method": "alone"}},
        training={"batch_size": batch_size},
    )  # fmt: skip
    trainees = {way: trainee_of(study, "teacher", way, assembled(study, "teacher", way)) for way in ways}
    trainees[PLAIN] = _with_default_optimizer(trainees[PLAIN])
    return {way: steps(trainee, labelled(batches(study))) for way, trainee in trainees.items()}


def _with_default_optimizer(trainee: Trainee) -> Trainee:
    parameters = [parameter for group in trainee.optimizer.param_groups for parameter in group["params"]]
    optimizer = torch.optim.SGD(parameters, lr=LEARNING_RATE, momentum=MOMENTUM, weight_decay=WEIGHT_DECAY)
    return replace(trainee, optimizer=trainee.fabric.setup_optimizers(optimizer))


def _print(model: str, found: dict[str, dict[str, Any]], where: str, peak: dict[str, Any]) -> None:
    timing.table(
        f"{model}, a step of SoTeacher with its input, {where}",
        ("way", "ms a step", "images / s", "times the faster field", "of the peak", *KINDS),
        [
            (
                way, f"{figures['milliseconds']:.1f}", f"{figures['images_per_second']:.0f}",
                timing.spread(figures["times_as_fast_as_field"]), f"{figures['share_of_peak']:.0%}",
                *(f"{figures['shares'][kind]:.0%}" for kind in KINDS),
            )
            for way, figures in found.items()
        ],
        caption=f"medians (quartiles); peak: {peak['operations_per_second'] / 1e9:.0f} thousand million operations a "
        f"second, reached by the {peak['reached_by']}; last columns: where the time goes",
        width=150,
    )  # fmt: skip


def _arguments() -> argparse.Namespace:
    parser = timing.arguments(__doc__, rounds=8)
    parser.add_argument("--models", nargs="+", default=["resnet8", "wrn_16_2", "wrn_40_2"], metavar="MODEL")
    parser.add_argument("--steps", type=int, default=4, help="steps of each way in a round")
    parser.add_argument("--data-root", type=Path, help="folder of CIFAR-100; random images where it is left out")
    given = timing.checked(parser)
    if given.steps < 1:
        parser.error("needs --steps of at least 1")
    return given


if __name__ == "__main__":
    timing.run(main)
