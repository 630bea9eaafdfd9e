"""Frozen settings, and the one line that says what is wrong with those a user wrote."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from types import NoneType, UnionType
from typing import Annotated, Any, TypeVar, Union, cast, get_args, get_origin

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError, model_validator
from pydantic_core import InitErrorDetails

from soteacher.errors import InputError, unknown_name

ModelT = TypeVar("ModelT", bound=BaseModel)


_WANTED: dict[Any, str] = {bool: "true or false", int: "a whole number", float: "a number"}
_WORDS = {"tuple_type": "should be a list, such as [a, b]", "list_type": "should be a list, such as [a, b]"}
"""Our words for errors whose own ones name types of Python."""
_SCIENTIFIC = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)[eE][+-]?\d+")
"""Numbers such as ``1e-5``, which YAML 1.1 reads as text."""


class Settings(BaseModel):
    """Frozen settings that accept no unknown key, NaN or infinity, and no value of another type than the wanted one."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True)

    @model_validator(mode="before")
    @classmethod
    def _known_keys(cls, value: Any) -> Any:
        known = [field.alias or name for name, field in cls.model_fields.items()]
        if isinstance(value, Mapping):
            for key in value:
                if key not in known:
                    raise unknown_name("key", str(key), known)
        return value

    @model_validator(mode="before")
    @classmethod
    def _own_types(cls, value: Any) -> Any:
        """Refuse what pydantic would quietly turn into the wanted type: true into 1, "7" into 7, "yes" into true."""
        if not isinstance(value, Mapping):
            return value
        table = cast("Mapping[str, Any]", value)
        wrong = [
            InitErrorDetails(
                type="value_error", loc=(key, *place), input=found, ctx={"error": InputError(_wanted(wanted, found))}
            )
            for key, annotation in _annotations(cls).items()
            if key in table
            for place, found, wanted in _mistyped(table[key], annotation)
        ]
        if wrong:
            raise ValidationError.from_exception_data(cls.__name__, wrong)
        return cast("Any", value)


def _annotations(model: type[BaseModel]) -> dict[str, Any]:
    """Return what each field wants, by the key that it has in a study."""
    return {field.alias or name: field.annotation for name, field in model.model_fields.items()}


def _wanted(wanted: Any, value: Any) -> str:
    return f"wanted {_WANTED[wanted]}, got {shortened(value)}"


def _mistyped(value: Any, annotation: Any) -> Iterator[tuple[tuple[int, ...], Any, Any]]:
    """Yield the numbers and truth values of another type than a field wants: place in the field, value, wanted type."""
    if get_origin(annotation) is Annotated:
        yield from _mistyped(value, get_args(annotation)[0])
    elif get_origin(annotation) in (Union, UnionType):
        choices = [choice for choice in get_args(annotation) if choice is not NoneType]
        if value is not None and len(choices) == 1:
            yield from _mistyped(value, choices[0])
    elif get_origin(annotation) is tuple and isinstance(value, (list, tuple)):
        items = cast("Sequence[Any]", value)
        first, *others = get_args(annotation)
        each = [first] * len(items) if others == [...] else [first, *others]
        for index, (item, inner) in enumerate(zip(items, each, strict=False)):
            yield from (((index, *place), found, wanted) for place, found, wanted in _mistyped(item, inner))
    elif annotation in (bool, int, float) and value is not None and not _fits(value, annotation):
        yield (), value, annotation


def _fits(value: Any, wanted: Any) -> bool:
    """Return whether a value may stand for a truth value or number; the number itself is pydantic's to check."""
    if wanted is bool or isinstance(value, bool):
        return wanted is bool and isinstance(value, bool)
    return not isinstance(value, str) or (wanted is float and _SCIENTIFIC.fullmatch(value) is not None)


def parse(model: type[ModelT], value: Any, *, place: str = "", source: str = "") -> ModelT:
    """Return the settings that a mapping holds.

    Args:
        model: the settings' class.
        value: the mapping.
        place: where it stands in the study, for messages.
        source: the file or recipe it comes from, for messages.

    Raises:
        InputError: one line that names the source, the key, what came and what was wanted.
    """
    try:
        return model.model_validate(value)
    except ValidationError as error:
        line = _one_line(error, value, place)
        raise InputError(f"{source}: {line}" if source else line) from None


