"""What `make parity` measured: docs/composes.json, and the file of a part of it."""

from __future__ import annotations

import hashlib
import json
import platform
import subprocess
from pathlib import Path
from typing import Any

import torch

from tests.parity.lattice import FEATURES

ROOT = Path(__file__).resolve().parents[2]
MEASURED = ROOT / "docs" / "composes.json"
PROGRAM = ("compare.py", "cross_product.py", "harness.py", "lattice.py")
SOURCES = ("data", "kernels", "models", "parallel", "trainer", *(f"tests/parity/{name}" for name in PROGRAM))
"""What decides a measurement."""

Record = dict[str, Any]
"""`layout`; its deviations, unless it failed; `problems`, which is empty for a layout that composes."""


def save(records: list[Record], made_with: list[dict[str, str]]) -> None:
    """docs/composes.json, a line per layout."""
    head = f'{{"made_with": {json.dumps(made_with)},\n"layouts": [\n'
    MEASURED.write_text(head + ",\n".join(map(_line, records)) + "\n]}\n")


def load() -> list[Record]:
    """The records that `save` wrote."""
    return [_record(line) for line in json.loads(MEASURED.read_text())["layouts"]]


def load_made_with() -> list[dict[str, str]]:
    """With which torch, and from which commit, the records were measured: the newest last."""
    made_with: list[dict[str, str]] = json.loads(MEASURED.read_text())["made_with"]
    return made_with


def made_here() -> dict[str, str]:
    """What a measurement that is made now is made with."""
    return _versions() | {"commit": commit()}


def commit() -> str:
    """The commit that is checked out."""

    def git(*arguments: str) -> str:
        return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True).stdout.strip()

    changes = ", with changes" if git("status", "--porcelain", "--untracked-files=no", *SOURCES) else ""
    return git("rev-parse", "HEAD") + changes


class PartFile:
    """The records of a part, a line each behind a line that says what they are made with.

    A record is written when its layout is done, so that a part which was killed goes on behind it. A digest of the
    sources stands for the commit, because parts may run where there is no git.
    """

    def __init__(self, path: Path) -> None:
        """Raises ValueError for a file that other sources or versions have made."""
        self.path = path
        self.records: list[Record] = []
        self.made_with = _versions() | {"sources": digest_of_sources()}
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(self.made_with) + "\n")
            return
        self.made_with, self.records = read_part(path)
        if self.made_with != _versions() | {"sources": digest_of_sources()}:
            raise ValueError(f"{path} was made by another version of the sources, Python or torch; delete it")
        path.write_text("\n".join([json.dumps(self.made_with), *map(_line, self.records)]) + "\n")  # whole lines only

    def add(self, record: Record) -> None:
        self.records.append(record)
        with self.path.open("a") as file:
            file.write(_line(record) + "\n")


def read_part(path: Path) -> tuple[dict[str, str], list[Record]]:
    """What a part was made with, and its records; a last line that was not written to its end is left out."""
    first, *lines = path.read_text().split("\n")[:-1]
    return json.loads(first), [_record(json.loads(line)) for line in lines]


def merge(paths: list[Path]) -> tuple[list[Record], list[dict[str, str]]]:
    """The records of several parts, and what they were made with.

    Raises ValueError for parts of other sources than those here, whose commit they are given.
    """
    records: list[Record] = []
    made_with: list[dict[str, str]] = []
    for path in paths:
        made, found = read_part(path)
        if made.pop("sources") != digest_of_sources():
            raise ValueError(f"{path} was made by other sources than those that are checked out; check out theirs")
        made["commit"] = commit()
        if made not in made_with:
            made_with.append(made)
        records += found
    return records, made_with


def digest_of_sources() -> str:
    """Of everything that decides a measurement."""
    digest = hashlib.sha256()
    for source in SOURCES:
        for file in [ROOT / source] if source.endswith(".py") else sorted((ROOT / source).rglob("*.py")):
            digest.update(str(file.relative_to(ROOT)).encode() + b"\0" + file.read_bytes() + b"\0")
    return digest.hexdigest()


def _versions() -> dict[str, str]:
    return {"python": platform.python_version(), "torch": torch.__version__}


def _line(record: Record) -> str:
    return json.dumps(record | {"layout": list(record["layout"].values())})


def _record(line: dict[str, Any]) -> Record:
    return line | {"layout": dict(zip(FEATURES, line["layout"], strict=True))}
