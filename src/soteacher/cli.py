"""The command line: words to settings, settings to a study, progress to the terminal.

Nothing heavy is imported before a command is known, so that ``soteacher --help`` answers at once.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from enum import Enum
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

from soteacher.errors import InputError, InterruptedRunError, WorkerDiedError
from soteacher.files import unwritable

UsageError: Any = typer.BadParameter.__mro__[1]
"""What typer raises for words that are no command line of ours; releases of typer differ in the module it is in."""

app = typer.Typer(
    help="Train teachers that teach: student-oriented teachers, knowledge distillation, honest statistics.",
    add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None,
)  # fmt: skip
recipes_app = typer.Typer(
    help="Studies by name: whole ones, and methods on a pair of networks.", invoke_without_command=True
)
methods_app = typer.Typer(help="Teacher and distillation methods.", invoke_without_command=True)
data_app = typer.Typer(help="Data sets.", invoke_without_command=True)
app.add_typer(recipes_app, name="recipes")
app.add_typer(methods_app, name="methods")
app.add_typer(data_app, name="data")


class Device(str, Enum):
    """Where networks are trained."""

    auto = "auto"
    cpu = "cpu"
    cuda = "cuda"


class Form(str, Enum):
    """What ``export`` writes."""

    onnx = "onnx"
    safetensors = "safetensors"


Out = Annotated[Path, typer.Option("--out", help="The run's folder.")]
Pair = Annotated[str | None, typer.Option("--pair", help="For a method's recipe: TEACHER-STUDENT, e.g. vgg13-vgg8.")]
Set = Annotated[
    list[str] | None, typer.Option("--set", metavar="PATH=VALUE", help="Change one setting, e.g. training.epochs=30.")
]
Where = Annotated[Device, typer.Option("--device", help="Where to train.")]
Resume = Annotated[bool, typer.Option("--resume", help="Go on in a folder that holds this run.")]
Workers = Annotated[int | None, typer.Option("--workers", min=1, help="Networks side by side; default: one a core.")]
Root = Annotated[Path | None, typer.Option("--data-root", help="Where data sets lie; default: $SOTEACHER_DATA.")]
Data = Annotated[str, typer.Option("--data", help="A source (see 'soteacher data list'), or a folder or .npz file.")]
Seeds = Annotated[int, typer.Option("--seeds", min=1, help="How many seeds, from 0.")]
Epochs = Annotated[int | None, typer.Option("--epochs", help="Passes over the training set.")]
ForeignModel = Annotated[str | None, typer.Option("--teacher-model", help="Network of a foreign checkpoint.")]


def main() -> None:
    """Run the command line. Bad input ends in one line on standard error and exit status 2, a stopped run in 130."""
    try:
        status = app(prog_name="soteacher", standalone_mode=False)
        if status == 130:  # Ctrl-C: some releases of typer turn it into this
            raise KeyboardInterrupt
    except UsageError as error:
        context = error.ctx
        _fail(error.format_message().rstrip(".") + (f"; see '{context.command_path} --help'" if context else ""))
    except InputError as error:
        _fail(str(error))
    except WorkerDiedError as error:
        _fail(str(error), status=1)
    except InterruptedRunError as error:
        _fail(str(error), status=130)
    except (KeyboardInterrupt, typer.Abort):
        _fail("stopped", status=130)
    except OSError as error:
        message = unwritable(error)
        if message is None:
            raise
        _fail(message)
    sys.exit(status)


def _fail(message: str, *, status: int = 2) -> NoReturn:
    print(f"soteacher: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(status)


@app.callback(invoke_without_command=True)
def start(
    context: typer.Context,
    show_version: Annotated[bool, typer.Option("--version", help="Print the version and leave.")] = False,
) -> None:
    """Train teachers that teach: student-oriented teachers, knowledge distillation, honest statistics."""
    if show_version:
        from soteacher import __version__

        typer.echo(__version__)
        raise typer.Exit
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())


@app.command()
def run(
    study: Annotated[str, typer.Argument(help="A recipe's name (a whole study, or a method) or a YAML file.")],
    out: Out,
    pair: Pair = None,
    settings: Set = None,
    device: Where = Device.auto,
    resume: Resume = False,
    workers: Workers = None,
    data_root: Root = None,
) -> None:
    """Run a whole study, or a series of them: train teachers, distil students, report."""
    from soteacher import api

    _study(
        out,
        lambda **shared: api.run(study, out, pair=pair, settings=settings or (), **shared),
        device=device, resume=resume, workers=workers, data_root=data_root,
    )  # fmt: skip


@app.command()
def teach(
    model: Annotated[str, typer.Option("--model", help="The teacher's network.")],
    data: Data,
    out: Out,
    method: Annotated[str, typer.Option("--method", help="Teacher method.")] = "soteacher",
    start: Annotated[
        Path | None,
        typer.Option(
            "--start",
            help="Trained network to go on from; mcmi trains a standard teacher first without it.",
        ),
    ] = None,
    teacher: Annotated[Path | None, typer.Option("--teacher", help="Trained network to learn from.")] = None,
    student: Annotated[str | None, typer.Option("--student", help="Student's network, for sftn.")] = None,
    epochs: Epochs = None,
    seeds: Seeds = 1,
    settings: Set = None,
    device: Where = Device.auto,
    resume: Resume = False,
    workers: Workers = None,
    data_root: Root = None,
) -> None:
    """Train a teacher for its students."""
    from soteacher import api
    from soteacher.objectives import method as method_named

    if student is not None and "sftn" not in method_named(method).terms:
        raise InputError(f"--student names the network that sftn's branches are of, and {method} has no such term")

    _study(
        out,
        lambda **shared: api.teach(
            model, data, out, method=method, start=start, teacher=teacher, seeds=range(seeds),
            terms={} if student is None else {"sftn": {"student": student}}, training=_training(epochs),
            settings=settings or (), **shared,
        ),
        device=device, resume=resume, workers=workers, data_root=data_root,
    )  # fmt: skip


@app.command()
def distill(
    teacher: Annotated[Path, typer.Option("--teacher", help="A run folder, a model.safetensors or a checkpoint.")],
    model: Annotated[str, typer.Option("--model", help="The student's network.")],
    data: Data,
    out: Out,
    method: Annotated[str, typer.Option("--method", help="Distillation method.")] = "kd",
    teacher_model: ForeignModel = None,
    epochs: Epochs = None,
    seeds: Seeds = 1,
    settings: Set = None,
    device: Where = Device.auto,
    resume: Resume = False,
    workers: Workers = None,
    data_root: Root = None,
) -> None:
    """Distil a teacher that exists into a student."""
    from soteacher import api

    _study(
        out,
        lambda **shared: api.distill(
            teacher, model, data, out, method=method, teacher_model=teacher_model, seeds=range(seeds),
            training=_training(epochs), settings=settings or (), **shared,
        ),
        device=device, resume=resume, workers=workers, data_root=data_root,
    )  # fmt: skip


@app.command()
def evaluate(
    network: Annotated[Path, typer.Argument(help="A run folder, a model.safetensors or a checkpoint.")],
    data: Data,
    model: Annotated[str | None, typer.Option("--model", help="Network of a foreign checkpoint.")] = None,
    split: Annotated[str, typer.Option("--split", help="test or train.")] = "test",
    device: Where = Device.auto,
    data_root: Root = None,
) -> None:
    """Print accuracy, negative log-likelihood and calibration error of a network."""
    from soteacher import api

    figures = api.evaluate(network, data, model=model, split=split, data_root=data_root, device=device.value)
    typer.echo(f"accuracy  {100 * figures['accuracy']:.2f} %")
    typer.echo(f"nll       {figures['nll']:.4f} nats")
    typer.echo(f"ece       {figures['ece']:.4f}")


@app.command()
def card(
    network: Annotated[Path, typer.Argument(help="A run folder, a model.safetensors or a checkpoint.")],
    data: Data,
    out: Annotated[Path, typer.Option("--out", help="The card's folder.")],
    model: Annotated[str | None, typer.Option("--model", help="Network of a foreign checkpoint.")] = None,
    examples: Annotated[int | None, typer.Option("--examples", help="Images of each split; default: 2000.")] = None,
    views: Annotated[int | None, typer.Option("--views", help="Augmented views of each; default: 6.")] = None,
    folds: Annotated[
        int | None, typer.Option("--folds", help="Train networks on so many folds, for out-of-fold predictions.")
    ] = None,
    fold_model: Annotated[str | None, typer.Option("--fold-model", help="Their network; default: the same.")] = None,
    fold_epochs: Annotated[int | None, typer.Option("--fold-epochs", help="Their passes; default: 30.")] = None,
    fold_repeats: Annotated[int | None, typer.Option("--fold-repeats", help="Networks a fold; default: 3.")] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="PATH=VALUE", help="Change one setting, e.g. data.label_sources=[cifar10h]."),
    ] = None,
    device: Where = Device.auto,
    data_root: Root = None,
) -> None:
    """Say how good a teacher a network is, before any student is trained."""
    from soteacher import api

    of_folds = _given(folds=folds, model=fold_model, epochs=fold_epochs, repeats=fold_repeats)
    if of_folds and folds is None:
        raise InputError("--fold-model, --fold-epochs and --fold-repeats are about folds; give --folds too")
    try:
        made = api.card(
            network, data, out, model=model, look=_given(examples=examples, views=views), folds=of_folds or None,
            settings=settings or (), data_root=data_root, device=device.value, on_fold=_tell_fold,
        )  # fmt: skip
    except InterruptedRunError as error:
        raise InterruptedRunError(f"{error}; go on with the same command") from None
    _print_card(made, out)


def _given(**options: Any) -> dict[str, Any]:
    """Return the options that were given."""
    return {name: value for name, value in options.items() if value is not None}


def _tell_fold(fold: int, job: Any, event: dict[str, Any]) -> None:
    if event["event"] == "finished":
        row = event["row"]
        typer.echo(
            f"network without fold {fold + 1}, seed {job.seed}: accuracy {100 * row['accuracy_last']:.2f} % on the "
            f"fold, {row['train_seconds']:.0f} s"
        )


def _print_card(made: dict[str, Any], out: Path) -> None:
    """Print a teacher card's main figures, what they cost, and where everything lies."""
    from soteacher.report.card_page import CARD_FILE, PAGE_FILE
    from soteacher.report.card_tables import (
        cost_sentence,
        distance_table,
        prediction_table,
        seconds_table,
        single_table,
    )

    for table in (prediction_table(made), distance_table(made), single_table(made)):
        if table.rows:
            _list([row[:-1] for row in (table.columns, *table.rows)])  # the last one says what it is, for the page
            typer.echo("")
    _list(seconds_table(made).rows)
    typer.echo(cost_sentence(made))
    for note in made["notes"]:
        typer.echo(f"note: {note}")
    typer.echo(f"card: {out / CARD_FILE}")
    typer.echo(f"page: {out / PAGE_FILE}")


