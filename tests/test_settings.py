from pathlib import Path
from typing import Annotated, Literal

import pytest
from pydantic import Field

from soteacher.errors import InputError
from soteacher.settings import Settings, apply_settings, merge, parse, read_tree, shortened


class _Round(Settings):
    kind: Literal["round"] = "round"
    radius: float = Field(default=1.0, gt=0)


class _Square(Settings):
    kind: Literal["square"]
    side: int = 1


class _Drawing(Settings):
    copies: int = 1
    scale: float | None = None
    margin: tuple[float, bool] = (0.0, False)
    framed: bool = False
    limit: int | None = None
    number: int = Field(default=0, alias="as")
    title: str
    shape: Annotated[_Round | _Square, Field(discriminator="kind")] = _Round()
    shapes: dict[str, _Round] = {}
    places: tuple[int, ...] = ()
    path: Path | None = None
    origin: str = Field(default="here", alias="from")


def _message(value: object, **more: str) -> str:
    with pytest.raises(InputError) as caught:
        parse(_Drawing, value, **more)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_parse_returns_frozen_settings() -> None:
    drawing = parse(_Drawing, {"title": "one", "shape": {"kind": "square", "side": 2}, "from": "there"})
    assert drawing == _Drawing.model_validate(
        {"title": "one", "shape": _Square(kind="square", side=2), "from": "there"}
    )
    with pytest.raises(ValueError, match="frozen"):
        drawing.title = "two"  # pyright: ignore[reportAttributeAccessIssue]


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({}, "title: missing, and needed"),
        ({"title": 3}, "title: should be a valid string, got 3"),
        ({"titel": "one"}, "unknown key 'titel'; did you mean title?"),
        (
            {"title": "one", "size": 3},
            "unknown key 'size'; known: as, copies, framed, from, limit, margin, path, places",
        ),
        ({"title": "one", "origin": "x"}, "unknown key 'origin'; did you mean margin?"),
        ({"title": "one", "shape": {"side": 2}}, "shape: kind is missing, and needed"),
        ({"title": "one", "shape": {"kind": "squared"}}, "shape: unknown kind 'squared'; did you mean square?"),
        (
            {"title": "one", "shape": {"kind": "square", "sides": 1}},
            "shape: unknown key 'sides'; did you mean side?",
        ),
        (
            {"title": "one", "shape": {"kind": "square", "side": 1.5}},
            "shape.side: should be a valid integer, got a number with a fractional part, got 1.5",
        ),
        ({"title": "one", "shape": {"kind": "round", "radius": 0}}, "shape.radius: should be greater than 0, got 0"),
        (
            {"title": "one", "shape": {"kind": "round", "radius": float("inf")}},
            "shape.radius: should be a finite number, got inf",
        ),
        ({"title": "one", "shapes": {"a": {"radius": -1}}}, "shapes.a.radius: should be greater than 0, got -1"),
        ({"title": "one", "places": [1, "two"]}, "places.1: wanted a whole number, got 'two'"),
        ({"title": "one", "places": [True]}, "places.0: wanted a whole number, got True"),
        ({"title": "one", "places": (1, [2])}, "places.1: should be a valid integer, got [2]"),
        ({"title": "one", "margin": [1, 1]}, "margin.1: wanted true or false, got 1"),
        ({"title": "one", "margin": [1]}, "margin.1: missing, and needed"),
        ({"title": "one", "copies": True}, "copies: wanted a whole number, got True"),
        ({"title": "one", "copies": "7"}, "copies: wanted a whole number, got '7'"),
        ({"title": "one", "copies": "1e3"}, "copies: wanted a whole number, got '1e3'"),
        ({"title": "one", "copies": None}, "copies: should be a valid integer, got None"),
        ({"title": "one", "limit": False}, "limit: wanted a whole number, got False"),
        ({"title": "one", "scale": False}, "scale: wanted a number, got False"),
        ({"title": "one", "scale": "0.5"}, "scale: wanted a number, got '0.5'"),
        ({"title": "one", "scale": "e5"}, "scale: wanted a number, got 'e5'"),
        ({"title": "one", "scale": "1e999"}, "scale: should be a finite number, got '1e999'"),
        ({"title": "one", "framed": "yes"}, "framed: wanted true or false, got 'yes'"),
        ({"title": "one", "framed": 1}, "framed: wanted true or false, got 1"),
        ({"title": "one", "framed": None}, "framed: should be a valid boolean, got None"),
        ({"title": "one", "as": "3"}, "as: wanted a whole number, got '3'"),
        ({"title": "one", "shape": {"kind": "round", "radius": True}}, "shape.radius: wanted a number, got True"),
        ({"title": "one", "shapes": {"a": {"radius": "1"}}}, "shapes.a.radius: wanted a number, got '1'"),
        ({"title": "one", "places": 5}, "places: should be a list, such as [a, b], got 5"),
        ({"title": ["a" * 100]}, f"title: should be a valid string, got ['{'a' * 55}..."),
    ],
)
def test_parse_says_in_one_line_what_came_and_what_was_wanted(value: object, message: str) -> None:
    assert message in _message(value)


