"""One network of a study: put together from its settings, trained by the loop, evaluated and saved.

:func:`train_network` is the way through; the rest are its parts.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, replace
from hashlib import blake2b
from typing import Any

import torch
from lightning_fabric import Fabric
from torch import nn

from soteacher import metrics
from soteacher.assembly import Assembled, assemble
from soteacher.config import FileTeacher, SavedTeacher, Student, TrainedTeacher
from soteacher.data import EvaluationLoader, TrainLoader
from soteacher.diagnostics.calibration import brier_score, fit_temperature
from soteacher.environment import PeakMemory
from soteacher.files import read_json, write_tensors
from soteacher.finished import finish, take_file, take_saved, write_lines
from soteacher.jobs import (
    Job,
    OnEvent,
    Study,
    evaluation_batches,
    load_finished,
    restored,
    rows_of,
    spec_of,
    start_of,
    teacher_of,
)
from soteacher.kept_epochs import (
    best_epochs,
    best_weights,
    criteria_to_keep,
    epoch_weights,
    epochs_to_keep,
    weights_after,
)
from soteacher.models.classifier import Classifier
from soteacher.models.parts import Parts, evaluating
from soteacher.models.taps import Tapped, resolve_taps
from soteacher.models.temperature import divide_logits
from soteacher.models.weights import load_weights, read_weights, weights_checksum
from soteacher.objective import Stage
from soteacher.randomness import derive_seed
from soteacher.teacher_answers import answers_of, bank_seed, why_live
from soteacher.train.acceleration import Acceleration, Compiled, choose_acceleration
from soteacher.train.averaging import WeightAverage
from soteacher.train.checkpoint import Checkpoint
from soteacher.train.config import TrainingConfig
from soteacher.train.evaluate import evaluate, predict
from soteacher.train.logs import open_loggers
from soteacher.train.loop import StepReport, Trainee, fabric_for, fit
from soteacher.train.optimizer import backward_for, build_optimizer
from soteacher.train.teacher_signal import CachedTeacher, LiveTeacher, RouteOfTeachers, TeacherSchedule
from soteacher.types import Outputs, Step


def train_network(study: Study, job: Job, *, on_event: OnEvent, should_stop: Callable[[], bool]) -> None:
    """Train one network of a study, from its start or from its last state, and save it."""
    spec = spec_of(study.config, job)
    if isinstance(spec, SavedTeacher):
        take_saved(study, job, spec)
    elif isinstance(spec, FileTeacher):
        take_file(study, job, spec)
    else:
        _train(study, job, spec, on_event=on_event, should_stop=should_stop)
    on_event(job, {"event": "finished", "row": read_json(study.folder_of(job) / "model.json")["row"]})


def _train(
    study: Study,
    job: Job,
    spec: TrainedTeacher | Student,
    *,
    on_event: OnEvent,
    should_stop: Callable[[], bool],
) -> None:
    """Put a network, its loss, its data and its teacher together, run the loop, save what comes out."""
    training, (teachers, title) = study.config.training_of(spec), _teachers(study, job, spec)
    start = start_of(study.config, job)
    made = assemble(
        study, spec, role=job.role, seed=job.seed, teacher=teachers[-1] if teachers else None, teacher_name=title,
        start=load_finished(study, start) if start else None,
    )  # fmt: skip
    fingerprint = _fingerprint(study, job, made, spec)
    resume = study.folder_of(job) / "resume"
    preparation = Checkpoint(resume / "preparation", fingerprint)
    checkpoint = Checkpoint(resume, fingerprint)
    memory = PeakMemory(study.device)
    before = _prepare(
        study, job, made, teachers[-1:], training, preparation, on_event=on_event, should_stop=should_stop
    )
    made.start_training()
    trainee = make_trainee(study, job, made, teachers, training, "training")
    how = _how_it_runs(study, made, trainee)
    on_event(job, {"event": "started", "how": how})
    batches = _batches(study, job, made, training, "training")
    if not checkpoint.path.exists():
        _survey(study, job, made, trainee)
    history = _fit(
        study, job, trainee, batches, made.classifier, checkpoint, on_event=on_event, should_stop=should_stop
    )
    facts = {
        "method": spec.method,
        "terms": {name: config.model_dump(mode="json") for name, config in made.configs.items()},
        "training": training.model_dump(mode="json"),
        "fingerprint": fingerprint,
        "runs": how,
        **({"start": start.arm} if start else {}),
        **_conclude(study, job, trainee, batches, made.classifier, history),
    }
    costs = {
        "preparation_seconds": sum(line["seconds"] for line in before),
        "seconds_per_step": sum(line["seconds"] for line in history) / (len(history) * batches.steps_per_epoch),
        "extra_parameters": made.extra_parameters(),
        "peak_memory_bytes": memory.bytes(),
    }
    finish(study, job, made.classifier, made.network, history, facts, costs)
    preparation.remove()
    checkpoint.remove()


def _prepare(
    study: Study,
    job: Job,
    made: Assembled,
    teachers: Sequence[Classifier],
    training: TrainingConfig,
    checkpoint: Checkpoint,
    *,
    on_event: OnEvent,
    should_stop: Callable[[], bool],
) -> list[dict[str, Any]]:
    """Run the stage before the training, if there is one, or take up what it has left; return its epochs' figures.

    A state that is finished stays until the network is: a resumed training begins from it again.
    """
    if not made.stage("preparation"):
        return []
    own = training.preparation()
    first = {name: tensor.clone() for name, tensor in made.classifier.state_dict().items()}
    trainee = make_trainee(study, job, made, teachers, own, "preparation")

    def on_epoch(line: dict[str, Any]) -> None:
        on_event(job, {"event": "epoch", "stage": "preparation", "epochs": own.epochs, **line})

    def on_step(report: StepReport) -> None:
        on_event(job, {"event": "step", "stage": "preparation", "epochs": own.epochs, **asdict(report)})

    history = fit(
        trainee, _batches(study, job, made, own, "preparation"), measure=dict[str, float],
        checkpoint=checkpoint, on_epoch=on_epoch, on_step=on_step, should_stop=should_stop,
    )  # fmt: skip
    write_lines(study.folder_of(job) / "preparation.jsonl", history)
    if not any(term.objective.trains_network for term in trainee.terms):
        made.classifier.load_state_dict(first)  # batch normalisation has seen the batches; nothing else has changed
    return history


def _batches(study: Study, job: Job, made: Assembled, training: TrainingConfig, stage: Stage) -> TrainLoader:
    """Return the training set of one stage of a network."""
    purpose = "data" if stage == "training" else "preparation data"
    return TrainLoader(
        study.data.train, batch_size=training.batch_size, augment=study.config.data.augment,
        seed=derive_seed(job.seed, job.role, purpose), device=study.device, workers=torch.get_num_threads(),
        views=made.views(stage), rows=rows_of(study, job)[0], mixing=training.mixing, bank_seed=bank_seed(job),
    )  # fmt: skip


def _held_out(study: Study, job: Job) -> EvaluationLoader | None:
    """Return the training images that a network is judged by; ``None`` where it is trained on all."""
    rows = rows_of(study, job)[1]
    return None if rows is None else evaluation_batches(study.data.train.subset(rows), study.device)


def _teachers(study: Study, job: Job, spec: TrainedTeacher | Student) -> tuple[list[Classifier], str]:
    """Return a network's trained teachers in the order of their turns, frozen, and how messages call them.

    There are several on a route through one teacher's run, and none for a network that learns from the labels alone.
    """
    teacher = teacher_of(study.config, job)
    if teacher is None:
        return [], ""
    last, network = load_finished(study, teacher)
    points = study.config.training_of(spec).route
    paths = [weights_after(study, teacher, point)[1] for point in points]
    classifiers = [*(restored(study, network, path) for path in paths), last]
    return [classifier.requires_grad_(False).eval() for classifier in classifiers], f"teacher {network.model}"


@torch.no_grad()
def _survey(study: Study, job: Job, made: Assembled, trainee: Trainee) -> None:
    """Show all training examples to the objectives that want to see them before the first step."""
    surveying = [term.objective for term in trainee.terms if term.objective.surveys]
    if not surveying:
        return
    rows = rows_of(study, job)[0]
    with evaluating(made.classifier):
        for batch in evaluation_batches(study.data.train.subset(rows), study.device):
            logits, features = trainee.forward(batch.images)
            step = Step(
                images=batch.images, labels=batch.labels, indices=rows.to(study.device)[batch.indices],
                outputs=Outputs(logits=logits, features=features), model=trainee.network, parts=trainee.parts,
                epoch=0, num_epochs=trainee.config.epochs, progress=0.0,
            )  # fmt: skip
            for objective in surveying:
                objective.survey(step)


def _conclude(
    study: Study,
    job: Job,
    trainee: Trainee,
    batches: TrainLoader,
    classifier: Classifier,
    history: Sequence[Mapping[str, Any]],
) -> dict[str, Any]:
    """Make the network that is kept of the last epoch's: averaged, the best epoch's, or calibrated, as was asked for.

    Returns:
        What was done, for the network's facts: ``averaging``, ``kept_epochs`` or ``temperature``.
    """
    training, held_out, facts = trainee.config, _held_out(study, job), dict[str, Any]()
    rows = rows_of(study, job)[0]
    if trainee.average is not None and training.averaging is not None:
        torch.manual_seed(derive_seed(trainee.seed, "statistics"))
        # Each batch counts the same in the statistics, so one of a few images at the end is left out.
        drawn = batches.epoch(training.epochs_run())
        images = (batch.images for batch in drawn if 2 * len(batch.images) >= min(training.batch_size, len(rows)))
        trainee.average.put_into(trainee.network, classifier, images)
        facts["averaging"] = training.averaging.name
    if training.keep_best is not None:
        path = best_weights(study.folder_of(job), training.keep_best)
        load_weights(classifier.network, read_weights(path), source=str(path))
        facts["kept_epochs"] = best_epochs(history, training.keep_best)
    if training.calibrate and held_out is not None:
        logits, labels = predict(classifier, held_out)
        facts["temperature"] = fit_temperature(logits, labels)
        divide_logits(classifier, facts["temperature"], next(iter(held_out)).images)
    return facts


def make_trainee(
    study: Study, job: Job, made: Assembled, teachers: Sequence[Classifier], training: TrainingConfig, stage: Stage
) -> Trainee:
    """Set a network up for its device and precision, with one stage's objectives, its optimiser and its teachers."""
    fabric, terms, classifier = fabric_for(study.device, training.precision), made.stage(stage), made.classifier
    chosen = _acceleration(study, classifier, training)
    objectives = nn.ModuleList(term.objective for term in terms).to(fabric.device)
    taps = {name for term in terms for name in term.objective.features}
    forward = _callable(classifier, taps, training, chosen, frozen=False)
    optimizer: Any = build_optimizer(training.optimizer, [*classifier.parameters(), *objectives.parameters()])
    called, optimizer = fabric.setup(forward, optimizer)
    schedule: TeacherSchedule | None = None
    if teachers and made.reads_teacher(stage):
        signals = _teacher_signals(study, job, teachers, training, made.teacher_features(stage), fabric)
        schedule = signals[0] if len(signals) == 1 else RouteOfTeachers(signals)
    average = None
    if training.averaging is not None:
        average = WeightAverage(classifier.network, training.averaging, num_epochs=training.epochs)
    return Trainee(
        network=classifier.network, forward=called, parts=Parts(classifier), terms=terms, optimizer=optimizer,
        backward=backward_for(training.optimizer), teacher=schedule, fabric=fabric, config=training,
        channels_last=chosen.channels_last, graphs=chosen.graphs,
        seed=derive_seed(job.seed, job.role, stage), average=average,
    )  # fmt: skip


