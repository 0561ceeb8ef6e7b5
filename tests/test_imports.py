"""Who imports whom: the rule of the design, read from the source and held."""

from __future__ import annotations

import ast
import re
import sys
import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

_LIBRARY = {"kernels", "parallel", "data"}
_MODELLING = _LIBRARY | {"models", "inference", "planner"}
ALLOWED: dict[str, set[str]] = {  # besides itself
    "kernels": set(),
    "parallel": set(),
    "data": set(),
    "models": {"kernels", "parallel"},
    "inference": {"models", "parallel", "kernels", "data"},
    "planner": {"models", "parallel"},
    "trainer": _MODELLING,
    "launch": _MODELLING | {"trainer"},
    "benchmarks": _MODELLING | {"trainer", "launch"},
}
OURS = {*ALLOWED, "tests"}
COMES_WITH = {
    "hydra": "hydra-core",
    "yaml": "omegaconf",
    "pyarrow": "datasets",
    "PIL": "matplotlib",
}  # what is imported -> the dependency that brings it


def modules_of(root: Path) -> dict[str, Path]:
    """Every module of the product below root by its dotted name; a package goes by the name of its folder."""
    found = {}
    for package in ALLOWED:
        for path in sorted((root / package).rglob("*.py")):
            parts = path.relative_to(root).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imports_of(name: str, path: Path, modules: Mapping[str, Path]) -> Iterator[tuple[int, str]]:
    """(line, dotted name) of everything a module imports, also inside functions.

    `from a import b` is a.b if that is one of our modules, else a.
    """
    package = name.split(".") if path.name == "__init__.py" else name.split(".")[:-1]
    for node in ast.walk(ast.parse(path.read_text(), str(path))):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            origin = ".".join([*base, *(node.module.split(".") if node.module else [])])
            for alias in node.names:
                inner = f"{origin}.{alias.name}"
                yield node.lineno, inner if inner in modules else origin


def violations(root: Path) -> list[str]:
    """Every import the design forbids, as file:line."""
    modules = modules_of(root)
    found = []
    for name, path in modules.items():
        package = name.split(".")[0]
        for line, target in imports_of(name, path, modules):
            other = target.split(".")[0]
            if other in OURS and other != package and other not in ALLOWED[package]:
                found.append(f"{path.relative_to(root)}:{line}: {package} must not import {target}")
    return found


def cycle(root: Path) -> list[str]:
    """Modules that import one another in a circle; empty if there are none."""
    modules = modules_of(root)
    graph: dict[str, set[str]] = {}
    for name, path in modules.items():
        graph[name] = set()
        for _, target in imports_of(name, path, modules):
            parts = target.split(".")
            for end in range(1, len(parts) + 1):  # importing a.b.c runs a and a.b as well
                part = ".".join(parts[:end])
                # A package being entered when its own module is imported is no circle; Python allows for it.
                if part in modules and not f"{name}.".startswith(f"{part}."):
                    graph[name].add(part)
    done: set[str] = set()

    def search(name: str, above: list[str]) -> list[str]:
        if name in above:
            return [*above[above.index(name) :], name]
        if name in done:
            return []
        for target in sorted(graph[name]):
            if found := search(target, [*above, name]):
                return found
        done.add(name)
        return []

    return next((found for name in graph if (found := search(name, []))), [])


def test_packages_import_only_what_the_design_allows() -> None:
    """A kernel that knows the model, a model that knows the trainer: parts that cannot be used or read alone."""
    assert violations(ROOT) == []


def test_no_modules_import_one_another_in_a_circle() -> None:
    """A circle hidden by an import inside a function, which works until somebody imports the other end first."""
    assert cycle(ROOT) == []


def test_the_product_imports_only_what_it_declares() -> None:
    """A library that is there by accident, or for the tests only, such as transformers.

    What runs other projects to compare with them imports these; nothing else needs them.
    """
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    optional = [project["optional-dependencies"][extra] for extra in ("plot", "serve", "constrained", "eval")]
    dependencies = sum(optional, project["dependencies"])  # these are asked for before they are imported
    declared = {re.split(r"[<>=;\[ ]", dependency)[0].lower().replace("-", "_") for dependency in dependencies}
    modules = modules_of(ROOT)
    missing = []
    for name, path in modules.items():
        if name.startswith("benchmarks.peers."):
            continue
        for line, target in imports_of(name, path, modules):
            top = target.split(".")[0]
            if top in OURS or top in sys.stdlib_module_names:
                continue
            if COMES_WITH.get(top, top).replace("-", "_") not in declared:
                missing.append(f"{path.relative_to(ROOT)}:{line}: {top}")
    assert missing == []


def write(root: Path, files: Mapping[str, str]) -> None:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)


@pytest.mark.parametrize(
    ("file", "line"),
    [
        ("kernels/a.py", "import models.llama"),
        ("models/layers/a.py", "def f():\n    from data.batch import Batch"),
        ("data/a.py", "from parallel import mesh"),
        ("inference/a.py", "from trainer.trainer import Trainer"),
        ("trainer/a.py", "import launch"),
        ("launch/a.py", "from tests.pool import RankPool"),
    ],
)
def test_a_forbidden_import_is_found(file: str, line: str, tmp_path: Path) -> None:
    """Negative control: a reader of imports that overlooks some."""
    write(tmp_path, {file: line, "trainer/good.py": "import data.batch\nfrom models import llama\nimport torch"})
    (found,) = violations(tmp_path)
    assert found.startswith(f"{file}:")


@pytest.mark.parametrize(
    "files",
    [
        {"data/a.py": "import data.b", "data/b.py": "def f():\n    from data.a import x"},
        {"data/a.py": "from data import b", "data/b.py": "from . import c", "data/c.py": "from .a import x"},
        {"data/x/__init__.py": "from data.y import f", "data/y.py": "from data.x.z import g", "data/x/z.py": ""},
    ],
)
def test_a_circle_is_found(files: dict[str, str], tmp_path: Path) -> None:
    """Negative control: relative imports, imports in functions, or those of a package's own file left out."""
    write(tmp_path, {"data/__init__.py": "", "data/good.py": "import data.a"} | files)
    assert len(cycle(tmp_path)) >= 3


def test_a_package_that_passes_on_its_own_modules_is_no_circle(tmp_path: Path) -> None:
    """A rule so strict that everybody would have to work around it."""
    files = {"__init__.py": "from data.x.y import f", "y.py": "from data.x.z import g", "z.py": ""}
    write(tmp_path, {f"data/x/{name}": text for name, text in files.items()})
    assert cycle(tmp_path) == []


@pytest.mark.parametrize("folder", ["launch", "benchmarks"])
def test_a_script_hides_no_module_of_python(folder: str) -> None:
    """A script's folder comes first in sys.path: with a profile.py beside it, `import cProfile` inside torch fails."""
    names = {path.stem for path in (ROOT / folder).iterdir() if path.suffix == ".py" or path.is_dir()}
    assert not names & set(sys.stdlib_module_names)