@pytest.mark.parametrize(("text", "number"), [("1e-5", 1e-5), ("-2.5E3", -2500.0), (".5e1", 5.0), ("3.e+2", 300.0)])
def test_numbers_that_yaml_takes_for_text_are_numbers(text: str, number: float) -> None:
    assert read_tree(f"scale: {text}", "my.yaml")["scale"] in (text, number)
    assert parse(_Drawing, {"title": "one", "scale": text}).scale == number


def test_values_of_the_wanted_type_pass() -> None:
    drawing = parse(
        _Drawing,
        {"title": "1", "copies": 2, "scale": 3, "margin": [1, True], "framed": True, "limit": None, "places": [1, 2]},
    )
    assert drawing.model_dump(exclude_defaults=True) == {
        "title": "1", "copies": 2, "scale": 3.0, "margin": (1.0, True), "framed": True, "places": (1, 2),
    }  # fmt: skip


def test_parse_names_source_and_place() -> None:
    assert _message({"title": 3}, source="my.yaml", place="drawings.a") == (
        "my.yaml: drawings.a.title: should be a valid string, got 3"
    )
    assert _message({}, source="my.yaml") == "my.yaml: title: missing, and needed"


def test_shortened_keeps_short_values_whole() -> None:
    assert shortened([1, 2]) == "[1, 2]"
    assert shortened("x" * 80) == "'" + "x" * 56 + "..."


def test_merge_goes_into_tables_and_replaces_the_rest() -> None:
    base = {"a": {"x": 1, "y": {"z": 2}}, "b": [1, 2], "c": 3}
    over = {"a": {"y": {"w": 4}}, "b": [3], "d": 5}
    assert merge(base, over) == {"a": {"x": 1, "y": {"z": 2, "w": 4}}, "b": [3], "c": 3, "d": 5}
    assert base == {"a": {"x": 1, "y": {"z": 2}}, "b": [1, 2], "c": 3}


def test_merge_replaces_a_table_of_another_name() -> None:
    base = {"optimizer": {"name": "sgd", "momentum": 0.9}}
    assert merge(base, {"optimizer": {"name": "adamw"}}) == {"optimizer": {"name": "adamw"}}
    assert merge(base, {"optimizer": {"name": "sgd", "nesterov": True}}) == {
        "optimizer": {"name": "sgd", "momentum": 0.9, "nesterov": True}
    }
    assert merge(base, {"optimizer": {"momentum": 0.5}}) == {"optimizer": {"name": "sgd", "momentum": 0.5}}


