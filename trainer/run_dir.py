"""What may happen to a run directory: a new run never overwrites an old one, a restart continues it."""

from __future__ import annotations

from pathlib import Path

import torch.distributed as dist
from omegaconf import OmegaConf

from trainer.config import ConfigError, TrainConfig


def prepare_run_dir(config: TrainConfig, *, resuming: bool) -> None:
    """Create run.dir, or make sure that starting in the existing one loses nothing. All ranks call it together.

    Without a checkpoint to continue from, a directory that already has metrics is only entered by a restart of the same
    configuration (a launcher that starts a crashed run again); the old metrics are kept beside the new. Raises
    ConfigError on every rank otherwise.
    """
    verdict: list[str | None] = [None]
    if dist.get_rank() == 0:
        verdict = [_prepare(config, resuming=resuming)]
    dist.broadcast_object_list(verdict, src=0)
    if verdict[0] is not None:
        raise ConfigError([verdict[0]])


def _prepare(config: TrainConfig, *, resuming: bool) -> str | None:
    run_dir = Path(config.run.dir)
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        return f"run.dir={run_dir} cannot be created: {error.strerror}"
    metrics = run_dir / "metrics.jsonl"
    if resuming or not metrics.exists() or metrics.stat().st_size == 0:
        return None
    if config.checkpoint.resume == "auto" and _same_run(config, run_dir / "config.yaml"):
        number = 1
        while (kept := run_dir / f"metrics.attempt{number}.jsonl").exists():
            number += 1
        metrics.rename(kept)
        return None
    return (
        f"run.dir={run_dir} already holds a run ({metrics}) and there is no checkpoint to continue from "
        f"(checkpoint.resume={config.checkpoint.resume}); choose another run.dir or delete it"
    )


def _same_run(config: TrainConfig, path: Path) -> bool:
    """Whether the configuration written at the last start is this one."""
    try:
        return OmegaConf.to_container(OmegaConf.load(path)) == OmegaConf.to_container(OmegaConf.structured(config))
    except (OSError, ValueError):
        return False
