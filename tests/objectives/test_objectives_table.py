from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from soteacher import objectives
from soteacher.errors import InputError
from soteacher.objective import Method, Objective, ObjectiveConfig
from soteacher.objectives import METHODS, OBJECTIVES, method, methods, objective_config, objective_configs
from soteacher.types import Step, Task


class Nothing(Objective[Step]):
    name = "nothing"

    def forward(self, step: Step) -> Tensor:
        return 0 * step.outputs.logits.sum()


class NothingConfig(ObjectiveConfig):
    """No settings."""

    def build(self, task: Task) -> Nothing:
        del task
        return Nothing()


OTHER = Method(name="other", role="teacher", title="Another", source="a test", terms={"cross_entropy": {}})


@dataclass
class Point:
    """Stands for an installed package's entry point."""

    name: str
    loaded: Any
    dist: Any = None
    value: str = "plugin:X"

    def load(self) -> Any:
        if isinstance(self.loaded, Exception):
            raise self.loaded
        return self.loaded


@pytest.fixture
def install(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., None]]:
    """Make entry points of a group visible, and forget them afterwards."""
    objective_configs.cache_clear()
    methods.cache_clear()

    def place(group: str, *points: Point) -> None:
        monkeypatch.setattr(objectives, "entry_points", lambda *, group: installed.get(group, []))
        installed[group] = list(points)

    installed: dict[str, list[Point]] = {}
    yield place
    objective_configs.cache_clear()
    methods.cache_clear()


@pytest.mark.parametrize(("name", "value"), METHODS.items(), ids=METHODS)
def test_methods_are_made_of_known_terms(name: str, value: Method, make_pair: Callable[..., Any]) -> None:
    assert value.name == name
    assert value.title
    assert "\n" not in value.title
    for term, settings in value.terms.items():
        config = OBJECTIVES[term].model_validate(settings | ({"student": "resnet8"} if term == "sftn" else {}))
        assert not config.needs_teacher or value.role == "student" or name == "assistant"
        assert config.term(make_pair("same family", config).task).objective.name == term


def test_soteacher_has_the_published_weights() -> None:
    def weights(name: str) -> dict[str, tuple[float, str]]:
        configs = {term: OBJECTIVES[term].model_validate(settings) for term, settings in METHODS[name].terms.items()}
        return {term: (config.weight, config.ramp) for term, config in configs.items()}

    one = (1.0, "constant")
    assert weights("standard") == weights("alone") == {"cross_entropy": one}
    assert weights("soteacher") == {
        "cross_entropy": one, "lipschitz": (1e-5, "constant"), "consistency": (1.0, "linear"),
    }  # fmt: skip
    assert weights("soteacher_released") == {
        "cross_entropy": one, "weight_l1": (1e-5, "constant"), "consistency_released": (1.0, "linear"),
    }  # fmt: skip
    assert weights("kd") == {"cross_entropy": (0.5, "constant"), "kd": (0.5, "constant")}


def test_defaults_are_the_published_settings() -> None:
    for name in ("soteacher", "soteacher_released"):
        for term, settings in METHODS[name].terms.items():
            assert OBJECTIVES[term].model_validate(settings) == OBJECTIVES[term]()


def test_unknown_names_offer_the_nearest() -> None:
    with pytest.raises(InputError, match="unknown objective 'lipshitz'; did you mean lipschitz"):
        objective_config("lipshitz")
    with pytest.raises(InputError, match="unknown method 'soteecher'; did you mean soteacher"):
        method("soteecher")


def test_names_find_their_entries() -> None:
    assert all(objective_config(name) is config for name, config in OBJECTIVES.items())
    assert all(method(name) is value for name, value in METHODS.items())


def test_plugins_are_found(install: Callable[..., None]) -> None:
    install("soteacher.objectives", Point("nothing", NothingConfig))
    install("soteacher.methods", Point("other", OTHER))
    assert objective_config("nothing") is NothingConfig
    assert method("other") is OTHER
    assert list(objective_configs()) == [*OBJECTIVES, "nothing"]
    assert "nothing" not in OBJECTIVES
    assert torch.equal(NothingConfig().weight * torch.ones(()), torch.ones(()))


def test_plugins_are_read_once(install: Callable[..., None]) -> None:
    install("soteacher.objectives", Point("nothing", NothingConfig))
    assert objective_configs() is objective_configs()


PACKAGE = SimpleNamespace(name="my-package")


@pytest.mark.parametrize(
    ("points", "message"),
    [
        ([Point("kd", NothingConfig, PACKAGE)], "objective 'kd' of package my-package takes a name that is in use"),
        ([Point("n", NothingConfig), Point("n", NothingConfig, PACKAGE)], "'n' of package my-package takes a name"),
        ([Point("nothing", Nothing, PACKAGE)], "'nothing' of package my-package must be a subclass of ObjectiveConfig"),
        ([Point("nothing", 3)], "'nothing' of package plugin:X must be a subclass"),
        ([Point("nothing", ImportError("no module x"), PACKAGE)], "my-package cannot be loaded: no module x"),
    ],
)
def test_wrong_objective_plugins_are_named(install: Callable[..., None], points: list[Point], message: str) -> None:
    install("soteacher.objectives", *points)
    with pytest.raises(InputError, match=message):
        objective_configs()


@pytest.mark.parametrize(
    ("point", "message"),
    [
        (Point("kd", OTHER, PACKAGE), "method 'kd' of package my-package takes a name that is in use"),
        (Point("another", OTHER, PACKAGE), "'other' of package my-package has an entry point of another name"),
        (Point("other", "text", PACKAGE), "'other' of package my-package must be a Method, got str"),
    ],
)
def test_wrong_method_plugins_are_named(install: Callable[..., None], point: Point, message: str) -> None:
    install("soteacher.methods", point)
    with pytest.raises(InputError, match=message):
        methods()
