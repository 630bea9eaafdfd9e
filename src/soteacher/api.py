"""The command line's words as Python functions. All are importable from ``soteacher`` itself."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from copy import deepcopy
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Literal

from torch import Tensor, nn

from soteacher.config import DataChoice, FileTeacher, Student, StudyConfig, TrainedTeacher
from soteacher.data import SOURCES, DataSet, SourceConfig, load_data
from soteacher.deployment import Format, export_classifier
from soteacher.diagnostics.card import in_the_whole_split, make_card
from soteacher.diagnostics.card_config import CardConfig, FoldConfig
from soteacher.errors import InputError
from soteacher.jobs import (
    NetworkFactory,
    OnEvent,
    Study,
    evaluation_batches,
    find_network,
    load_teacher_file,
    split_rows,
)
from soteacher.models.classifier import Classifier, NetworkSpec, classifier_of
from soteacher.models.weights import FACTS_FILE, load_classifier, load_weights, read_facts, read_weights
from soteacher.objective import Method
from soteacher.objectives import method as method_named
from soteacher.objectives import reads_teacher
from soteacher.out_of_fold import OnFold, out_of_fold_predictions
from soteacher.recipes import read_study
from soteacher.report.card_page import write_card
from soteacher.series import SeriesConfig, read_plan, run_series
from soteacher.settings import apply_settings, parse
from soteacher.studies import pick_device, run_study, stop_requested
from soteacher.train.evaluate import evaluate as evaluate_classifier

Model = str | nn.Module | Callable[[int, int], nn.Module]
"""A network: by name, as a module (copied for each seed), or made by ``(num_classes, in_channels) -> module``."""
TRAINED: tuple[Literal["teacher", "student"], ...] = ("student", "teacher")
"""The networks of a run that one loads, evaluates or exports: its student, or the teacher where there is none."""
MEASURED_ONLY = ("augment", "label_sources", "mean", "std", "test_examples")
"""Settings of data that do not decide which training images there are."""
Data = str | Mapping[str, Any]
"""A data set: by its source's name, by the path of a folder or an ``.npz`` file, or with settings, such as
``{"source": "folder", "path": "flowers"}``."""


class CardChoice(DataChoice):
    """What a teacher card is made from."""

    card: CardConfig = CardConfig()
    """What it looks at, and how closely."""
    folds: FoldConfig | None = None
    """How networks are trained whose predictions of examples that they have not seen stand in for the true label
    distribution; null: none are."""


def run(
    study: str | Path | dict[str, Any],
    out: str | Path,
    *,
    pair: str | None = None,
    settings: Iterable[str] = (),
    data_root: str | Path | None = None,
    device: str = "auto",
    resume: bool = False,
    workers: int | None = None,
    networks: Mapping[str, Model] | None = None,
    on_event: OnEvent | None = None,
    on_download: Any = None,
) -> dict[str, Any]:
    """Run a whole study, or a series of them: train teachers, distil students, report.

    Args:
        study: a recipe's name, a YAML file, or a tree of settings; with ``vary`` in it, it is a series.
        out: the run's folder.
        pair: teacher and student, such as ``vgg13-vgg8``, where the recipe is a method's.
        settings: ``path.to.field=value``, laid over the study.
        networks: networks of your own, by the names that the study's ``model`` fields use.
        data_root: where data sets lie.
        device: ``auto``, ``cpu`` or ``cuda``.
        resume: go on in a folder that holds this run.
        workers: networks trained side by side; by default one a core on a CPU.
        on_event: called with each network's progress.
        on_download: called with a download's progress.

    Returns:
        What ``results.json`` holds.

    Raises:
        InputError: something in the settings, the data or the folder cannot be used.
    """
    config = read_plan(study, settings, pair)
    for one in (point.study for point in config.points()) if isinstance(config, SeriesConfig) else (config,):
        _check_modules(one, networks or {})
    start: Callable[..., dict[str, Any]] = run_series if isinstance(config, SeriesConfig) else run_study
    return start(
        config, Path(out), data_root=Path(data_root) if data_root else None, device=device,
        resume=resume, workers=workers, factories={name: _factory(model) for name, model in (networks or {}).items()},
        on_event=on_event, on_download=on_download,
    )  # fmt: skip


def teach(
    model: Model,
    data: Data,
    out: str | Path,
    *,
    method: str = "soteacher",
    start: str | Path | None = None,
    teacher: str | Path | None = None,
    seeds: Iterable[int] = (0,),
    terms: Mapping[str, Any] | None = None,
    training: Mapping[str, Any] | None = None,
    settings: Sequence[str] = (),
    **options: Any,
) -> dict[str, Any]:
    """Train one teacher: a study of its own, in ``out/teachers/METHOD/seed0``.

    A method that fine-tunes, such as ``mcmi``, goes on from ``start``, or else from a standard teacher that is trained
    first.

    Args:
        model: the network.
        data: the images.
        out: the run's folder.
        method: teacher method.
        start: trained network to go on from: a run folder, a network's folder or a ``model.safetensors``.
        teacher: trained network to learn from, likewise, for methods that distil: a teacher assistant.
        seeds: one teacher for each.
        terms: settings of the method's terms, such as ``{"sftn": {"student": "resnet8"}}``.
        training: settings of :class:`~soteacher.train.config.TrainingConfig`.
        settings: ``path.to.field=value``, laid over the study; those of ``training`` also over the method's.
        options: as in :func:`run`.

    Returns:
        What ``results.json`` holds.
    """
    name, networks = _named(model, "teacher_network")
    found = method_named(method)
    if found.fine_tunes and teacher is not None:
        raise InputError(f"{method} goes on from a trained network and learns from none: give start instead of teacher")
    if found.role == "teacher" and teacher is None and reads_teacher(found):
        raise InputError(f"{method} learns from a trained network: give teacher (--teacher)")
    shared, own = _shared_and_own(found, training or {}, settings)
    arm: dict[str, Any] = {"model": name, "method": method, "terms": dict(terms or {}), "training": own}
    teachers: dict[str, Any] = {}
    if start is not None:
        teachers["start_network"], arm["start"] = {"file": str(start), "model": name}, "start_network"
    elif found.fine_tunes:
        teachers["standard"], arm["start"] = {"model": name, "method": "standard"}, "standard"
    if teacher is not None:
        teachers["teacher_network"], arm["teacher"] = {"file": str(teacher)}, "teacher_network"
    given = start or teacher
    tree = {
        "name": "teach", "data": _data_tree(data) if given is None else _data_for(find_network(Path(given)), data),
        "seeds": list(seeds), "training": shared, "teachers": {**teachers, _arm(found.name): arm},
    }  # fmt: skip
    others = [setting for setting in settings if not setting.startswith("training.")]
    return run(tree, out, networks=networks, settings=others, **options)


def _shared_and_own(
    method: Method, training: Mapping[str, Any], settings: Iterable[str]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return how all networks are trained, and what of it must stand at the teacher's own ``training`` instead.

    What a method sets goes over a study's settings, so that what is asked for over the method must stand at its own.
    """
    asked = apply_settings({"training": dict(training)}, [one for one in settings if one.startswith("training.")])
    own = {key: value for key, value in asked["training"].items() if key in method.training}
    # A standard teacher that is trained first is trained as long; tables are the method's alone, which names them.
    shared = {key: value for key, value in asked["training"].items() if not isinstance(own.get(key), Mapping)}
    return shared, own


