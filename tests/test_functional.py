import importlib
import inspect
import pkgutil
from collections.abc import Iterator

from soteacher import functional, objectives


def public_functions() -> Iterator[str]:
    """Names of all public functions that the files of the objectives define."""
    for info in pkgutil.walk_packages(objectives.__path__, objectives.__name__ + "."):
        module = importlib.import_module(info.name)
        for name, value in vars(module).items():
            if inspect.isfunction(value) and value.__module__ == module.__name__ and not name.startswith("_"):
                yield name


def test_functional_holds_every_pure_function_of_the_objectives() -> None:
    names = list(public_functions())
    assert len(names) == len(set(names)), "two objectives define functions of one name"
    assert set(functional.__all__) == set(names) - {"at_least_float32"}  # not a quantity of a method


def test_functional_exports_what_it_lists() -> None:
    assert functional.__all__ == sorted(functional.__all__)
    assert all(callable(getattr(functional, name)) for name in functional.__all__)
    assert all(inspect.getdoc(getattr(functional, name)) for name in functional.__all__)
