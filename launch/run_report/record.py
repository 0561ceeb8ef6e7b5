"""Reading a run's folder (docs/METRICS.md), of a run that has ended, died, or still goes on."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from trainer.config import ConfigError
from trainer.faults import Hang, hangs_of
from trainer.masking import mask_secrets

Values = list[float | None]
PNG = b"\x89PNG\r\n\x1a\n"


@dataclass(frozen=True)
class RunRecord:
    """One run. Files that are missing leave their part empty: a run that died early has a story too."""

    name: str  # unlike those of the other runs on a page
    folder: Path
    steps: list[int]
    metrics: dict[str, Values]  # by field, one value for each of `steps`; None: that step has none
    events: list[dict[str, Any]]
    info: Mapping[str, Any]  # run.json
    config: dict[str, Any]  # config.yaml by dotted name, secrets masked
    ranks: list[dict[str, Any]]  # ranks.jsonl: {"step", "step_seconds" and "late_seconds": one of each rank}
    timeline: bytes | None  # pipeline_timeline.png
    hangs: list[Hang]  # that have no event yet: no start came after them
    damaged: Mapping[str, int]  # lines that cannot be read, by file: of events.jsonl and ranks.jsonl

    def has(self, field: str) -> bool:
        """Whether any step has a value of this metric."""
        return any(value is not None for value in self.metrics.get(field, ()))

    def last(self, field: str) -> float | None:
        """The newest value of a metric; None without one."""
        return next((value for value in reversed(self.metrics.get(field, [])) if value is not None), None)


def read_runs(folders: Iterable[Path]) -> list[RunRecord]:
    """Raises ConfigError for a folder that is not a run's, and for one that is named twice."""
    folders = [folder.expanduser() for folder in folders]
    problems = [
        f"{folder} is no run: it has neither metrics.jsonl nor run.json" for folder in folders if not _is(folder)
    ]
    resolved = [folder.resolve() for folder in folders]
    problems += [f"{folder} is named twice" for i, folder in enumerate(folders) if resolved[i] in resolved[:i]]
    if problems:
        raise ConfigError(problems)
    return [_read(folder, name) for folder, name in zip(folders, _names(resolved), strict=True)]


def _is(folder: Path) -> bool:
    return (folder / "metrics.jsonl").is_file() or (folder / "run.json").is_file()


def _names(folders: list[Path]) -> list[str]:
    """As much of the end of each path as makes it unlike the others."""
    for length in range(1, max(len(folder.parts) for folder in folders) + 1):
        names = ["/".join(folder.parts[-length:]) for folder in folders]
        if len(set(names)) == len(names):
            return names
    raise AssertionError("two equal folders")


def _read(folder: Path, name: str) -> RunRecord:
    steps, _ = _json_lines(folder / "metrics.jsonl", damaged_too=False)
    lines = [line for line in steps if isinstance(line.get("step"), int)]
    fields = dict.fromkeys(field for line in lines for field in line if field not in ("step", "nonfinite"))
    read = {file: _json_lines(folder / file, damaged_too=True) for file in ("events.jsonl", "ranks.jsonl")}
    return RunRecord(
        name=name,
        folder=folder,
        steps=[line["step"] for line in lines],
        metrics={field: [line.get(field) for line in lines] for field in fields},
        events=read["events.jsonl"][0],
        info=_json_file(folder / "run.json"),
        config=_flat(mask_secrets(_yaml_file(folder / "config.yaml"))),
        ranks=read["ranks.jsonl"][0],
        timeline=_picture(folder / "pipeline_timeline.png"),
        hangs=[hang for hang in hangs_of(folder) if not hang.told],
        damaged={file: number for file, (_, number) in read.items() if number},
    )


def _picture(path: Path) -> bytes | None:
    """A PNG. Anything else of that name, such as a link to another of its reader's files, does not go into a page."""
    content = path.read_bytes() if path.is_file() else b""
    return content if content.startswith(PNG) else None


def _json_lines(path: Path, *, damaged_too: bool) -> tuple[list[dict[str, Any]], int]:
    """The objects in a file's lines, and how many lines are damaged, which is an error without damaged_too.

    A last line that is not whole is not damaged: it is still being written, or its writer was killed.
    """
    if not path.is_file():
        return [], 0
    lines = path.read_text(encoding="utf-8", errors="replace").split("\n")
    found, damaged = [], 0
    for number, line in enumerate(lines, start=1):
        try:
            value = json.loads(line) if line else None
        except ValueError as error:
            if number == len(lines):
                break
            if not damaged_too:
                raise ConfigError([f"{path}, line {number}: {error}; that line is damaged, take it out"]) from None
            damaged += 1
            continue
        if isinstance(value, dict):
            found.append(value)
    return found, damaged


def _json_file(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ConfigError([f"{path}: {error}; move it away to see the rest of the run"]) from None
    return value if isinstance(value, dict) else {}


def _yaml_file(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        value = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ConfigError([f"{path}: {error}; move it away to see the rest of the run"]) from None
    return value if isinstance(value, dict) else {}


def _flat(value: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(value, Mapping) or not value:
        return {prefix: value} if prefix else {}
    parts = [_flat(item, f"{prefix}.{key}" if prefix else str(key)) for key, item in value.items()]
    return {name: item for part in parts for name, item in part.items()}