def distill(
    teacher: str | Path,
    model: Model,
    data: Data,
    out: str | Path,
    *,
    method: str = "kd",
    teacher_model: Model | None = None,
    seeds: Iterable[int] = (0,),
    training: Mapping[str, Any] | None = None,
    **options: Any,
) -> dict[str, Any]:
    """Distil a teacher that exists into a student: a study of its own, in ``out/students/teacher-METHOD/seed0``.

    Args:
        teacher: a run folder, a network's folder, a ``model.safetensors`` or a foreign checkpoint.
        model: the student's network.
        data: the images.
        out: the run's folder.
        method: distillation method.
        teacher_model: network of a foreign checkpoint, or one of your own.
        seeds: one student for each.
        training: settings of :class:`~soteacher.train.config.TrainingConfig`.
        options: as in :func:`run`.

    Returns:
        What ``results.json`` holds.
    """
    name, networks = _named(model, "student_network")
    arm = _arm(method_named(method).name)
    if not reads_teacher(method_named(method)):
        raise InputError(f"the method {method} does not read a teacher: it is no way to distil one")
    source: dict[str, Any] = {"file": str(teacher)}
    if teacher_model is not None:
        source["model"], more = _named(teacher_model, "teacher_network")
        networks |= more
    tree = {
        "name": "distill", "data": _data_for(find_network(Path(teacher)), data), "seeds": list(seeds),
        "training": dict(training or {}),
        "teachers": {"teacher": source}, "students": {arm: {"model": name, "method": method}},
    }  # fmt: skip
    return run(tree, out, networks=networks, **options)


