import importlib
import inspect

from soteacher import functional
from soteacher.objectives import OBJECTIVES


def test_functional_holds_every_pure_function_of_the_objectives() -> None:
    modules = [importlib.import_module(name) for name in sorted({config.__module__ for config in OBJECTIVES.values()})]
    names = [
        name
        for module in modules
        for name, value in vars(module).items()
        if inspect.isfunction(value) and value.__module__ == module.__name__ and not name.startswith("_")
    ]
    assert len(names) == len(set(names)), "two objectives define functions of one name"
    assert set(functional.__all__) == set(names)


def test_functional_exports_what_it_lists() -> None:
    assert functional.__all__ == sorted(functional.__all__)
    assert all(callable(getattr(functional, name)) for name in functional.__all__)
    assert all(inspect.getdoc(getattr(functional, name)) for name in functional.__all__)
