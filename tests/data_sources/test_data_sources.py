from pathlib import Path
from typing import get_args

import pytest
from pydantic import TypeAdapter, ValidationError

from soteacher.data import SOURCES, DataConfig, FolderConfig, NpzConfig, data_root, load_data
from soteacher.errors import InputError


def test_the_table_and_the_union_hold_the_same_sources():
    union = get_args(get_args(DataConfig)[0])
    assert set(union) == set(SOURCES.values())
    for name, config in SOURCES.items():
        assert config.model_fields["source"].default == name


@pytest.mark.parametrize(("name", "config"), SOURCES.items())
def test_settings_are_chosen_by_source_and_read_back_equal(name, config):
    settings = {"source": name, "train_examples": 5}
    if config in (NpzConfig, FolderConfig):
        settings["path"] = "somewhere"
    adapter = TypeAdapter(DataConfig)
    chosen = adapter.validate_python(settings)
    assert type(chosen) is config
    assert adapter.validate_json(adapter.dump_json(chosen)) == chosen


@pytest.mark.parametrize(
    "settings",
    [
        {"source": "cifar11"},
        {"source": "cifar10", "path": "x"},
        {"source": "cifar10", "train_examples": 0},
        {"source": "cifar10", "std": (0.5, 0.0, 0.5)},
        {"source": "cifar10", "mean": (float("nan"), 0.5, 0.5)},
        {"source": "folder"},
        {"source": "folder", "path": "x", "image_size": 0},
    ],
)
def test_impossible_settings_are_refused(settings):
    with pytest.raises(ValidationError):
        TypeAdapter(DataConfig).validate_python(settings)


def test_every_setting_is_described():
    for config in SOURCES.values():
        assert config.__doc__
        assert config.model_config["frozen"]


def test_the_root_is_the_argument_else_the_variable_else_the_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("SOTEACHER_DATA", str(tmp_path))
    assert data_root(Path("given")) == Path("given")
    assert data_root() == tmp_path
    monkeypatch.delenv("SOTEACHER_DATA")
    assert data_root() == Path.home() / ".cache" / "soteacher" / "data"


def test_a_subset_of_one_class_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"the training images of fashion_mnist_small are of one class only, '.*'"):
        load_data(SOURCES["fashion_mnist_small"](train_examples=1), tmp_path)


def test_load_data_reads_a_source(tmp_path):
    data = load_data(SOURCES["fashion_mnist_small"](train_examples=20, test_examples=10), tmp_path)
    assert (data.train.num_examples, data.test.num_examples) == (20, 10)