def load(path: str | Path, *, model: nn.Module | NetworkFactory | None = None) -> Classifier:
    """Return a trained classifier: it takes images ``[B, C, H, W]`` in [0, 1] and gives logits ``[B, K]``.

    Args:
        path: a run folder with one student, or with one teacher and no student; a network's folder; or a
            ``model.safetensors``.
        model: the network, where it is one of your own.
    """
    weights = find_network(Path(path), TRAINED)
    if model is None:
        return load_classifier(weights)[0]
    spec = read_facts(weights)[0]
    classifier = classifier_of(_factory(model)(spec.num_classes, spec.in_channels), spec)
    load_weights(classifier.network, read_weights(weights), source=str(weights))
    return classifier.eval()


def evaluate(
    path: str | Path,
    data: Data,
    *,
    model: Model | None = None,
    split: str = "test",
    data_root: str | Path | None = None,
    device: str = "auto",
) -> dict[str, Any]:
    """Return accuracy, NLL, ECE and the bins of the reliability diagram of a network on a data set.

    Args:
        path: as in :func:`load`, or a foreign checkpoint.
        data: the images.
        model: network of a foreign checkpoint, or one of your own.
        split: ``test`` or ``train`` (without augmentation).
        data_root: where data sets lie.
        device: ``auto``, ``cpu`` or ``cuda``.
    """
    if split not in ("test", "train"):
        raise InputError(f"unknown split {split!r}; known: test, train")
    classifier, _, images = _network_and_data(path, data, model, data_root, device)
    device = pick_device(device)
    batches = evaluation_batches(images.test if split == "test" else images.train, device)
    return asdict(evaluate_classifier(classifier.to(device), batches))


def card(
    network: str | Path | nn.Module,
    data: Data,
    out: str | Path,
    *,
    model: Model | None = None,
    look: Mapping[str, Any] | None = None,
    folds: Mapping[str, Any] | None = None,
    settings: Iterable[str] = (),
    data_root: str | Path | None = None,
    device: str = "auto",
    on_fold: OnFold | None = None,
) -> dict[str, Any]:
    """Say how good a teacher a network is, before any student is trained: ``out/card.json`` and ``out/card.html``.

    A card that lies there already is replaced.

    Args:
        network: as in :func:`load`, a foreign checkpoint, or a module with its weights; one that is no
            :class:`~soteacher.models.classifier.Classifier` takes images normalised as the data say.
        data: the images, with what is known of their true label distribution. Where the network was trained on them,
            its own settings of them hold, unless others are given: ``train_examples`` above all, as its training images
            are those that it was trained on. Views are drawn with their ``augment``, by default the network's own.
        out: the card's folder.
        model: network of a foreign checkpoint, or one of your own.
        look: settings of :class:`~soteacher.diagnostics.card_config.CardConfig`.
        folds: settings of :class:`~soteacher.diagnostics.card_config.FoldConfig`: compare with out-of-fold predictions
            of networks that are trained for it, into ``out/out_of_fold``. Their network is the card's, where none is
            named.
        settings: ``path.to.field=value``, laid over ``data``, ``card`` (what ``look`` is) and ``folds``.
        data_root: where data sets lie.
        device: ``auto``, ``cpu`` or ``cuda``.
        on_fold: told of the progress of the networks trained for ``folds``.

    Returns:
        What ``card.json`` holds.

    Raises:
        InputError: the network emits no logits of the data's classes, a fold leaves a class out, or something in the
            settings, the data or the folder cannot be used.
        InterruptedRunError: Ctrl-C in the training for ``folds``; the same call goes on with it.
    """
    folder, weights = Path(out), None if isinstance(network, nn.Module) else find_network(Path(network), TRAINED)
    if folder.exists() and not folder.is_dir():
        raise InputError(f"{folder} cannot be a folder: a file is in its place; choose another with --out")
    tree = _card_tree(weights, model, data, look or {}, folds, settings)
    choice = parse(CardChoice, tree)
    if isinstance(network, nn.Module):
        images = read_data(tree["data"], data_root)
        classifier, spec = _as_classifier(network, images)
    else:
        classifier, spec, images = _network_and_data(network, tree["data"], model, data_root, device)
    device, proxy = pick_device(device), None
    if choice.folds is not None:
        factories = {} if model is None or isinstance(model, str) else {"network": _factory(model)}
        with stop_requested() as should_stop:
            proxy = out_of_fold_predictions(
                choice.folds, choice.data, images, folder, device=device, factories=factories, on_event=on_fold,
                should_stop=should_stop,
            )  # fmt: skip
    rows = _rows_trained_on(weights, choice.data, images)
    made = make_card(
        classifier, spec, replace(images, train=images.train.subset(rows)), choice.data.augment, choice.card,
        device=device, out_of_fold=None if proxy is None else proxy[rows],
    )  # fmt: skip
    made = in_the_whole_split(made, rows)
    write_card(folder, made)
    return made


