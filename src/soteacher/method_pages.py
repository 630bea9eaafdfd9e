"""A method in words, from the places where it is defined: the command line and the documentation show the same text."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, cast

from soteacher.objective import Method, Objective, ObjectiveConfig
from soteacher.objectives import method, objective_config, reads_teacher
from soteacher.objectives.features import FeatureConfig
from soteacher.published_settings import method_recipe_names

PAIR = "vgg13-vgg8"
TAPS: dict[str, str] = {
    "stages": "all stages, those of student and teacher paired from the deepest back",
    "second_stage": "the student's `stage2` and the stage that stands beside it, counted from the deepest back",
    "last_stage": "the last stage",
    "preactivations": "the preactivations of all stages, of networks that have them, paired from the deepest back",
    "maps": "`maps`, which the last pooling averages; of a network without them the last stage",
    "pooled": "`pooled`, which the classifier takes in",
}
"""What ``FeatureConfig.default_taps`` means, in words."""


def describe_method(name: str) -> str:
    """Return a method's page in Markdown: what it does, its loss, and each term's formula, settings and source.

    Raises:
        InputError: no method has that name.
    """
    found = method(name)
    configs = {term: objective_config(term)(**settings) for term, settings in found.terms.items()}
    venue = f", {found.venue}" if found.venue else ""
    lines = [
        f"# {found.name}", "", f"{found.title}.", "", f"A {found.role}'s method{venue}. Source: {found.source}.", "",
        *_losses(configs), *_training(found), *_use(found), "",
    ]  # fmt: skip
    if name in method_recipe_names():
        shown = f"`soteacher recipes show {name} --pair {PAIR}`"
        lines += [f"Published settings for the standard pairs, where they are others than these: {shown}.", ""]
    if found.differs:
        lines += ["## What we do differently", "", inline_markdown(found.differs), ""]
    own_first = sorted(configs.items(), key=lambda item: (item[0] != found.name, item[0] == "cross_entropy"))
    for term, config in own_first:
        lines += _describe_term(term, config, found.terms[term])
    return "\n".join(lines).rstrip() + "\n"


def _losses(configs: Mapping[str, ObjectiveConfig]) -> Iterator[str]:
    """Yield the sum of each stage's terms."""
    for stage, words in (
        ("preparation", "Preparation, a stage of its own before the training: loss"),
        ("training", "Loss"),
    ):
        terms = {name: config for name, config in configs.items() if config.stage == stage}
        if terms:
            yield f"{words} = " + " + ".join(
                f"{config.weight:g} `{term}`{_ramp(config)}" for term, config in terms.items()
            )
            yield ""


def _training(found: Method) -> Iterator[str]:
    """Yield what the method changes in how the network is trained."""
    if found.training:
        changes = ", ".join(f"`{path}` {_written(value)}" for path, value in _flat(found.training))
        yield from (f"Training differs: {changes}.", "")


def _written(value: Any) -> str:
    """Return a setting's value as a page shows it."""
    if isinstance(value, (list, tuple)):
        return ", ".join(map(_written, cast("Sequence[Any]", value)))
    return f"{value:.4g}" if isinstance(value, (int, float)) and not isinstance(value, bool) else str(value).lower()