@app.command()
def export(
    network: Annotated[Path, typer.Argument(help="A run folder, a model.safetensors or a checkpoint.")],
    data: Data,
    out: Annotated[Path, typer.Option("--out", help="The .onnx file, or the folder for safetensors.")],
    form: Annotated[Form, typer.Option("--format", help="What to write.")] = Form.onnx,
    model: Annotated[str | None, typer.Option("--model", help="Network of a foreign checkpoint.")] = None,
    data_root: Root = None,
) -> None:
    """Write a network for deployment, checked against PyTorch on real images."""
    from soteacher import api

    difference = api.export(network, data, out, form=form.value, model=model, data_root=data_root)
    typer.echo(f"{out}: agrees with PyTorch to {difference:.1e} of the largest logit on images of the test set")


@app.command()
def report(run_folder: Annotated[Path, typer.Argument(help="The run's folder.")]) -> None:
    """Write results.json and the page of a run or a series anew, from the networks that are finished."""
    from soteacher.series import report_again

    _print_results(report_again(run_folder), run_folder)


@app.command()
def models() -> None:
    """List the networks."""
    from soteacher.models.zoo import network_names

    for name in network_names():
        typer.echo(name)
    typer.echo("wrn_DEPTH_WIDTH, resnetDEPTH and resnetDEPTHx4 of other sizes; timm/NAME: every classifier of timm")