@pytest.mark.parametrize(
    ("setting", "wanted"),
    [
        ("a.b=2", {"a": {"b": 2, "c": 1}}),
        ("a=5", {"a": 5}),
        ("a.b.d=x", {"a": {"b": {"d": "x"}, "c": 1}}),
        ("new.deep.key=[1, 2]", {"a": {"b": None, "c": 1}, "new": {"deep": {"key": [1, 2]}}}),
        ("a.b={x: 1}", {"a": {"b": {"x": 1}, "c": 1}}),
        ("a.c=null", {"a": {"b": None, "c": None}}),
        ("a.c=x=y", {"a": {"b": None, "c": "x=y"}}),
        ("a.c=", {"a": {"b": None, "c": None}}),
        ("a.c=true", {"a": {"b": None, "c": True}}),
    ],
)
def test_apply_settings_lays_values_over_a_tree(setting: str, wanted: dict[str, object]) -> None:
    tree = {"a": {"b": None, "c": 1}}
    assert apply_settings(tree, [setting]) == wanted
    assert tree == {"a": {"b": None, "c": 1}}


def test_apply_settings_takes_the_last_of_two() -> None:
    assert apply_settings({}, ["a.b=1", "a.b=2"]) == {"a": {"b": 2}}


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("training.epochs", "--set wants path.to.field=value, got 'training.epochs'"),
        ("=3", "--set wants path.to.field=value, got '=3'"),
        ("a=[1", "--set a: '[1' is no YAML value"),
        ("a=2020-99-99", "--set a: '2020-99-99' is no YAML value"),
        ("a={b: 1, b: 2}", "--set a: '{b: 1, b: 2}' is no YAML value"),
        ("seeds.0=1", "--set seeds.0: seeds is no table but [0, 1]"),
    ],
)
def test_apply_settings_refuses_in_one_line(setting: str, message: str) -> None:
    with pytest.raises(InputError) as caught:
        apply_settings({"seeds": [0, 1]}, [setting])
    assert str(caught.value) == message


def test_read_tree_lets_a_table_overrule_those_merged_into_it() -> None:
    text = "a: &a {x: 1, y: 2}\nb: &b {<<: *a, x: 3}\nc: {<<: *b, y: 4}\nd: {a: 1, 1: 2, '1': 3}"
    assert read_tree(text, "my.yaml") == {
        "a": {"x": 1, "y": 2}, "b": {"x": 3, "y": 2}, "c": {"x": 3, "y": 4}, "d": {"a": 1, 1: 2, "1": 3},
    }  # fmt: skip


def test_read_tree_reads_a_table() -> None:
    assert read_tree("a: {b: [1, 2.5]}\nc: text", "my.yaml") == {"a": {"b": [1, 2.5]}, "c": "text"}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: [1\nb: 2\n", "my.yaml: no readable YAML in line 2: "),
        ("a: b: c", "my.yaml: no readable YAML in line 1: mapping values are not allowed here"),
        ("a: !!python/object/apply:os.system [ls]", "my.yaml: no readable YAML in line 1: could not determine a cons"),
        ("day: 2020-99-99", "my.yaml: no readable YAML: month must be in 1..12"),
        ("a: 1\nb: 2\na: 3", "my.yaml: no readable YAML in line 3: the key 'a' stands in line 1 already"),
        ("x:\n  a: 1\n  'a': 1", "my.yaml: no readable YAML in line 3: the key 'a' stands in line 2 already"),
        ("x: [{a: 1, a: 2}]", "my.yaml: no readable YAML in line 1: the key 'a' stands in line 1 already"),
        ("[1]: 2", "my.yaml: no readable YAML in line 1: found unhashable key"),
        ("- 1\n- 2", "my.yaml: a study is a table of settings, got [1, 2]"),
        ("", "my.yaml: a study is a table of settings, got None"),
    ],
)
def test_read_tree_refuses_in_one_line(text: str, message: str) -> None:
    with pytest.raises(InputError) as caught:
        read_tree(text, "my.yaml")
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)
