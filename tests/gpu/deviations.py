"""What tests on GPUs measured, for benchmarks/results/: build/gpu/NAME.json, anew each time."""

from __future__ import annotations

import json
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

FOLDER = Path(__file__).resolve().parents[2] / "build" / "gpu"

_measured: dict[str, dict[str, Any]] = {}


def keep(table: str, name: str, measured: Sequence[float], limits: Sequence[float]) -> None:
    """A row: relative deviations of losses, and of first gradients from their tensor's maximum, with what the
    test allows. Written at once, so that a run which is stopped leaves what it has."""
    rows = _measured.setdefault(table, {})
    columns = ("loss", "gradient")
    row = dict(zip(columns, measured, strict=False))
    rows[name] = row | {f"{column}_limit": limit for column, limit in zip(columns, limits, strict=False)}
    made_with = {
        "gpu": torch.cuda.get_device_name(),
        "num_gpus": torch.cuda.device_count(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "nccl": ".".join(map(str, torch.cuda.nccl.version())),
        "python": platform.python_version(),
    }
    FOLDER.mkdir(parents=True, exist_ok=True)
    (FOLDER / f"{table}.json").write_text(json.dumps({"made_with": made_with, "rows": rows}, indent=1) + "\n")


def log(line: str) -> None:
    """A line of build/gpu/progress.log: the runs of a module are all made before its first test says anything."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    with (FOLDER / "progress.log").open("a") as file:
        file.write(line + "\n")