@recipes_app.callback()
def recipes(context: typer.Context) -> None:
    """List them, where no other command is named."""
    if context.invoked_subcommand is None:
        list_recipes()


@recipes_app.command("list")
def list_recipes() -> None:
    """List the recipes: whole studies, then methods with their published settings, then their pairs of networks."""
    from soteacher.published_settings import method_recipe_names, pair_names
    from soteacher.recipes import recipe_description, recipe_names

    _list([(name, recipe_description(name)) for name in (*recipe_names(), *method_recipe_names())])
    typer.echo(f"--pair, for a method: {', '.join(pair_names())}")


@recipes_app.command("show")
def show_recipe(name: Annotated[str, typer.Argument(help="The recipe's name.")], pair: Pair = None) -> None:
    """Print a recipe's study, to be edited and run as a file."""
    from soteacher.recipes import recipe_text

    typer.echo(recipe_text(name, pair), nl=False)


@methods_app.callback()
def methods(context: typer.Context) -> None:
    """List them, where no other command is named."""
    if context.invoked_subcommand is None:
        list_methods()


@methods_app.command("list")
def list_methods() -> None:
    """List the methods."""
    from soteacher.objectives import methods

    _list([(method.name, method.role, method.venue or "-", method.title) for method in methods().values()])


@methods_app.command("show")
def show_method(name: Annotated[str, typer.Argument(help="The method's name.")]) -> None:
    """Print a method's terms, their formulas and settings."""
    from soteacher.method_pages import describe_method

    typer.echo(describe_method(name))


