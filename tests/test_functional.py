import inspect

import pytest

from soteacher import functional
from soteacher.objectives import MODULES


def test_functional_holds_every_pure_function_of_the_objectives() -> None:
    names = [
        name
        for module in MODULES
        for name, value in vars(module).items()
        if inspect.isfunction(value) and value.__module__ == module.__name__ and not name.startswith("_")
    ]
    assert len(names) == len(set(names)), "two objectives define functions of one name"
    assert set(functional.__all__) == {*names, "standardized_logits"}


def test_functional_exports_what_it_lists() -> None:
    assert functional.__all__ == sorted(functional.__all__)
    assert all(callable(getattr(functional, name)) for name in functional.__all__)
    assert all(inspect.getdoc(getattr(functional, name)) for name in functional.__all__)


def test_an_unknown_function_is_named() -> None:
    with pytest.raises(AttributeError, match="no function 'no_such_function'"):
        getattr(functional, "no_such_function")  # noqa: B009 the type checker refuses the attribute
