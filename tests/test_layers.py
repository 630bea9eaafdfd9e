import ast
from pathlib import Path

import pytest

RANK = {  # a module may import lower ranks and itself; equal ranks do not import one another
    "errors": 0, "types": 0, "files": 0, "randomness": 0, "environment": 0, "precision": 0, "torchvision_operators": 0,
    "settings": 1, "logits": 1,
    "objective": 2, "metrics": 2, "statistics": 2, "mixing": 2,
    "models": 3, "data": 3, "objectives": 3, "train": 3, "reference": 3,
    "diagnostics": 4, "functional": 4, "deployment": 4, "published_settings": 4,
    "config": 5,
    "report": 6, "method_pages": 6, "run_folder": 6, "pool": 6,
    "jobs": 7,
    "assembly": 8, "kept_epochs": 8, "teacher_answers": 8,
    "finished": 9,
    "networks": 10,
    "out_of_fold": 11,
    "study_checks": 12,
    "studies": 13,
    "recipes": 14, "worker": 14,
    "series": 15,
    "api": 16, "terminal": 16,
    "cli": 17,
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
