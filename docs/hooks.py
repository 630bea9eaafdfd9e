"""Pages that mkdocs makes from the code itself: methods, settings, command line. Nothing of them is kept in the tree.

mkdocs calls ``on_config`` and ``on_files``; the pages are in the navigation where ``mkdocs.yml`` or ``on_config`` names
them.
"""

from __future__ import annotations

import copy
import inspect
import types
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import torch
import typer
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from soteacher import functional
from soteacher.cli import app
from soteacher.config import FileTeacher, SavedTeacher, Student, StudyConfig, TrainedTeacher
from soteacher.data import SOURCES, AugmentConfig, SourceConfig
from soteacher.diagnostics.card_config import CardConfig, FoldConfig
from soteacher.errors import InputError
from soteacher.method_pages import describe_method, inline_markdown
from soteacher.mixing import MixingConfig
from soteacher.models.classifier import Classifier
from soteacher.models.inspection import inspect_network
from soteacher.models.takeover import take_over_classifier
from soteacher.models.zoo import build_network
from soteacher.objective import Method, ObjectiveConfig
from soteacher.objectives import METHODS, OBJECTIVES
from soteacher.recipes import recipe_names, recipe_text
from soteacher.series.config import Axis, SeriesConfig
from soteacher.settings import Settings
from soteacher.train.config import (
    AdamWConfig,
    ConstantConfig,
    CosineConfig,
    EMAConfig,
    MultiStepConfig,
    SGDConfig,
    SWAConfig,
    TrainingConfig,
)
from soteacher.types import Task

Command = Any  # typer carries click's classes inside it in some releases and takes them from click in others

SETTINGS: tuple[tuple[str, str, type[Settings]], ...] = (
    ("Study", "The top of the tree.", StudyConfig),
    ("data", "The settings that each source adds follow.", SourceConfig),
    *((f"data, source: {name}", "", source) for name, source in SOURCES.items()),
    ("data.augment", "", AugmentConfig),
    ("training", "Also below a teacher or a student, for what differs there.", TrainingConfig),
    ("training.optimizer, name: sgd", "", SGDConfig),
    ("training.optimizer, name: adamw", "", AdamWConfig),
    ("training.schedule, name: multistep", "", MultiStepConfig),
    ("training.schedule, name: cosine", "", CosineConfig),
    ("training.schedule, name: constant", "", ConstantConfig),
    ("training.averaging, name: swa", "", SWAConfig),
    ("training.averaging, name: ema", "", EMAConfig),
    ("training.mixing", "", MixingConfig),
    ("card", "", CardConfig),
    ("folds", "", FoldConfig),
    ("teachers.NAME: trained in the study", "Names are lower-case, with digits, `_` and `.`.", TrainedTeacher),
    ("teachers.NAME: an earlier state of another teacher", "", SavedTeacher),
    ("teachers.NAME: a file", "", FileTeacher),
    ("students.NAME", "Names are lower-case, with digits, `_` and `.`.", Student),
    ("terms.OBJECTIVE", "The settings that each objective adds follow.", ObjectiveConfig),
    ("A series", "The top of the tree of a [series of studies](../guide/series.md).", SeriesConfig),
    ("vary.AXIS", "", Axis),
    *((f"terms.{name}", "", config) for name, config in OBJECTIVES.items()),
)
"""Headline, remark and class of every table of the settings' page, in its order."""

CONSTRAINTS = {"ge": "at least", "gt": "above", "le": "at most", "lt": "below"}
NAMES = {str: "text", bool: "true or false", int: "whole number", float: "number", Path: "path", Any: "any"}


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Put a page for each method, and the measured results where there are any, into the navigation."""
    assert config.nav is not None
    pages: list[Any] = [{"Overview": "methods/index.md"}, *({name: f"methods/{name}.md"} for name in METHODS)]
    results = sorted(Path(config.docs_dir, "results").glob("*.md"), key=lambda path: (path.stem != "index", path.stem))
    for entry in config.nav:
        if "Methods" in entry:
            entry["Methods"] = pages
    if results:
        config.nav.append({"Results": [f"results/{path.name}" for path in results]})
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages that are made from the code."""
    pages = {f"methods/{name}.md": describe_method(name) for name in METHODS}
    pages["methods/index.md"] = methods_page()
    pages["reference/settings.md"] = settings_page()
    pages["reference/cli.md"] = cli_page()
    for path, content in pages.items():
        files.append(File.generated(config, path, content=content))
    return files


