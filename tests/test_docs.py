"""What the documentation shows is so: examples run, links lead somewhere, names exist, the site builds."""

from __future__ import annotations

import re
import runpy
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import typer

import soteacher
from soteacher import functional
from soteacher.cli import app
from soteacher.config import FileTeacher, StudyConfig
from soteacher.data import SOURCES
from soteacher.method_pages import describe_method
from soteacher.models.zoo import network_names
from soteacher.objectives import METHODS, OBJECTIVES
from soteacher.recipes import read_study, recipe_names, recipe_text
from soteacher.series import SeriesConfig, read_plan
from soteacher.settings import read_tree

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
GENERATED = {
    "methods/index.md",
    *(f"methods/{name}.md" for name in METHODS),
    "reference/settings.md",
    "reference/cli.md",
}
FENCE = re.compile(r"^```(\w*)[^\n]*\n(.*?)^```", re.MULTILINE | re.DOTALL)


def blocks(page: Path, *languages: str) -> list[str]:
    return [text for language, text in FENCE.findall(page.read_text(encoding="utf-8")) if language in languages]


def pages_with(*languages: str) -> list[Any]:
    return [pytest.param(page, id=str(page.relative_to(ROOT))) for page in PAGES if blocks(page, *languages)]


def run_examples(page: Path, folder: Path) -> dict[str, Any]:
    """Run a page's examples in their order as one file: settings read their own source for the lines below fields."""
    file = folder / "example.py"
    file.write_text("\n\n".join(blocks(page, "python")), encoding="utf-8")
    return runpy.run_path(str(file))


@pytest.mark.parametrize("page", pages_with("python"))
def test_python_examples_run(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            run_examples(page, tmp_path)
    finally:
        torch.set_num_threads(threads)


def test_example_of_a_method_is_one(tmp_path: Path) -> None:
    names = run_examples(ROOT / "docs/guide/adding-a-method.md", tmp_path)
    distance = names["logit_distance"](torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0, 2.0]]))
    torch.testing.assert_close(distance, torch.tensor([2.0]))
    assert set(names["METHOD"].terms) == {"cross_entropy", names["LogitDistance"].name}


def links(page: Path) -> list[str]:
    text = FENCE.sub("", page.read_text(encoding="utf-8"))
    return [link.partition("#")[0] for link in re.findall(r"\]\(([^)\s]+)\)", text) if "://" not in link]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_to_files(page: Path) -> None:
    for link in filter(None, links(page)):
        target = (page.parent / link).resolve()
        docs = (ROOT / "docs").resolve()
        made = page.is_relative_to(docs) and target.is_relative_to(docs)
        assert target.exists() or (made and target.relative_to(docs).as_posix() in GENERATED), f"{page}: {link}"


def test_changelog_names_everything() -> None:
    text = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    words = set(re.findall(r"`([^`]+)`", text))
    public = [f"soteacher.{name}" for name in soteacher.__all__ if not name.startswith("_")]
    for name in (*OBJECTIVES, *METHODS, *recipe_names(), *SOURCES, *functional.__all__, *public):
        assert name in words, name
    for path, command in commands(typer.main.get_command(app), ()):
        assert " ".join(path) in words, path
        for option in options_of(command) - {"--help"}:
            assert option in words, f"{path}: {option}"


def test_networks_page_names_every_family() -> None:
    text = (ROOT / "docs/guide/networks.md").read_text(encoding="utf-8")
    families = {re.sub(r"\d.*", "", name) for name in network_names()}
    assert all(f"`{family}" in text for family in families)


def fragments() -> Iterator[Any]:
    for page in PAGES:
        for number, text in enumerate(blocks(page, "yaml")):
            yield pytest.param(text, id=f"{page.relative_to(ROOT)}-{number}")
    for name in METHODS:
        (text,) = [text for language, text in FENCE.findall(describe_method(name)) if language == "yaml"]
        yield pytest.param(text, id=f"method-{name}")