def _rows_trained_on(weights: Path | None, source: SourceConfig, images: DataSet) -> Tensor:
    """Return the training images that a network was trained on: all, unless it is known to have held some out."""
    facts = {} if weights is None else _facts(weights)
    shares, used = facts.get("training") or {}, source.model_dump(mode="json")
    same = all(used[key] == facts.get("data", {}).get(key) for key in used if key not in MEASURED_ONLY)
    return split_rows(images, shares.get("held_out", 0.0) if same else 0.0, facts.get("seed", 0))[0]


def _card_tree(
    weights: Path | None,
    model: Model | None,
    data: Data,
    look: Mapping[str, Any],
    folds: Mapping[str, Any] | None,
    settings: Iterable[str],
) -> dict[str, Any]:
    """Return what a card is made from, with what the network's own settings say where nothing else is said."""
    own: dict[str, Any] = {} if weights is None else _trained_on(weights)
    given = _data_tree(data) if weights is None else _data_for(weights, data)
    if not _same_place(own, given):
        own = {key: value for key, value in own.items() if key == "augment"}
    tree: dict[str, Any] = {"data": own | given, "card": dict(look)}
    tree = apply_settings(tree | ({} if folds is None else {"folds": dict(folds)}), settings)
    if isinstance(tree.get("folds"), dict) and "model" not in tree["folds"]:
        if isinstance(model, str):
            tree["folds"]["model"] = model
        elif model is not None and not isinstance(model, nn.Module):
            tree["folds"]["model"] = "network"
        elif model is None and weights is not None and _facts(weights):
            tree["folds"]["model"] = read_facts(weights)[0].model
        else:  # the networks of folds must start from new weights: a module's may have seen all the examples
            raise InputError("folds train networks that start anew: name their model")
    return tree