def _teacher_signals(
    study: Study,
    job: Job,
    teachers: Sequence[Classifier],
    training: TrainingConfig,
    taps: Collection[str],
    fabric: Fabric,
) -> Sequence[LiveTeacher | CachedTeacher]:
    """Return what each teacher says: live, or as it has been kept.

    A teacher whose answers are kept is not compiled: whole batches would have other last bits than what is missing of a
    batch, and an answer would depend on who has asked first.
    """
    kept = why_live(study.config, training, taps) is None
    live: list[LiveTeacher] = []
    for teacher in teachers:
        chosen = _acceleration(study, teacher, training)
        chosen = replace(chosen, compiled=False, graphs=False) if kept else chosen
        forward = fabric.setup_module(_callable(teacher, taps, training, chosen, frozen=True).eval())
        live.append(LiveTeacher(forward, Parts(teacher)))
    if not kept:
        return live
    (teacher,) = teachers
    return [CachedTeacher(live[0], answers_of(study, job, teacher, training))]


def _how_it_runs(study: Study, made: Assembled, trainee: Trainee) -> dict[str, Any]:
    """Return what was chosen to train a network faster, for the log and its facts."""
    how: dict[str, Any] = asdict(_acceleration(study, made.classifier, trainee.config))
    how["threads"] = torch.get_num_threads()
    if trainee.teacher is not None:
        why = why_live(study.config, trainee.config, made.teacher_features("training"))
        how["teacher"] = "kept answers" if why is None else f"live: {why}"
    return how