@pytest.mark.parametrize("text", list(fragments()))
def test_yaml_examples_are_studies(text: str) -> None:
    tree = read_tree(text, "example")
    if "vary" in tree:
        base = read_tree(recipe_text("quickstart"), "quickstart")
        del base["name"]
        assert isinstance(read_plan({"study": base, **tree}), SeriesConfig)
        return
    if "data" not in tree:  # a fragment, which stands for a part of a study
        tree = {**read_tree(recipe_text("quickstart"), "quickstart"), "baseline": None, **tree}
        tree["teachers"] = {name: spec for name, spec in tree["teachers"].items() if "from" not in spec}
    study = read_study(tree)
    assert isinstance(study, StudyConfig)
    for spec in study.teachers.values():
        assert not isinstance(spec, FileTeacher) or spec.model is not None


def commands(command: Any, path: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], Any]]:
    below = getattr(command, "commands", {})
    if not below:
        yield path, command
    for name, inner in below.items():
        yield from commands(inner, (*path, name))


def options_of(command: Any) -> set[str]:
    return {option for parameter in command.params for option in parameter.opts if option.startswith("--")} | {"--help"}


def resolve(words: list[str]) -> tuple[Any, list[str]]:
    """Return the command that a line's words call, and the words after it."""
    command = typer.main.get_command(app)
    while words and words[0] in getattr(command, "commands", {}):
        command, words = command.commands[words[0]], words[1:]
    return command, words


def command_lines() -> Iterator[Any]:
    for page in PAGES:
        for text in blocks(page, "sh", "console", "bash", "text"):
            for line in text.replace("\\\n", " ").splitlines():
                if match := re.match(r"\s*(?:\$ )?soteacher (.+)", line):
                    words = shlex.split(match[1], comments=True)
                    until = next((at for at, word in enumerate(words) if word in (">", "|", "&&")), len(words))
                    yield pytest.param(words[:until], id=f"{page.relative_to(ROOT)}: {line.strip()[:60]}")


@pytest.mark.parametrize("words", list(command_lines()))
def test_command_lines_parse(words: list[str]) -> None:
    command, rest = resolve(words)
    assert not getattr(command, "commands", {}), f"no such command: {words}"
    with command.make_context("soteacher", list(rest)) as context:  # raises what the command line would say
        settings = context.params.get("settings") or ()
        study = context.params.get("study")
    if study in recipe_names():
        read_plan(study, settings)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_commands_in_sentences_exist(page: Path) -> None:
    text = FENCE.sub("", page.read_text(encoding="utf-8"))
    for line in re.findall(r"`soteacher ([a-z][^`]*)`", text):
        command, rest = resolve(line.split())
        assert not getattr(command, "commands", {}), f"no such command: soteacher {line}"
        assert {word for word in rest if word.startswith("--")} <= options_of(command), line


def test_sources_tree_in_readme_exists() -> None:
    (tree,) = [text for text in blocks(ROOT / "README.md", "text") if text.startswith("src/soteacher/")]
    for name in re.findall(r"[\w/]+\.py\b|[a-z]+/(?=\s)", tree.partition("\n")[2]):
        assert list((ROOT / "src/soteacher").rglob(name)), name


def test_site_builds_without_warnings(tmp_path: Path) -> None:
    pytest.importorskip("mkdocstrings", reason="the site needs the packages of the extra docs")
    before = {path for path in (ROOT / "docs").rglob("*") if "__pycache__" not in path.parts}
    command = [sys.executable, "-B", "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=110, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    assert {path for path in (ROOT / "docs").rglob("*") if "__pycache__" not in path.parts} == before
    pages = {path.relative_to(tmp_path / "site").parent.as_posix() for path in (tmp_path / "site").rglob("index.html")}
    assert pages >= {page.removesuffix(".md").removesuffix("/index") for page in GENERATED}
    kd = (tmp_path / "site/methods/kd/index.html").read_text(encoding="utf-8")
    api = (tmp_path / "site/reference/objectives/index.html").read_text(encoding="utf-8")
    for text in (kd, api):
        assert r'<div class="arithmatex">\[' in text
        assert ".. math::" not in text
        assert ":math:" not in text
    shutil.rmtree(tmp_path / "site")
