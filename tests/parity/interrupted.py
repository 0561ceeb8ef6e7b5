"""A run that is stopped on purpose, and what it did until then, on every rank."""

from __future__ import annotations

import json
import os
import signal
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from data.batch import Batch
from tests.parity.harness import whole
from tests.pool import RankPool
from trainer.config import TrainConfig
from trainer.trainer import Preempted, Trainer
from trainer.validate import finalize

Rows = dict[int, list[tuple[int, list[int], list[int]]]]
"""Step to (sample number, tokens, labels) of the rows that one rank, or all of them, trained on."""


class Crash(Exception):
    """What a test raises in the middle of a run."""


@dataclass
class Part:
    """One start of a run. Filled by `run_part` on rank 0, except rows, which each rank has its own of."""

    ended: str = "finished"  # finished, crashed or preempted
    state_at_start: dict[str, torch.Tensor] = field(default_factory=dict)  # all that a checkpoint holds; whole tensors
    state_at_end: dict[str, torch.Tensor] = field(default_factory=dict)
    rows: Rows = field(default_factory=dict)
    lines: list[dict[str, Any]] = field(default_factory=list)  # of metrics.jsonl, of all starts so far
    resumed_from: str | None = None

    def of(self, name: str) -> list[Any]:
        """A field of every line, in order."""
        return [line[name] for line in self.lines]


def whole_state(trainer: Trainer) -> dict[str, torch.Tensor]:
    """Weights, optimizer and loss scale. Collective."""
    return {name: whole(tensor).cpu() for name, tensor in trainer.state.state_tensors().items()}


def run_part(config: TrainConfig, crash_before: int | None = None, signals: dict[int, int] | None = None) -> Part:
    """Start, or continue, a run on this rank's group: to its end, or until it stops.

    crash_before: all ranks raise just before this step, with nothing saved. signals: rank to the step during which it
    sends SIGTERM to itself.
    """
    trainer = Trainer(finalize(config, world_size=dist.get_world_size()))
    part = Part(state_at_start=whole_state(trainer))
    part.resumed_from = None if trainer.resume_from is None else trainer.resume_from.name
    next_step = trainer.train_data.next_step

    def recorded() -> list[Batch]:
        step = trainer.state.step + 1
        if step == crash_before:
            raise Crash
        if signals and signals.get(dist.get_rank()) == step:
            os.kill(os.getpid(), signal.SIGTERM)
        batches = next_step()
        rows = [zip(b.samples.tolist(), b.tokens.tolist(), b.labels.tolist(), strict=True) for b in batches]
        part.rows[step] = [row for batch in rows for row in batch]
        return batches

    trainer.train_data.next_step = recorded  # type: ignore[method-assign]
    try:
        trainer.run()
    except Crash:
        part.ended = "crashed"
        trainer.checkpoints.wait()  # in reality the process, and with it the thread that writes, has ended
    except Preempted:
        part.ended = "preempted"
    finally:
        part.state_at_end = whole_state(trainer)
        trainer.close()
        trainer.lock.release()  # a crashed run holds it until its process ends, which a pool rank does not
    part.lines = [json.loads(line) for line in (Path(config.run.dir) / "metrics.jsonl").read_text().splitlines()]
    return part


def run_part_on(ranks: RankPool, world_size: int, config: TrainConfig, **kwargs: Any) -> Part:
    """`run_part` on pool ranks: rank 0's, with the rows of all ranks in the order of the global batch."""
    parts = ranks.run(world_size, run_part, config, **kwargs)
    assert len({part.ended for part in parts}) == 1, [part.ended for part in parts]
    first = parts[0]
    first.rows = {step: sorted(row for part in parts for row in part.rows[step]) for step in first.rows}
    return first
