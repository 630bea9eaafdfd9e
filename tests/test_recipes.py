from pathlib import Path
from typing import Any

import pytest
import yaml

from soteacher.config import StudyConfig
from soteacher.errors import InputError
from soteacher.recipes import read_study, recipe_description, recipe_names, recipe_text


@pytest.mark.parametrize("name", recipe_names())
def test_every_recipe_is_a_study_that_says_what_it_is_for(name: str) -> None:
    study = read_study(name)
    assert study.name == name
    assert recipe_description(name) == study.description.strip()
    assert recipe_description(name).endswith(".")


def test_there_is_a_quickstart() -> None:
    assert "quickstart" in recipe_names()


def test_a_recipe_shown_and_run_as_a_file_is_the_same_study(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(recipe_text("quickstart"))
    assert read_study(path) == read_study(str(path)) == read_study("quickstart")


def test_settings_are_laid_over_a_recipe() -> None:
    study = read_study("quickstart", ["training.epochs=3", "training.optimizer.learning_rate=1e-3", "seeds=[5]"])
    assert (study.training.epochs, study.training.optimizer.learning_rate, study.seeds) == (3, 0.001, (5,))


def test_settings_are_laid_over_a_tree_and_leave_it_alone(tiny_tree: Any) -> None:
    tree = tiny_tree()
    study = read_study(tree, ["training.epochs=3", "teachers.soteacher.terms.lipschitz=null"])
    assert isinstance(study, StudyConfig)
    assert study.training.epochs == 3
    assert tree == tiny_tree()


@pytest.mark.parametrize(
    ("source", "settings", "message"),
    [
        ("quickstrat", [], "unknown recipe 'quickstrat'; did you mean quickstart?"),
        ("../quickstart", [], "../quickstart: no readable study: No such file or directory"),
        ("nothing.yaml", [], "nothing.yaml: no readable study: No such file or directory"),
        ("quickstart", ["training.epoch=3"], "recipe quickstart: training: unknown key 'epoch'; did you mean epochs"),
        (
            "quickstart",
            ["training.epochs=0"],
            "recipe quickstart: training.epochs: should be greater than or equal to 1",
        ),
        ("quickstart", ["epochs"], "--set wants path.to.field=value, got 'epochs'"),
        ("quickstart", ["a..b=1"], "recipe quickstart: unknown key 'a'; known:"),
    ],
)
def test_what_cannot_be_read_is_told_in_one_line(source: str, settings: list[str], message: str) -> None:
    with pytest.raises(InputError) as caught:
        read_study(source, settings)
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"data: [1\nb: 2", "no readable YAML in line 2"),
        (b"\xff\xfe\xff", "no readable study: 'utf-8' codec"),
        (b"- 1", "a study is a table of settings, got [1]"),
        (yaml.safe_dump({"data": {"source": "npz"}}).encode(), "data.path: missing, and needed"),
    ],
)
def test_a_broken_file_is_named(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "mine.yml"
    path.write_bytes(content)
    with pytest.raises(InputError) as caught:
        read_study(str(path))
    assert str(caught.value).startswith(f"{path}: {message}")
    assert "\n" not in str(caught.value)


def test_a_folder_is_no_study(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no readable study: Is a directory"):
        read_study(tmp_path)