def _same_place(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Return whether two settings of data mean the same images, up to how many of them are used."""
    paths = [Path(tree["path"]).expanduser().resolve() if "path" in tree else None for tree in (one, other)]
    return one.get("source") == other.get("source") and paths[0] == paths[1]


def _as_classifier(network: nn.Module, data: DataSet) -> tuple[Classifier, NetworkSpec]:
    """Return a module as a classifier for a data set, and what it is."""
    facts: dict[str, Any] = {"mean": data.mean, "std": data.std}
    bare = network.network if isinstance(network, Classifier) else network
    spec = NetworkSpec(
        model=type(bare).__name__, num_classes=data.num_classes, in_channels=data.in_channels,
        class_names=data.class_names, **facts,
    )  # fmt: skip
    return network if isinstance(network, Classifier) else Classifier(network, **facts), spec


def export(
    path: str | Path,
    data: Data,
    out: str | Path,
    *,
    form: Format = "onnx",
    model: Model | None = None,
    data_root: str | Path | None = None,
) -> float:
    """Write a network for deployment, checked against PyTorch on images of a data set.

    Args:
        path: as in :func:`load`, or a foreign checkpoint.
        data: real images for the check.
        out: the ONNX file, or the folder for ``safetensors``.
        form: ``onnx`` or ``safetensors``.
        model: network of a foreign checkpoint, or one of your own.
        data_root: where data sets lie.

    Returns:
        The largest difference of a logit from PyTorch's, relative to the largest logit.
    """
    classifier, network, images = _network_and_data(path, data, model, data_root, "cpu")
    batch = next(iter(evaluation_batches(images.test, "cpu")))
    return export_classifier(classifier, network, batch.images[:64], Path(out), form=form)


def _network_and_data(
    path: str | Path, data: Data, model: Model | None, data_root: str | Path | None, device: str
) -> tuple[Classifier, NetworkSpec, DataSet]:
    name, networks = (None, {}) if model is None else _named(model, "network")
    factories = {key: _factory(value) for key, value in networks.items()}
    weights = find_network(Path(path), TRAINED)
    source = {"file": str(weights), "model": name}
    study = read_study({"data": _data_for(weights, data), "teachers": {"teacher": source}})
    images = load_data(study.data, Path(data_root) if data_root else None)
    spec = study.teachers["teacher"]
    assert isinstance(spec, FileTeacher)
    return *load_teacher_file(Study(study, Path(), images, pick_device(device), factories), spec), images


def _data_for(weights: Path, data: Data) -> dict[str, Any]:
    """Return a data set's settings; images of a folder come in the size that the network was trained on."""
    tree, trained_on = _data_tree(data), _trained_on(weights)
    if tree.get("source") == "folder" and "image_size" in trained_on:
        return {"image_size": trained_on["image_size"], **tree}
    return tree


def _trained_on(weights: Path) -> dict[str, Any]:
    """Return the settings of the data that a network was trained on; empty where they are not known."""
    return _facts(weights).get("data", {})


def _facts(weights: Path) -> dict[str, Any]:
    """Return what is known of a network besides what builds it; empty of a foreign checkpoint."""
    return read_facts(weights)[1] if (weights.parent / FACTS_FILE).exists() else {}


def read_data(data: Data, data_root: str | Path | None = None, *, on_download: Any = None) -> DataSet:
    """Return a data set, fetched where it is not there yet."""
    choice = parse(DataChoice, {"data": _data_tree(data)})
    return load_data(choice.data, Path(data_root) if data_root else None, progress=on_download)


def _data_tree(data: Data) -> dict[str, Any]:
    """Return a data set's settings: of a source's name, or of the path of a folder or an ``.npz`` file."""
    if not isinstance(data, str):
        return dict(data)
    path = Path(data)
    if data in SOURCES:
        return {"source": data}
    if path.suffix == ".npz":
        return {"source": "npz", "path": data}
    return {"source": "folder", "path": data} if path.is_dir() or len(path.parts) > 1 else {"source": data}


def _arm(method: str) -> str:
    """Return an arm's name for a method's, which a plug-in may spell in its own way."""
    return re.sub(r"[^a-z0-9_.]", "_", method.lower())


def _named(model: Model, name: str) -> tuple[str, dict[str, Model]]:
    return (model, {}) if isinstance(model, str) else (name, {name: model})


def _check_modules(config: StudyConfig, networks: Mapping[str, Model]) -> None:
    """Refuse a module for several seeds: networks that all start from its weights would not be independent."""
    modules = {name for name, model in networks.items() if isinstance(model, nn.Module)}
    for spec in (*config.teachers.values(), *config.students.values()):
        if isinstance(spec, (TrainedTeacher, Student)) and spec.model in modules and len(config.seeds) > 1:
            raise InputError(
                f"{spec.model} is a module, and every one of {len(config.seeds)} seeds would start from its weights: "
                "give a function (num_classes, in_channels) -> module instead"
            )


def _factory(model: Model) -> NetworkFactory:
    if isinstance(model, nn.Module):
        return lambda num_classes, in_channels: deepcopy(model)  # noqa: ARG005 the module is what it is
    if isinstance(model, str) or not callable(model):
        raise InputError(f"a network of your own is a module or a function that makes one, got {model!r}")
    return model
