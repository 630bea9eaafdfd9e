import importlib

import pytest
import torch

from soteacher import torchvision_operators
from soteacher.torchvision_operators import define_missing_operators


def test_torchvision_can_be_imported_afterwards():
    define_missing_operators()
    define_missing_operators()
    transforms = importlib.import_module("torchvision.transforms.functional")
    assert transforms.normalize(torch.full((1, 2, 2), 0.5), [0.5], [2.0]).abs().sum() == 0
    assert str(torch.ops.torchvision.nms.default._schema).startswith("torchvision::nms(")


def test_nothing_is_defined_where_torchvision_loads(monkeypatch):
    monkeypatch.setattr(torchvision_operators, "_define_schemas", lambda: pytest.fail("defined"))
    monkeypatch.setattr(importlib, "import_module", lambda name: name)
    define_missing_operators()


@pytest.mark.parametrize("error", [RuntimeError("compiled with different CUDA major versions"), ImportError("none")])
def test_other_errors_of_the_import_stay(monkeypatch, error):
    def import_module(_name: str) -> None:
        raise error

    monkeypatch.setattr(torchvision_operators, "_define_schemas", lambda: pytest.fail("defined"))
    monkeypatch.setattr(importlib, "import_module", import_module)
    with pytest.raises(type(error), match=str(error)):
        define_missing_operators()