def on_page_markdown(markdown: str, **context: Any) -> str:
    """Put every recipe where a page has the mark for them."""
    del context
    recipes = "\n".join(f"### {name}\n\n```yaml\n{recipe_text(name)}```\n" for name in recipe_names())
    return markdown.replace("<!-- recipes -->", recipes).replace("<!-- functions -->", functions())


def functions() -> str:
    """Return the mark that mkdocstrings replaces with a function's documentation, for each pure function."""
    found = [getattr(functional, name) for name in functional.__all__]
    return "\n".join(
        f"::: {function.__module__}.{function.__name__}\n    options: {{heading_level: 3}}\n" for function in found
    )


KINDS: dict[str, tuple[str, str]] = {
    "CNNs of equal widths": ("wrn_16_1", "wrn_10_1"),
    "CNNs of two families": ("vgg8", "mobilenet_v2"),
    "ViT to CNN": ("timm/test_vit", "resnet8"),
    "CNN to ViT": ("resnet8", "timm/test_vit"),
}
"""Teacher and student that stand for each kind of pair."""


@cache
def kinds() -> dict[str, tuple[Classifier, Classifier]]:
    """Return untrained networks of each kind of pair: teacher and student."""
    return {kind: (_classifier(teacher), _classifier(student)) for kind, (teacher, student) in KINDS.items()}


def _classifier(name: str) -> Classifier:
    network = build_network(name, num_classes=10)
    size = 160 if name.startswith("timm/") else None
    return Classifier(network, mean=(0.5,) * 3, std=(0.5,) * 3, input_size=size).eval()


def works(method: Method, teacher: Classifier, student: Classifier) -> bool:
    """Return whether a distillation method can be built on a pair, by building it."""
    images = torch.rand(2, 3, 32, 32)
    student = copy.deepcopy(student)
    try:
        for term, settings in method.terms.items():
            config = OBJECTIVES[term].model_validate(settings)
            if (reuse := config.reuse()) is not None:
                take_over_classifier(student, teacher, images, reduction=reuse.reduction, names=("student", "teacher"))
            facts = [inspect_network(network, images, name="a network") for network in (student, teacher)]
            labels = torch.arange(20) % 10
            config.build(Task(num_examples=20, num_classes=10, labels=labels, network=facts[0], teacher=facts[1]))
    except InputError:
        return False
    return True


def methods_page() -> str:
    """Return the table of all methods, and that of the pairs on which those for students work."""
    lines = [
        "# Methods", "",
        "A method is a named training loss: terms with their settings. `soteacher methods list` prints this table and "
        "`soteacher methods show kd` a method's page. How students' methods are used: "
        "[Distillation methods](../guide/distillation.md). [Adding one](../guide/adding-a-method.md) takes one file.",
        "",
        "| method | for | venue | what it does |", "|---|---|---|---|",
    ]  # fmt: skip
    for name, method in METHODS.items():
        lines.append(f"| [{name}]({name}.md) | {method.role} | {method.venue or '-'} | {method.title}. |")
    lines += [
        "", "## Which method works between which networks", "",
        "Found by building each on a teacher and a student of the kind with the method's own taps: "
        + "; ".join(f"{kind}: {teacher} to {student}" for kind, (teacher, student) in KINDS.items())
        + ". Where it says no, the study ends in one line that says why and what can be done.",
        "", f"| method | {' | '.join(KINDS)} |", f"|---{'|---' * len(KINDS)}|",
    ]  # fmt: skip
    for name, method in METHODS.items():
        if any(OBJECTIVES[term].needs_teacher for term in method.terms):
            answers = ("yes" if works(method, *pair) else "no" for pair in kinds().values())
            lines.append(f"| [{name}]({name}.md) | {' | '.join(answers)} |")
    return "\n".join(lines) + "\n"


