"""What may happen to a run directory: a new run never overwrites an old one, a restart continues it."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch.distributed as dist
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from trainer.checkpoint import committed_steps, resolve_resume
from trainer.config import ConfigError, TrainConfig
from trainer.masking import mask_secrets
from trainer.run_lock import RunLock


def check_run_dir(config: TrainConfig, lock: RunLock) -> None:
    """Raise ConfigError, on every rank, if run.dir is in use or holds a run that this start would overwrite.

    Collective. lock: of run.dir; from here on rank 0 holds it, if there has been a run.
    """
    _agree_on(lock.take(create=False) or _obstacle(config) if dist.get_rank() == 0 else None)


def find_start(config: TrainConfig, group: dist.ProcessGroup | None = None) -> Path | None:
    """The checkpoint that this start begins from; None: step 1 of a new run. Collective; changes nothing on disk.

    A path in checkpoint.resume says where a run begins; once the run has checkpoints of its own, a restart by the
    launcher continues from those. group: for verifying the files; one with patience, as large ones take longer than the
    default group waits. Raises CheckpointError for a checkpoint that is not there or damaged.
    """
    resume, own = config.checkpoint.resume, Path(config.run.dir) / "checkpoints"
    if resume in ("auto", "never"):
        return resolve_resume(resume, own, group=group)
    return resolve_resume("auto", own, group=group) or resolve_resume(resume, own, group=group)


def enter_run_dir(config: TrainConfig, start: Path | None, lock: RunLock) -> None:
    """Create run.dir, once everything is known to be right. Collective.

    start: from find_start. lock: from here on rank 0 holds it. A start that is no continuation keeps the metrics of the
    attempt before beside its own. Raises ConfigError on every rank when the directory cannot be written.
    """
    _agree_on(_enter(Path(config.run.dir), start, lock) if dist.get_rank() == 0 else None)


def _agree_on(problem: str | None) -> None:
    """Raise rank 0's problem, if there is one, on every rank."""
    verdict = [problem]
    dist.broadcast_object_list(verdict, src=0)
    if verdict[0] is not None:
        raise ConfigError([verdict[0]])


def _obstacle(config: TrainConfig) -> str | None:
    """Why this start would lose something in run.dir; None: it would not."""
    run_dir, resume = Path(config.run.dir), config.checkpoint.resume
    saved = committed_steps(run_dir / "checkpoints")
    if not saved and not _has_metrics(run_dir):
        return None
    before = _configuration_of(run_dir)
    again = before == mask_secrets(OmegaConf.to_container(OmegaConf.structured(config)))
    what = f"run.dir={run_dir} already holds a run"
    if resume == "never":
        return f"{what}, and checkpoint.resume=never would overwrite it; choose another run.dir or delete it"
    if resume == "auto":
        if saved or again:
            return None
        return (
            f"{what} of another configuration and no checkpoint to continue from; choose another run.dir or delete it"
        )
    if again or (saved and before.get("checkpoint", {}).get("resume") == resume):
        return None  # the same command again, by a launcher that restarts
    path = Path(resume).expanduser().resolve()
    if not path.is_relative_to(run_dir.resolve()):
        return (
            f"{what}, which did not begin from checkpoint.resume={resume}; choose another run.dir, or continue that "
            "run with checkpoint.resume=auto"
        )
    if path.name in (f"step_{step}" for step in saved[:-1]):
        return (
            f"checkpoint.resume={resume} would step back in run.dir={run_dir}, which goes on to step_{saved[-1]}; "
            "choose another run.dir for what is new"
        )
    return None


def _enter(run_dir: Path, start: Path | None, lock: RunLock) -> str | None:
    try:
        (run_dir / "checkpoints").mkdir(parents=True, exist_ok=True)
    except OSError as error:
        return f"run.dir={run_dir} cannot be created: {error.strerror}"
    if not os.access(run_dir, os.W_OK):
        return f"run.dir={run_dir} cannot be written; change its permissions or choose another"
    if (in_use := lock.take(create=True)) is not None:
        return in_use
    continues = start is not None and start.resolve().is_relative_to(run_dir.resolve())
    if not continues and _has_metrics(run_dir):
        number = 1
        while (kept := run_dir / f"metrics.attempt{number}.jsonl").exists():
            number += 1
        (run_dir / "metrics.jsonl").rename(kept)
    return None


def _has_metrics(run_dir: Path) -> bool:
    metrics = run_dir / "metrics.jsonl"
    return metrics.is_file() and metrics.stat().st_size > 0


def _configuration_of(run_dir: Path) -> dict[str, Any]:
    """The configuration written at the last start; empty without one that can be read."""
    try:
        content = OmegaConf.to_container(OmegaConf.load(run_dir / "config.yaml"))
    except (OSError, ValueError, OmegaConfBaseException):
        return {}
    return {str(key): value for key, value in content.items()} if isinstance(content, dict) else {}