def _flat(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from _flat(cast("Mapping[str, Any]", value), f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _ramp(config: ObjectiveConfig) -> str:
    notes = [*([] if config.ramp == "constant" else [f"{config.ramp} ramp"])]
    notes += ["standardised logits"] if config.standardize else []
    return f" ({', '.join(notes)})" if notes else ""


def _use(found: Method) -> list[str]:
    """Return how a study asks for the method, as a fenced block."""
    model = "wrn_40_2" if found.role == "teacher" else "wrn_16_2"
    other = ", start: standard" if found.fine_tunes else ""
    other += ", teacher: standard" if found.role == "teacher" and reads_teacher(found) else ""
    other += ", terms: {sftn: {student: wrn_16_2}}" if "sftn" in found.terms else ""
    first = [f"  standard: {{model: {model}, method: standard}}"] if ": standard" in other else []
    own = f"  {found.name}: {{model: {model}, method: {found.name}{other}}}"
    return ["```yaml", f"{found.role}s:", *first, own, "```"]


def _describe_term(name: str, config: ObjectiveConfig, settings: dict[str, Any]) -> Iterator[str]:
    """Yield the lines of one term: what it is for, its functions' documentation and a table of its settings."""
    yield from (f"## {name}", "")
    module = type(config).__module__
    own = [value for value in vars(inspect.getmodule(type(config))).values() if _is_public_of(module, value)]
    for value in own:
        if inspect.isclass(value) and issubclass(value, Objective):
            yield from (markdown(inspect.getdoc(value) or ""), "", *_inputs(config, value))
    for value in own:
        if inspect.isfunction(value):
            yield from (f"### `{value.__name__}`", "", markdown(inspect.getdoc(value) or ""), "")
    rows = [("setting", "in this method", "default", "meaning")]
    for field_name, field in type(config).model_fields.items():
        here = str(getattr(config, field_name)) if field_name in settings else ""
        default = "(needed)" if field.is_required() else str(field.get_default(call_default_factory=True))
        rows.append((f"`{field_name}`", here, default, markdown(field.description or "").replace("|", r"\|")))
    yield from (*_table(rows), "")


def _inputs(config: ObjectiveConfig, objective: type[Objective[Any]]) -> Iterator[str]:
    """Yield what an objective reads besides logits and labels: features, further views."""
    taps = TAPS[config.default_taps] if isinstance(config, FeatureConfig) else config.reads
    if taps:
        yield from (f"Taps: {taps}. See [Networks and taps](../guide/networks.md).", "")
    if objective.views:
        names = ", ".join(f"`{view}`" for view in objective.views)
        yield from (f"Further views of each image: {names}.", "")


def _is_public_of(module: str, value: Any) -> bool:
    """Say whether a class or function is public and defined in a module, not imported into it."""
    named = inspect.isclass(value) or inspect.isfunction(value)
    return named and value.__module__ == module and not value.__name__.startswith("_")


def _table(rows: Sequence[Sequence[str]]) -> Iterator[str]:
    """Yield the lines of a Markdown table whose columns stand below one another in a terminal too; row 0 heads it."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]) - 1)]
    for number, row in enumerate(rows):
        cells = [cell.ljust(width) for cell, width in zip(row, widths, strict=False)]
        yield f"| {' | '.join([*cells, row[-1]])} |"
        if number == 0:
            yield f"|{'|'.join(['-' * (width + 2) for width in widths] + ['---'])}|"


def markdown(docstring: str) -> str:
    """Return a docstring as Markdown: see :func:`inline_markdown`; arguments and errors become lists."""
    text = re.sub(
        r"^(Args|Raises):\n((?:[ \t]+\S[^\n]*(?:\n|$)|\n(?=[ \t]))+)", _entries, docstring, flags=re.MULTILINE
    )
    text = re.sub(r"^(Args|Returns|Raises|Source):\s*", r"**\1.** ", text, flags=re.MULTILINE)
    return inline_markdown(text).rstrip()


def inline_markdown(docstring: str) -> str:
    """Return a docstring with its mathematics as ``$...$`` and ``$$...$$`` and its roles and literals as code."""
    text = re.sub(r"^(\s*)\.\. math::[ \t]*(\S[^\n]*)$", r"\1$$ \2 $$", docstring, flags=re.MULTILINE)
    text = re.sub(r"^\s*\.\. math::\s*\n\n?((?:[ \t]+\S[^\n]*\n?)+)", _block, text, flags=re.MULTILINE)
    text = re.sub(r":math:`([^`]*)`", r"$\1$", text)
    text = re.sub(r":\w+:`~?([^`]*)`", lambda match: f"`{match[1].split('.')[-1]}`", text)
    return text.replace("``", "`")


def _entries(match: re.Match[str]) -> str:
    """Return a section of ``name: text`` entries, each with its continuation lines, as a list."""
    entries: list[str] = []
    indent = len(match[2]) - len(match[2].lstrip())
    for line in match[2].splitlines():
        text = line.strip()
        if line[:indent].isspace() and line[indent : indent + 1].strip():
            name, colon, meaning = text.partition(":")
            entries.append(f"- `{name}`:{meaning}" if colon else f"- {text}")
        elif text:
            entries[-1] += f"\n  {text}"
    return f"**{match[1]}.**\n\n" + "\n".join(entries) + "\n"


def _block(match: re.Match[str]) -> str:
    inner = " ".join(line.strip() for line in match[1].strip().splitlines())
    return f"\n$$ {inner} $$\n"
