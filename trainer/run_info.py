"""What a run was made of, beside its metrics: run.json (what was really used) and config.yaml (what was asked)."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf

from trainer.masking import mask_argv, mask_secrets


@dataclass
class RunInfo:
    """What only the trainer knows about a start of a run. Filled by the trainer."""

    device: torch.device  # of this rank
    world_size: int
    mesh: Mapping[str, int]  # size of each mesh axis, in mesh order
    kernels: Mapping[str, str]  # op -> implementation really used, such as {"attention": "sdpa"}
    precision: Mapping[str, str]  # what -> dtype really used, such as {"compute": "bf16", "master": "fp32"}
    flops_per_token: float  # forward and backward of one token, recomputation not counted
    flops_per_token_causal: float  # the same, where attention counts what a token may see
    peak_flops: float | None  # FLOP/s per device that MFU is against
    pipeline: Mapping[str, Any] | None = None  # trainer.pipelined.PlanOfStep.fields; None: there is no pipeline
    resume_step: int = 0  # steps already done before this start
    argv: Sequence[str] = field(default_factory=lambda: tuple(sys.argv))


def write_run_info(run_dir: Path, info: RunInfo) -> dict[str, Any]:
    """Write run_dir/run.json and return its content. The fields describe the newest start; `starts` has one entry each.

    Raises ValueError when run.json is there and cannot be read.
    """
    path = run_dir / "run.json"
    command = mask_argv(info.argv)
    start = {
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "resume_step": info.resume_step,
        "world_size": info.world_size,
        "mesh": dict(info.mesh),
        "command": command,
    }
    content = {
        "versions": software_versions(),
        "device": device_info(info.device),
        "world_size": info.world_size,
        "mesh": dict(info.mesh),
        "kernels": dict(info.kernels),
        "precision": dict(info.precision),
        "pipeline": None if info.pipeline is None else dict(info.pipeline),
        "flops_per_token": info.flops_per_token,
        "flops_per_token_causal": info.flops_per_token_causal,
        "peak_flops": info.peak_flops,
        "command": command,
        "starts": [*_earlier_starts(path), start],
    }
    write_atomically(path, json.dumps(content, indent=2) + "\n")
    return content


def add_to_run_info(run_dir: Path, **fields: Any) -> None:
    """Add what was not known at the start. run.json is there."""
    path = run_dir / "run.json"
    write_atomically(path, json.dumps(json.loads(path.read_text()) | fields, indent=2) + "\n")


def _earlier_starts(path: Path) -> list[dict[str, Any]]:
    if not path.exists():
        return []
    try:
        return list(json.loads(path.read_text())["starts"])
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} cannot be read ({error!r}); move it away to start a new one") from error


def write_config(run_dir: Path, config: Any) -> Path:
    """Write a configuration dataclass to run_dir/config.yaml, every field with its value, secrets masked.

    A restart may change the configuration: config.yaml is then the newest, the one before stays as config.N.yaml.
    """
    path = run_dir / "config.yaml"
    text = OmegaConf.to_yaml(OmegaConf.create(mask_secrets(asdict(config))))
    if path.exists():
        if path.read_text() == text:
            return path
        number = 1
        while (kept := run_dir / f"config.{number}.yaml").exists():
            number += 1
        write_atomically(kept, path.read_text())
    write_atomically(path, text)
    return path


def write_atomically(path: Path, text: str) -> None:
    """Put text at path so that a reader, or a crash at any moment, sees the old file or the new one, never a part."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    with open(temporary, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def software_versions() -> dict[str, str | None]:
    """Versions that decide what a run computes; None: not there."""
    commit, dirty = _git_state()
    cuda = torch.cuda.is_available()
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "cudnn": str(torch.backends.cudnn.version()) if cuda else None,
        "nccl": ".".join(map(str, torch.cuda.nccl.version())) if cuda else None,
        "triton": _package_version("triton"),
        "lattice": _package_version("lattice-train"),
        "git_commit": f"{commit}-dirty" if commit and dirty else commit,
    }


def device_info(device: torch.device) -> dict[str, Any]:
    """Name, count on this host and memory (GiB, of one) of the kind of device a rank runs on."""
    if device.type != "cuda":
        pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        return {"type": device.type, "name": "cpu", "count": os.cpu_count(), "memory_gib": round(pages / 2**30, 2)}
    properties = torch.cuda.get_device_properties(device)
    return {
        "type": "cuda",
        "name": properties.name,
        "count": torch.cuda.device_count(),
        "memory_gib": round(properties.total_memory / 2**30, 2),
    }


def _package_version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _git_state() -> tuple[str | None, bool]:
    """(commit, has uncommitted changes) of the checkout this file is in; (None, False) for an installed package."""
    root = Path(__file__).resolve().parents[1]

    def git(*args: str) -> str | None:
        try:
            done = subprocess.run(["git", *args], cwd=root, capture_output=True, text=True, timeout=10, check=True)
        except (OSError, subprocess.SubprocessError):
            return None
        return done.stdout.strip()

    # Installed in a virtual environment inside some other project's checkout, git would answer for that project.
    top = git("rev-parse", "--show-toplevel")
    if not top or Path(top).resolve() != root:
        return None, False
    return git("rev-parse", "HEAD"), bool(git("status", "--porcelain", "--untracked-files=no"))
