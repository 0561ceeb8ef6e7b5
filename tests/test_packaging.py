"""The project beside transformers, which looks for another project's package under our top-level name `kernels`."""

from __future__ import annotations

import fnmatch
import importlib.metadata
import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.version import Version
from transformers.utils import import_utils

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())

BUILD_AND_RUN = """
import torch, transformers
assert not transformers.utils.is_kernels_available()
config = transformers.LlamaConfig(
    vocab_size=31, hidden_size=8, intermediate_size=12, num_hidden_layers=1, num_attention_heads=2
)
model = transformers.LlamaForCausalLM(config)
model(input_ids=torch.arange(7)[None], labels=torch.arange(7)[None]).loss.backward()
assert all(parameter.grad is not None for parameter in model.parameters())
import kernels
print(kernels.__file__)
"""

# What transformers does when no distribution owns the name: it imports the package and asks for its version.
WITHOUT_METADATA = """
import importlib.metadata
def not_found(name):
    if name in ("kernels", "lattice-train", "lattice_train"):
        raise importlib.metadata.PackageNotFoundError(name)
    return found(name)
found, importlib.metadata.version = importlib.metadata.version, not_found
"""


def run(program: str, *path: Path) -> str:
    """stdout of a program in a new interpreter at the repository root, with these folders first in its path."""
    finished = subprocess.run(
        [sys.executable, "-c", program],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(map(str, path))},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert finished.returncode == 0, finished.stderr
    return finished.stdout.strip()


@pytest.mark.parametrize("metadata", ["", WITHOUT_METADATA], ids=["installed", "from a clone"])
def test_transformers_does_not_take_our_kernels_for_its_own(metadata: str) -> None:
    """transformers replacing layers by what it imports from our package, or failing to build a model."""
    assert run(metadata + BUILD_AND_RUN, ROOT) == str(ROOT / "kernels" / "__init__.py")


def test_transformers_would_take_a_package_of_a_version_in_its_range(tmp_path: Path) -> None:
    """Negative control: the test above passing because transformers stopped looking."""
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "__init__.py").write_text("")
    (tmp_path / "kernels-0.dist-info").mkdir()
    metadata = f"Metadata-Version: 2.1\nName: kernels\nVersion: {import_utils.KERNELS_MIN_VERSION}\n"
    (tmp_path / "kernels-0.dist-info" / "METADATA").write_text(metadata)
    program = "import transformers.utils.import_utils as u; print(u.is_kernels_available())"
    assert run(program, tmp_path, ROOT) == "True"


def test_our_version_is_outside_the_range_transformers_accepts() -> None:
    """A release that transformers would take for the other project's."""
    versions = {PROJECT["project"]["version"]}
    versions |= {d.version for d in importlib.metadata.distributions(name=PROJECT["project"]["name"])}
    for version in versions:
        low, high = Version(import_utils.KERNELS_MIN_VERSION), Version(import_utils.KERNELS_MAX_VERSION)
        assert not low <= Version(version) <= high


def test_importing_kernels_imports_nothing_else() -> None:
    """Every `import transformers` beside a clone paying for torch, triton and our ops."""
    program = "import sys; before = set(sys.modules); import kernels; print(sorted(set(sys.modules) - before))"
    assert run(program, ROOT) == "['kernels']"


def test_every_package_is_in_the_distribution() -> None:
    """A new top-level folder that works in a clone and is missing where the project was installed."""
    patterns = PROJECT["tool"]["setuptools"]["packages"]["find"]["include"]
    folders = {path.parent.name for path in ROOT.glob("*/__init__.py")} - {"tests", "benchmarks"}
    assert {"kernels", "trainer"} <= folders
    assert {folder for folder in folders if not any(fnmatch.fnmatch(folder, p) for p in patterns)} == set()