def _acceleration(study: Study, classifier: Classifier, training: TrainingConfig) -> Acceleration:
    return choose_acceleration(training, classifier, num_examples=study.data.train.num_examples, device=study.device)


def _callable(
    classifier: Classifier, features: Collection[str], training: TrainingConfig, chosen: Acceleration, *, frozen: bool
) -> nn.Module:
    """Return a classifier as the loop calls it: it gives logits and features, and may be compiled."""
    if chosen.channels_last:
        classifier.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue] an overload torch lacks
    tapped = Tapped(classifier, resolve_taps(classifier, sorted(features)))
    if not chosen.compiled:
        return tapped
    return Compiled(
        tapped, batch_size=training.batch_size, frozen=frozen, required=training.compile is True, graphs=chosen.graphs
    )


def _fit(
    study: Study,
    job: Job,
    trainee: Trainee,
    batches: TrainLoader,
    classifier: Classifier,
    checkpoint: Checkpoint,
    *,
    on_event: OnEvent,
    should_stop: Callable[[], bool],
) -> list[dict[str, Any]]:
    """Run the loop for one network, keeping its curves, its wanted epochs and its progress."""
    folder, epochs = study.folder_of(job), trainee.config.epochs_run()
    wanted, criteria = epochs_to_keep(study.config, job), criteria_to_keep(study.config, job)
    lines = checkpoint.history()  # not those of metrics.jsonl: a kill may have come between the two
    name = f"{study.config.name}/{study.folder.name}/{job.role}s/{job.arm}/seed{job.seed}"
    loggers = open_loggers(study.config.logging, folder, name, start_epoch=len(lines))
    test = evaluation_batches(study.data.test, trainee.fabric.device)
    held_out = _held_out(study, job)

    def measure() -> dict[str, float]:
        result = evaluate(classifier, test)
        figures = {"test_accuracy": result.accuracy, "test_nll": result.nll, "test_ece": result.ece}
        return figures if held_out is None else figures | _held_out_figures(classifier, held_out)

    def on_epoch(line: dict[str, Any]) -> None:
        lines.append(line)
        write_lines(folder / "metrics.jsonl", lines)
        if len(lines) in wanted:
            write_tensors(epoch_weights(folder, len(lines)), trainee.network.state_dict())
        for criterion in criteria:
            if best_epochs(lines, criterion) == len(lines):
                write_tensors(best_weights(folder, criterion), trainee.network.state_dict())
        for logger in loggers:
            logger.log(_figures(line), epoch=line["epoch"])
        on_event(job, {"event": "epoch", "epochs": epochs, **line})

    def on_step(report: StepReport) -> None:
        on_event(job, {"event": "step", "epochs": epochs, **asdict(report)})

    try:
        return fit(
            trainee, batches, measure=measure, checkpoint=checkpoint, on_epoch=on_epoch, on_step=on_step,
            should_stop=should_stop,
        )  # fmt: skip
    finally:
        for logger in loggers:
            logger.close()


