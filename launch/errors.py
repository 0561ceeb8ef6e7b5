"""How an entry point ends: one readable message, from one rank, and the exit code that says what happened."""

from __future__ import annotations

import contextlib
import os
import sys
import sysconfig
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import torch.distributed as dist

from inference.ranks import RankError
from inference.server.errors import EngineFailedError
from parallel.mesh import rank_from_env
from trainer.checkpoint import CheckpointError
from trainer.config import ConfigError
from trainer.corruption import StateCorrupted
from trainer.masking import mask_text
from trainer.resilience import PREEMPTED_EXIT_CODE
from trainer.trainer import Preempted, TrainingDiverged

CONFIG_EXIT_CODE = 2
EXPECTED = (
    CheckpointError,
    TrainingDiverged,
    StateCorrupted,
    EngineFailedError,
    RankError,
    dist.DistNetworkError,
    dist.DistStoreError,
)
"""Failures whose message says it all, as it does for ValueError and OSError that this project raises itself: bad input,
files, a run that diverged or whose bits changed, a rank that is gone, a port that is taken. Anything else shows its
traceback."""
_ROOT = Path(__file__).resolve().parent.parent
_STDLIB = sysconfig.get_paths()["stdlib"]
_PACKAGES = ("launch", "trainer", "parallel", "models", "kernels", "data", "inference", "planner")
PATIENCE_SECONDS = 3.0
_PATIENCE = timedelta(seconds=PATIENCE_SECONDS)
_SPOKEN, _HEARD = "lattice/failed", "lattice/heard"


def exit_code_of(program: Callable[[list[str]], None], arguments: list[str]) -> int:
    """Run program(arguments); what the process should exit with. Prints at most one message."""
    try:
        program(arguments)
        code = 0
    except ConfigError as error:
        _say_once("".join(f"configuration error: {line}\n" for line in error.problems))
        code = CONFIG_EXIT_CODE
    except Preempted as error:
        _say_once(f"{error}\n")
        code = PREEMPTED_EXIT_CODE
    except Exception as error:
        known = isinstance(error, EXPECTED) or (isinstance(error, (ValueError, OSError)) and _raised_here(error))
        in_full = not known or os.environ.get("LATTICE_TRACEBACK")
        _say_once(traceback.format_exc() if in_full else f"error: {error}\n")
        code = 1
    except KeyboardInterrupt:
        _say_once("interrupted\n")
        code = 130
    if code == 0 and dist.is_initialized():
        dist.destroy_process_group()
    sys.stdout.flush()
    sys.stderr.flush()
    return code


def _raised_here(error: Exception) -> bool:
    """Whether this project raised it, itself or through Python's own modules (a file that cannot be opened), and not a
    library, whose message may mean nothing to a user."""
    places = [Path(frame.filename) for frame in traceback.extract_tb(error.__traceback__)]
    outside = [p for p in places if "site-packages" in p.parts or not p.is_relative_to(_STDLIB)]
    return bool(outside) and any(outside[-1].is_relative_to(_ROOT / package) for package in _PACKAGES)


def _say_once(message: str) -> None:
    """Write to stderr on rank 0. Another rank speaks only if rank 0 has not failed as well within a few seconds.

    It waits either way: a launcher ends all ranks when the first one exits, and rank 0 must have spoken before that.
    """
    rank = rank_from_env()
    store = dist.distributed_c10d._get_default_store() if dist.is_initialized() else None
    if rank == 0:
        _write(message)
        if store is not None:
            _tell_others(store)
    elif store is not None:
        if not _rank0_spoke(store, rank):
            _write(f"rank {rank}: {message}")
    else:
        # Before there is a store, the launcher ending this process tells that another one has failed. Where ranks of
        # one node fail together, one of them is enough: the others wait long, on a loaded machine the first of them
        # may still be importing torch.
        time.sleep(PATIENCE_SECONDS if os.environ.get("LOCAL_RANK", "0") == "0" else 6 * PATIENCE_SECONDS)
        _write(f"rank {rank}: {message}")


def _tell_others(store: dist.Store) -> None:
    """Rank 0: say that it has spoken, and stay until those that failed as well know: the store may end with it."""
    store.set(_SPOKEN, "0")
    with contextlib.suppress(Exception):  # ranks that are well never answer
        store.wait([f"{_HEARD}/{rank}" for rank in range(1, dist.get_world_size())], _PATIENCE)


def _rank0_spoke(store: dist.Store, rank: int) -> bool:
    """Whether rank 0 has failed as well, and said so."""
    try:
        store.wait([_SPOKEN], _PATIENCE)
        store.set(f"{_HEARD}/{rank}", "")
        return True
    except Exception:  # rank 0 is well, or its store is gone with it
        return False


def _write(message: str) -> None:
    sys.stderr.write(mask_text(message))  # a library's error may quote what it was given
    sys.stderr.flush()
