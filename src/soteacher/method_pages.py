"""A method in words, from the places where it is defined: the command line and the documentation show the same text."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from typing import Any

from soteacher.objective import ObjectiveConfig
from soteacher.objectives import method, objective_config


def describe_method(name: str) -> str:
    """Return a method's page in Markdown: what it does, its loss, and each term's formula, settings and source.

    Raises:
        InputError: no method has that name.
    """
    found = method(name)
    configs = {term: objective_config(term)(**settings) for term, settings in found.terms.items()}
    loss = " + ".join(f"{config.weight:g} `{term}`{_ramp(config)}" for term, config in configs.items())
    lines = [
        f"# {found.name}", "", f"{found.title}.", "", f"A {found.role}'s method. Source: {found.source}.", "",
        f"Loss = {loss}", "",
    ]  # fmt: skip
    for term, config in configs.items():
        lines += _describe_term(term, config, found.terms[term])
    return "\n".join(lines).rstrip() + "\n"


def _ramp(config: ObjectiveConfig) -> str:
    return "" if config.ramp == "constant" else f" ({config.ramp} ramp)"


def _describe_term(name: str, config: ObjectiveConfig, settings: dict[str, Any]) -> Iterator[str]:
    """Yield the lines of one term: its functions' documentation and a table of its settings."""
    yield from (f"## {name}", "")
    module = inspect.getmodule(type(config))
    for function_name, function in vars(module).items():
        ours = inspect.isfunction(function) and function.__module__ == type(config).__module__
        if ours and not function_name.startswith("_"):
            yield from (f"### `{function_name}`", "", markdown(inspect.getdoc(function) or ""), "")
    yield from ("| setting | in this method | default | meaning |", "|---|---|---|---|")
    for field_name, field in type(config).model_fields.items():
        here = getattr(config, field_name) if field_name in settings else ""
        yield f"| `{field_name}` | {here} | {field.default} | {markdown(field.description or '')} |"
    yield ""


def markdown(docstring: str) -> str:
    """Return a docstring with its mathematics and roles as Markdown: ``$...$``, ``$$...$$`` and plain code."""
    text = re.sub(r"^(\s*)\.\. math::[ \t]*(\S[^\n]*)$", r"\1$$ \2 $$", docstring, flags=re.MULTILINE)
    text = re.sub(r"^\s*\.\. math::\s*\n\n?((?:[ \t]+\S[^\n]*\n?)+)", _block, text, flags=re.MULTILINE)
    text = re.sub(r":math:`([^`]*)`", r"$\1$", text)
    text = re.sub(r":\w+:`~?([^`]*)`", lambda match: f"`{match[1].split('.')[-1]}`", text)
    text = text.replace("``", "`")
    return re.sub(r"^(Args|Returns|Raises|Source):[ \t]*", r"**\1.** ", text, flags=re.MULTILINE)


def _block(match: re.Match[str]) -> str:
    inner = " ".join(line.strip() for line in match[1].strip().splitlines())
    return f"\n$$ {inner} $$\n"
