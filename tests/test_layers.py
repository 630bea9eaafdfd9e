import ast
from pathlib import Path

import pytest

RANK = {  # a module may import lower ranks and itself; equal ranks do not import one another
    "errors": 0, "types": 0, "objective": 0.5, "metrics": 0.5, "files": 0, "environment": 0, "randomness": 0, "settings": 0.2, "statistics": 0.5,
    "models": 1, "data": 1, "objectives": 1, "train": 1, "reference": 1,
    "diagnostics": 2, "functional": 2, "config": 2, "report": 2, "export": 2, "method_pages": 2,
    "run_folder": 2.5, "pool": 2.5, "study": 2.7, "networks": 3, "studies": 3.5, "recipes": 4, "worker": 4, "api": 5, "terminal": 5, "cli": 6,
}  # fmt: skip
SOURCE = Path(__file__).parents[1] / "src" / "soteacher"


def _imported(path: Path) -> set[str]:
    """Return the ``soteacher`` submodules that a file imports."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
    return {parts[1] for name in names if (parts := name.split("."))[0] == "soteacher" and len(parts) > 1}


@pytest.mark.parametrize("path", sorted(SOURCE.rglob("*.py")), ids=lambda path: str(path.relative_to(SOURCE)))
def test_imports_point_down(path: Path) -> None:
    own = path.relative_to(SOURCE).parts[0].removesuffix(".py")
    if own in {"__init__", "__main__"}:
        return
    for other in _imported(path) - {own, "__version__"}:
        assert RANK[other] < RANK[own], f"{own} must not import {other}"
