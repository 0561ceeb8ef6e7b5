"""Planned faults: what the drill (launch/drill.py) does to a run from inside.

A run looks for a plan once, when it starts: the file named by PLAN in its environment. Without one `planned_faults`
returns None and nothing of this file runs. A plan is JSON: {"faults": [{"number", "kind", "step", "rank", ...}]}. Each
fault happens once, however often the run is started again: before it does, its file `fired_NUMBER` is made beside the
plan, which also says when it happened.
"""

from __future__ import annotations

import errno
import json
import os
import random
import signal
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from parallel.regions import local_tensor
from trainer.manifest import ChecksummedFile

Trainer = Any
"""trainer.trainer.Trainer, which imports this file."""
PLAN = "LATTICE_FAULT_PLAN"


@dataclass(frozen=True)
class Fault:
    """One planned fault; filled from the plan."""

    number: int
    kind: str  # of KINDS
    step: int  # happens before this step computes, in whichever start gets there first
    rank: int


class PlannedFaults:
    """The faults of one rank."""

    def __init__(self, plan: Path, rank: int) -> None:
        faults = [Fault(**fault) for fault in json.loads(plan.read_text())["faults"]]
        self._folder = plan.parent
        self._mine = [fault for fault in faults if fault.rank == rank]

    def before_step(self, trainer: Trainer, step: int) -> None:
        """Let happen what is planned for this step and has not happened."""
        for fault in self._mine:
            if fault.step == step and self._is_first(fault):
                KINDS[fault.kind](trainer, random.Random(fault.number))

    def _is_first(self, fault: Fault) -> bool:
        try:
            descriptor = os.open(self._folder / f"fired_{fault.number}", os.O_CREAT | os.O_EXCL | os.O_WRONLY)
        except FileExistsError:
            return False
        os.write(descriptor, f"{time.time()}".encode())
        os.close(descriptor)
        return True


def planned_faults() -> PlannedFaults | None:
    """The faults planned for this rank; None where there is no plan."""
    plan = os.environ.get(PLAN)
    return None if plan is None else PlannedFaults(Path(plan), dist.get_rank())


def _sigkill(trainer: Trainer, draw: random.Random) -> None:
    """At any moment of this step or of the next ones."""
    threading.Timer(draw.uniform(0, 0.1), os.kill, (os.getpid(), signal.SIGKILL)).start()


def _sigterm(trainer: Trainer, draw: random.Random) -> None:
    os.kill(os.getpid(), signal.SIGTERM)


def _hang(trainer: Trainer, draw: random.Random) -> None:
    while True:
        time.sleep(60)


def _slow(trainer: Trainer, draw: random.Random) -> None:
    """From now on this rank is half a second late in every step of this start."""
    next_step = trainer.train_data.next_step

    def late() -> Any:
        time.sleep(0.5)
        return next_step()

    trainer.train_data.next_step = late


def _in_gradients(change: Callable[[torch.Tensor, random.Random], None]) -> Callable[[Trainer, random.Random], None]:
    """Changes the gradients of this rank once, when the next backward is complete."""

    def plant(trainer: Trainer, draw: random.Random) -> None:
        parallel = trainer.state.data_parallel
        finish = parallel.finish_backward

        def finish_and_change() -> None:
            finish()
            parallel.finish_backward = finish
            held = [local_tensor(m.grad) for m in parallel.masters.values() if m.grad is not None]
            change(draw.choice([grad for grad in held if grad.numel()]), draw)

        parallel.finish_backward = finish_and_change

    return plant


def _set(value: float) -> Callable[[torch.Tensor, random.Random], None]:
    def change(tensor: torch.Tensor, draw: random.Random) -> None:
        tensor.view(-1)[draw.randrange(tensor.numel())] = value

    return change


@torch.no_grad()
def flip_a_bit(tensor: torch.Tensor, draw: random.Random) -> None:
    """One bit of one element, in place."""
    words = tensor.detach().view(-1).view(torch.uint8)
    words[draw.randrange(words.numel())] ^= 1 << draw.randrange(8)


def _flip_weight(trainer: Trainer, draw: random.Random) -> None:
    held = [local_tensor(master) for master in trainer.state.data_parallel.masters.values()]
    flip_a_bit(draw.choice([part for part in held if part.numel()]), draw)


def _full_disk(trainer: Trainer, draw: random.Random) -> None:
    """Whatever this rank writes of a checkpoint from now on finds no space, until it starts again."""

    def write(self: ChecksummedFile, data: Any) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    ChecksummedFile.write = write  # type: ignore[method-assign]


def _full_disk_for_metrics(trainer: Trainer, draw: random.Random) -> None:
    """metrics.jsonl becomes a file on a disk without space (where this rank writes it)."""
    if trainer.is_main:
        full = os.open("/dev/full", os.O_WRONLY)
        os.dup2(full, trainer.metrics._metrics.fileno())


def _damage(trainer: Trainer, draw: random.Random) -> None:
    """The newest checkpoint, if one is before it, is cut short or has a bit flipped, and then the process is gone."""
    folders = sorted((trainer.run_dir / "checkpoints").glob("step_*"), key=lambda path: int(path.name[5:]))
    if len(folders) > 1:
        path = draw.choice(sorted(folders[-1].iterdir()))
        content = bytearray(path.read_bytes())
        if draw.random() < 0.5:
            del content[draw.randrange(len(content)) :]
        else:
            content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
        path.write_bytes(content)
    os.kill(os.getpid(), signal.SIGKILL)


def _dead_worker(trainer: Trainer, draw: random.Random) -> None:
    """The process that loads data in the background is killed, as for memory."""
    workers = getattr(trainer.train_data._items, "_workers", [])
    for worker in workers or []:
        os.kill(worker.pid, signal.SIGKILL)


def _lost_file(trainer: Trainer, draw: random.Random) -> None:
    """Reading data fails as it does when a file server has lost the file."""

    def lost() -> Any:
        raise OSError(errno.ESTALE, os.strerror(errno.ESTALE), "the training data")

    trainer.train_data.next_step = lost


KINDS: dict[str, Callable[[Any, random.Random], None]] = {
    "sigkill": _sigkill,
    "sigterm": _sigterm,
    "hang": _hang,
    "slow": _slow,
    "nan": _in_gradients(_set(float("nan"))),
    "inf": _in_gradients(_set(float("inf"))),
    "flip_gradient": _in_gradients(flip_a_bit),
    "flip_weight": _flip_weight,
    "full_disk": _full_disk,
    "full_disk_for_metrics": _full_disk_for_metrics,
    "damaged_checkpoint": _damage,
    "dead_worker": _dead_worker,
    "lost_file": _lost_file,
}