@data_app.callback()
def data(context: typer.Context) -> None:
    """List them, where no other command is named."""
    if context.invoked_subcommand is None:
        list_data()


@data_app.command("list")
def list_data() -> None:
    """List the data sources."""
    from soteacher.data import SOURCES

    _list([(name, (source.__doc__ or "").strip().splitlines()[0]) for name, source in SOURCES.items()])


@data_app.command("fetch")
def fetch_data(
    source: Annotated[str, typer.Argument(help="A source, or a folder or .npz file.")], data_root: Root = None
) -> None:
    """Fetch a data set where it is not there yet, check it, and say what is in it."""
    from soteacher.api import read_data
    from soteacher.terminal import DownloadBar

    with DownloadBar() as bar:
        images = read_data(source, data_root, on_download=bar)
    typer.echo(
        f"{images.name}: {images.train.num_examples} training and {images.test.num_examples} test images, "
        f"{images.image_size} x {images.image_size} x {images.in_channels}, {images.num_classes} classes"
    )


def _study(
    out: Path, start: Callable[..., dict[str, Any]], *, device: Device, resume: bool, workers: int | None,
    data_root: Path | None,
) -> None:  # fmt: skip
    """Run a study under a progress display and print what came out."""
    from soteacher.terminal import DownloadBar, ProgressDisplay

    try:
        with DownloadBar() as bar, ProgressDisplay(out) as display:
            results = start(
                device=device.value, resume=resume, workers=workers, data_root=data_root, on_event=display,
                on_download=bar,
            )  # fmt: skip
    except InterruptedRunError:
        raise InterruptedRunError(
            f"stopped; the state is saved. Go on with the same command and --resume: {out}"
        ) from None
    _print_results(results, out)


def _print_results(results: dict[str, Any], out: Path) -> None:
    from soteacher.terminal import print_results

    print_results(results, out)


def _training(epochs: int | None) -> dict[str, Any]:
    return {} if epochs is None else {"epochs": epochs}


def _list(rows: Sequence[tuple[str, ...]]) -> None:
    """Print rows of words below one another."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]) - 1)]
    for row in rows:
        cells = [cell.ljust(width) for cell, width in zip(row, widths, strict=False)]
        typer.echo("  ".join([*cells, row[-1]]))