def _fingerprint(study: Study, job: Job, made: Assembled, spec: TrainedTeacher | Student) -> str:
    """Return the checksum of everything that decides a network's numbers."""
    teacher = teacher_of(study.config, job)
    facts = {
        "data": study.data.checksum, "augment": study.config.data.augment.model_dump(mode="json"),
        "seed": job.seed, "role": job.role,
        "network": made.network.model_dump(mode="json"), "start": weights_checksum(made.classifier.network),
        "training": study.config.training_of(spec).model_dump(mode="json"),
        "terms": {name: config.model_dump(mode="json") for name, config in made.configs.items()},
        "teacher": read_json(study.folder_of(teacher) / "model.json")["fingerprint"] if teacher else None,
    }  # fmt: skip
    return blake2b(json.dumps(facts, sort_keys=True).encode(), digest_size=16).hexdigest()


def _held_out_figures(classifier: nn.Module, held_out: EvaluationLoader) -> dict[str, float]:
    """Return how good a network is on training images that it is not trained on."""
    logits, labels = predict(classifier, held_out)
    return {
        "held_out_accuracy": metrics.accuracy(logits, labels),
        "held_out_nll": metrics.negative_log_likelihood(logits, labels),
        "held_out_brier": brier_score(logits, labels),
        "held_out_ece": metrics.expected_calibration_error(logits, labels),
    }


def _figures(line: Mapping[str, Any]) -> dict[str, float]:
    losses = {f"losses/{name}": value for name, value in line["losses"].items()}
    return {key: value for key, value in line.items() if isinstance(value, float)} | losses
