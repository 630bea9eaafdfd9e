"""The example package under ``examples/plugin``: installed as a user would, found by its entry points, trained with."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

PLUGIN = Path(__file__).parents[1] / "examples" / "plugin"


@pytest.fixture(scope="module")
def soteacher(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Install the package beside this environment's own and give its command line."""
    pytest.importorskip("setuptools", reason="installing a package from its sources needs setuptools")
    folder = tmp_path_factory.mktemp("plugin")
    shutil.copytree(PLUGIN, folder / "source", ignore=shutil.ignore_patterns("build", "*.egg-info", "__pycache__"))
    install = ["install", "--quiet", "--no-deps", "--no-build-isolation", "--target", str(folder / "packages")]
    command = [sys.executable, "-m", "pip", *install, str(folder / "source")]
    installed = subprocess.run(command, capture_output=True, text=True, timeout=100, check=False)
    assert installed.returncode == 0, installed.stderr
    environment = os.environ | {"PYTHONPATH": str(folder / "packages"), "OMP_NUM_THREADS": "1"}

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "soteacher", *arguments]
        return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=100, check=False)

    return run


def test_its_method_is_listed_and_shown(soteacher: Any) -> None:
    assert "Labels, and the direction of the feature" in soteacher("methods").stdout
    page = soteacher("methods", "show", "cosine").stdout
    assert page.startswith("# cosine\n")
    assert "| `hidden_factor`" in page
    assert "One minus the cosine" in page


def test_a_student_is_trained_with_it(soteacher: Any, tiny_tree: Any, tmp_path: Path) -> None:
    tree = tiny_tree(baseline=None)
    del tree["teachers"]["soteacher"]
    tree["students"] = {"cosine": {"model": "resnet8", "method": "cosine", "terms": {"cosine": {"hidden_factor": 0.5}}}}
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(tree))
    done = soteacher("run", str(tmp_path / "study.yaml"), "--out", str(tmp_path / "run"))
    assert done.returncode == 0, done.stderr
    facts = json.loads((tmp_path / "run/students/standard-cosine/seed0/model.json").read_text())
    assert facts["terms"]["cosine"]["hidden_factor"] == 0.5
    assert facts["row"]["extra_parameters"] == 64 * 32 + 32 + 32 * 64 + 64
    lines = (tmp_path / "run/students/standard-cosine/seed0/metrics.jsonl").read_text().splitlines()
    assert 0 < json.loads(lines[-1])["losses"]["cosine"] < 4


def test_without_it_the_method_is_unknown() -> None:
    command = [sys.executable, "-m", "soteacher", "methods", "show", "cosine"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == 2
    assert "unknown method 'cosine'" in done.stderr
