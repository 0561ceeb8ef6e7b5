"""Starting a trainer on pool ranks when that may be refused: what was said, and what it left behind."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from pathlib import Path

import torch.distributed as dist

from tests.pool import RankPool
from trainer.config import TrainConfig
from trainer.trainer import Trainer
from trainer.validate import finalize


@dataclass
class Start:
    """One rank's attempt to start, and to train to the end. Filled by `start_here`."""

    error: str | None = None  # type of what was raised
    message: str = ""
    warnings: list[str] = field(default_factory=list)
    resumed_from: str | None = None
    last_step: int | None = None


def start_here(config: TrainConfig) -> Start:
    """Train on this rank's group; its Start."""
    start = Start()
    handler = logging.Handler()
    handler.emit = lambda record: start.warnings.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("trainer").addHandler(handler)
    try:
        trainer = Trainer(finalize(config, world_size=dist.get_world_size()))
        start.resumed_from = None if trainer.resume_from is None else str(trainer.resume_from)
        try:
            start.last_step = trainer.run()["step"]
        finally:
            trainer.close()
    except Exception as error:
        start.error, start.message = type(error).__name__, str(error)
    finally:
        logging.getLogger("trainer").removeHandler(handler)
    return start


def start_on(ranks: RankPool, world_size: int, config: TrainConfig) -> Start:
    """`start_here` on pool ranks: rank 0's. All ranks must have ended the same way."""
    starts = ranks.run(world_size, start_here, config)
    assert len({(start.error, start.message, start.resumed_from, start.last_step) for start in starts}) == 1, starts
    return starts[0]


def contents(folder: Path) -> dict[str, bytes | None]:
    """Every file below a folder with its bytes, every directory with None; empty if there is no folder."""
    return {str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}