def _one_line(error: ValidationError, value: Any, place: str) -> str:
    """Put the first complaint of a failed validation into one line."""
    first = error.errors(include_url=False)[0]
    context: dict[str, Any] = first.get("ctx", {})
    where = ".".join([*([place] if place else []), *_path(first["loc"], value, missing=first["type"] == "missing")])
    if first["type"] == "value_error":
        text = str(context["error"])
    elif first["type"] in ("missing", "union_tag_not_found"):
        key = str(context.get("discriminator", "")).strip("'")
        text = f"{key} is missing, and needed" if key else "missing, and needed"
    elif first["type"] == "union_tag_invalid":
        known = [tag.strip(" '") for tag in context["expected_tags"].split(",")]
        text = str(unknown_name(context["discriminator"].strip("'"), context["tag"], known))
    else:
        text = f"{_WORDS.get(first['type'], first['msg'].removeprefix('Input '))}, got {shortened(first['input'])}"
    return f"{where}: {text}" if where else text


def shortened(value: Any) -> str:
    """Return a value as a message shows it."""
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _path(location: tuple[int | str, ...], value: Any, *, missing: bool) -> list[str]:
    """Return an error's location as the user wrote it: without the tags of unions, which stand in no file."""
    path: list[str] = []
    here = value
    for index, part in enumerate(location):
        if isinstance(here, Mapping):
            table = cast("Mapping[Any, Any]", here)
            inside, below = part in table, table.get(part)
        else:
            row = cast("Sequence[Any]", here) if isinstance(here, (list, tuple)) else ()
            inside = isinstance(part, int) and part < len(row)
            below = row[part] if isinstance(part, int) and inside else None
        if inside:
            here = below
        if inside or (missing and index + 1 == len(location)):
            path.append(str(part))
    return path


def merge(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """Return ``base`` with ``over`` laid on it, tables within tables; another ``name`` replaces a whole table."""
    merged = dict(base)
    for key, value in over.items():
        below = merged.get(key)
        tables = isinstance(below, Mapping) and isinstance(value, Mapping)
        merged[key] = _merge_tables(cast("Any", below), cast("Any", value)) if tables else value
    return merged


def _merge_tables(below: Mapping[str, Any], value: Mapping[str, Any]) -> dict[str, Any]:
    same_kind = value.get("name", below.get("name")) == below.get("name")
    return merge(below, value) if same_kind else dict(value)


class _OneOfEachKey(yaml.SafeLoader):
    """Refuses a table in which a key stands twice: YAML forbids it, and the library would drop the first."""

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        first: dict[tuple[str, str], int] = {}
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode) or key.tag == "tag:yaml.org,2002:merge":
                continue  # of tables merged with "<<" none is dropped
            name = (key.tag, key.value)
            if name in first:
                problem = f"the key {key.value!r} stands in line {first[name]} already"
                raise yaml.MarkedYAMLError(problem=problem, problem_mark=key.start_mark)
            first[name] = key.start_mark.line + 1
        return node


def _read_yaml(text: str) -> Any:
    loader = _OneOfEachKey(text)
    try:
        return loader.get_single_data()
    finally:
        loader.dispose()


def apply_settings(tree: Mapping[str, Any], settings: Iterable[str]) -> dict[str, Any]:
    """Return a study's tree with ``path.to.field=value`` settings laid on it; values are read as YAML.

    Raises:
        InputError: a setting without ``=``, a value that is no YAML, or a path through something that is no table.
    """
    result = _copy(tree)
    for setting in settings:
        path, equals, text = setting.partition("=")
        if not equals or not path:
            raise InputError(f"--set wants path.to.field=value, got {setting!r}")
        try:
            value = _read_yaml(text)
        except (yaml.YAMLError, ValueError):  # a date that is none is a ValueError
            raise InputError(f"--set {path}: {text!r} is no YAML value") from None
        *parents, last = path.split(".")
        table = result
        for parent in parents:
            if table.get(parent) is None:
                table[parent] = {}
            if not isinstance(table[parent], dict):
                raise InputError(f"--set {path}: {parent} is no table but {shortened(table[parent])}")
            table = table[parent]
        table[last] = value
    return result


def _copy(tree: Mapping[str, Any]) -> dict[str, Any]:
    return {key: _copy(value) if isinstance(value, Mapping) else value for key, value in tree.items()}


def read_tree(text: str, source: str) -> dict[str, Any]:
    """Return the tree that a study's YAML text holds.

    Raises:
        InputError: no YAML, a key that stands twice in a table, or no table at its top.
    """
    try:
        tree = _read_yaml(text)
    except (yaml.YAMLError, ValueError) as error:  # a date that is none is a ValueError
        mark = getattr(error, "problem_mark", None)
        place = f" in line {mark.line + 1}" if mark else ""
        raise InputError(f"{source}: no readable YAML{place}: {getattr(error, 'problem', error)}") from None
    if not isinstance(tree, dict):
        raise InputError(f"{source}: a study is a table of settings, got {shortened(tree)}")
    return tree