def settings_page() -> str:
    """Return a table for each class of settings."""
    lines = [
        "# Settings of a study", "",
        "Made from the code that reads them. A study is one YAML tree; unknown keys, wrong types and impossible values "
        "end in one line that says what came and what was wanted. See [Studies and recipes](../guide/studies.md).", "",
    ]  # fmt: skip
    for headline, remark, model in SETTINGS:
        about = "" if inspect.isabstract(model) else inline_markdown(inspect.getdoc(model) or "")
        lines += [f"## {headline}", "", about, "", remark, ""]
        rows = list(_setting_rows(model, inherited=_parents_fields(model)))
        lines += ["| setting | type | default | meaning |", "|---|---|---|---|", *rows, ""] if rows else []
    return "\n".join(lines)


def _parents_fields(model: type[BaseModel]) -> dict[str, FieldInfo]:
    """Return the fields of the class that others share, which has a table of its own."""
    shared = [parent for parent in (SourceConfig, ObjectiveConfig) if parent in model.__mro__[1:]]
    return dict(shared[0].model_fields) if shared else {}


def _setting_rows(model: type[BaseModel], inherited: dict[str, FieldInfo]) -> Iterator[str]:
    for name, field in model.model_fields.items():
        other = inherited.get(name)
        same = other is not None and (other.default, other.description) == (field.default, field.description)
        if same or name == "source":
            continue
        kind = type_text(field.annotation, field.metadata)
        meaning = inline_markdown(field.description or "").replace("\n", " ")
        cells = (f"`{field.alias or name}`", kind, default_text(field), meaning)
        yield f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"


def default_text(field: FieldInfo) -> str:
    """Return a field's default as YAML would have it."""
    if field.is_required():
        return "needed"
    value: Any = field.get_default(call_default_factory=True)
    if value is None:
        return "none"
    if isinstance(value, BaseModel):
        name = getattr(value, "name", None)
        return f"`{name}`" if name else "its defaults"
    if isinstance(value, bool):
        return f"`{str(value).lower()}`"
    if isinstance(value, tuple | list):
        return f"`[{', '.join(map(str, value))}]`"
    return "empty" if value in ("", {}) else f"`{value}`"


def type_text(annotation: Any, metadata: Sequence[Any] = ()) -> str:
    """Return a type with its limits in words."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    limits = [f"{word} {getattr(item, key):g}" for item in metadata for key, word in CONSTRAINTS.items()
              if getattr(item, key, None) is not None]  # fmt: skip
    if origin is Annotated:
        inner = [part for item in arguments[1:] for part in (item.metadata if isinstance(item, FieldInfo) else [item])]
        return type_text(arguments[0], [*inner, *metadata])
    if origin is Literal:
        text = ", ".join(f"`{value}`" for value in arguments)
    elif origin in (Union, types.UnionType):
        text = " or ".join(dict.fromkeys(type_text(part) for part in arguments if part is not type(None)))
    elif origin is tuple:
        text = f"list of {type_text(arguments[0])}"
    elif origin is dict:
        text = "table by name"
    elif isinstance(annotation, type) and issubclass(annotation, BaseModel):
        text = "table"
    else:
        text = NAMES[annotation]
    return f"{text}, {', '.join(limits)}" if limits else text


def cli_page() -> str:
    """Return every command with its arguments and options."""
    lines = [
        "# Command line", "",
        "Made from the command line itself. Bad input ends in one line on standard error and exit status 2; Ctrl-C "
        "and SIGTERM save the state and end with 130; a worker process that was killed ends the run with 1.", "",
    ]  # fmt: skip
    for words, command in commands(typer.main.get_command(app), ("soteacher",)):
        with command.make_context(" ".join(words), [], resilient_parsing=True) as context:
            usage = " ".join([" ".join(words), *command.collect_usage_pieces(context)])
            records = [record for parameter in command.params if (record := parameter.get_help_record(context))]
        lines += [f"## {' '.join(words)}", "", (command.help or "").strip(), "", "```text", usage, "```", ""]
        if records:
            lines += ["| argument or option | meaning |", "|---|---|"]
            lines += [f"| `{name}` | {text.replace('|', chr(92) + '|')} |" for name, text in records] + [""]
    return "\n".join(lines)


def commands(command: Command, words: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], Command]]:
    """Yield every command that does something, with the words that call it."""
    below: dict[str, Command] = getattr(command, "commands", {})
    if not below:
        yield words, command
    for name, inner in below.items():
        yield from commands(inner, (*words, name))
