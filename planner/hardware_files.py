"""configs/hardware: the files of rates, by name and by device."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from planner.hardware import Hardware, problems

FOLDER = Path(__file__).resolve().parent.parent / "configs" / "hardware"


def read_hardware(name: str) -> tuple[Hardware, list[str]]:
    """configs/hardware/NAME.yaml, or the file of that path; and what is wrong with it, a line each."""
    path = Path(name).expanduser() if name.endswith(".yaml") else FOLDER / f"{name}.yaml"
    if not path.is_file():
        known = ", ".join(sorted(file.stem for file in FOLDER.glob("*.yaml")))
        return Hardware(), [f"{name} is not there; use one of {known}, or the path of a YAML like these"]
    try:
        hardware = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(Hardware), OmegaConf.load(path)))
    except Exception as error:  # OmegaConf's and YAML's have no common base
        return Hardware(), [f"{name}: {str(error).splitlines()[0]}"]
    assert isinstance(hardware, Hardware)
    return hardware, [f"{name}: {line}" for line in problems(hardware)]


def hardware_of(device_name: str) -> Hardware | None:
    """The file whose `name` is the device's (torch.cuda.get_device_name); None where no file has it."""
    for path in sorted(FOLDER.glob("*.yaml")):
        hardware, wrong = read_hardware(str(path))
        if hardware.name == device_name and not wrong:
            return hardware
    return None


def as_yaml(
    rates: Mapping[str, Any],
    tables: Mapping[str, list[list[float]]],
    why: Mapping[str, str],
    like: Hardware,
    origin: str,
) -> str:
    """A hardware file of measured `rates`; those that are None or missing are like's, whose name is origin."""
    lines = ["# Written by launch/calibrate.py: measured on this machine but where said."]
    for rate in fields(Hardware):
        value, note = rates.get(rate.name), why.get(rate.name, "")
        if rate.name == "tables":
            value = dict(tables)
        elif value is None:
            value = getattr(like, rate.name)
            note = f"of {origin}, not measured" + (f": {note}" if note else "")
        text = json.dumps(_rounded(value))
        lines.append(f"{rate.name}: {text}" + (f" # {note}" if note else ""))
    return "\n".join(lines) + "\n"


def _rounded(value: Any) -> Any:
    """To four digits, which is more than a measurement repeats."""
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_rounded(item) for item in value]
    return float(f"{value:.4g}") if isinstance(value, float) and value < 1e4 else value
