"""Checkpoints: sharded, written beside training, complete or absent, verified, and loadable on any layout.

    checkpoints/step_N/
        __R_0.distcp     what rank R wrote (torch.distributed.checkpoint)
        .metadata        which part of which tensor is where
        extra.json       everything that is not a tensor: schedule, seeds, data cursor, loss scale, model config
        manifest.json    size and checksum of each file above

A save copies this rank's shards to host memory and returns; a thread writes them to `.step_N.tmp` through its own gloo
group, and rank 0 renames the folder once all ranks are done. So a crash at any moment leaves step_N complete or not
there. The directory must be shared by all nodes.
"""

from __future__ import annotations

import json
import logging
import re
import shutil
import threading
from collections import deque
from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from parallel.regions import Located
from trainer.agreement import CheckpointError, Ranks, describe
from trainer.config import CheckpointConfig
from trainer.manifest import (
    EXTRA,
    FileRecord,
    Manifest,
    file_problem,
    read_manifest,
    sync_folder,
    verify,
    write_manifest,
    write_synced,
)
from trainer.staging import HostArena, Shard, local_shards
from trainer.storage import TensorReader, mismatches, read_tensor, read_tensors, tensor_shapes, write_shards

__all__ = [
    "CheckpointError",
    "CheckpointManager",
    "TensorReader",
    "find_checkpoint",
    "newest_checkpoint",
    "read_extra",
    "read_tensor",
    "resolve_resume",
    "tensor_shapes",
    "verify",
]

logger = logging.getLogger(__name__)

_STEP = re.compile(r"step_(\d+)")
_LEFTOVER = re.compile(r"\.(step_\d+)\.(tmp|old|trash)")
# How long a rank waits for the slowest writer. The trainer's own collectives notice a dead rank much earlier.
_PATIENCE = timedelta(hours=1)


class CheckpointManager:
    """Writes and reads the checkpoints of one run. Every method is collective: all ranks call it, in the same order."""

    def __init__(self, directory: Path, config: CheckpointConfig, *, device: torch.device) -> None:
        """directory: the run's `checkpoints/`, made by the first save; what a crash left half done in it is cleared.

        Raises CheckpointError without a process group (a group of one will do) or when directory cannot be cleared.
        """
        if not dist.is_initialized():
            raise CheckpointError("CheckpointManager needs an initialised process group; one process makes a group too")
        self._directory = directory
        self._config = config
        # Of its own, because a thread's collectives must not interleave with the trainer's on one group.
        self._ranks = Ranks(dist.new_group(backend="gloo", timeout=_PATIENCE))
        self._arena = HostArena(device)
        self._thread: threading.Thread | None = None
        self._error: CheckpointError | None = None
        self._committed: deque[int] = deque()  # filled by the writer thread
        self._ranks.on_first(lambda: _tidy(directory))

    @property
    def group(self) -> dist.ProcessGroup | None:
        """All ranks, over gloo, with the patience that reading and writing whole checkpoints needs."""
        return self._ranks.group

    def save(
        self, step: int, tensors: Mapping[str, Located], extra: Mapping[str, Any], *, blocking: bool = False
    ) -> None:
        """Save as step_{step}, replacing one that is there. On return the tensors may change.

        tensors: plain ones hold the same on every rank that has them and are written once; DTensors are written in
        their shards. Ranks may have different names (stages of a pipeline): the checkpoint holds the union.
        extra: JSON values with string keys, the same on every rank (rank 0's are written); tuples come back as lists.
        blocking: return when the checkpoint is committed; also with checkpoint.asynchronous=false.
        Raises CheckpointError for a tensor or value that cannot be saved, and for the failure of an earlier save.
        """
        self.wait()
        text = _encode(extra)
        staged = self._arena.stage(local_shards(tensors))
        self._thread = threading.Thread(
            target=self._write, args=(step, staged, text), name=f"checkpoint-step-{step}", daemon=True
        )
        self._thread.start()
        if blocking or not self._config.asynchronous:
            self.wait()

    @property
    def saving(self) -> bool:
        """Whether this rank has a save under way. Not collective."""
        return self._thread is not None and self._thread.is_alive()

    def wait(self) -> None:
        """Return when no save is under way. Raises CheckpointError, once, if the last one failed."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        error, self._error = self._error, None
        if error is not None:
            raise error

    def committed(self) -> list[int]:
        """Steps whose checkpoints were completed since the last call. Not collective; empty but on rank 0."""
        return [self._committed.popleft() for _ in range(len(self._committed))]

    def newest_good(self) -> Path | None:
        """The newest checkpoint without damage; None when there is none. Newer, damaged ones are logged by name."""
        self.wait()
        return _newest_good(self._directory, self._ranks)[0]

    def load(self, path: Path, tensors: Mapping[str, Located]) -> dict[str, Any]:
        """Fill tensors in place from a checkpoint of any layout; return its extra.

        Raises CheckpointError, before any tensor is touched, unless names, shapes and dtypes of all ranks together are
        exactly those saved.
        """
        self.wait()
        anywhere = {name for names in self._ranks.everywhere(lambda: list(tensors)) for name in names}

        def check() -> dict[str, Any]:
            found = mismatches(path, tensors, elsewhere=anywhere)
            if found:
                raise CheckpointError(f"{path} does not hold this run's tensors; {'; '.join(found)}")
            return read_extra(path)

        extra = self._ranks.everywhere(check)[self._ranks.rank]
        read_tensors(path, tensors, self._ranks.group)
        return extra

    def close(self) -> None:
        """Finish the save under way and free memory and group. Raises CheckpointError if that save failed."""
        try:
            self.wait()
        finally:
            self._arena.release()
            dist.destroy_process_group(self._ranks.group)

    def _write(self, step: int, staged: list[Shard], extra: str) -> None:
        """Body of the writer thread. An error is kept for the next call of save, wait or close."""
        partial = self._directory / f".step_{step}.tmp"
        try:
            self._ranks.on_first(lambda: _fresh(partial))
            assert self._ranks.group is not None
            records = write_shards(partial, staged, self._ranks.group)
            parts = self._ranks.everywhere(lambda: records)
            written = {name: record for part in parts for name, record in part.items()}
            self._ranks.on_first(lambda: self._commit(step, partial, written, extra))
        except BaseException as error:
            if self._ranks.rank == 0:
                shutil.rmtree(partial, ignore_errors=True)
            self._error = CheckpointError(
                f"checkpoint {self._directory / f'step_{step}'} could not be written: {describe(error)}. "
                "Earlier checkpoints are as they were"
            )
            self._error.__cause__ = error

    def _commit(self, step: int, partial: Path, files: dict[str, FileRecord], extra: str) -> None:
        """Rank 0: complete the folder, put it in place, delete what retention gives up."""
        files[EXTRA] = write_synced(partial / EXTRA, extra)
        for name, record in files.items():
            if not (partial / name).exists() or (partial / name).stat().st_size != record.size:
                raise CheckpointError(
                    f"{partial / name} was written by another rank and is not seen whole by rank 0; "
                    "run.dir must be on a file system that all nodes share"
                )
        write_manifest(partial, Manifest(step=step, world_size=self._ranks.size, files=files))
        sync_folder(partial)
        target, replaced = self._directory / f"step_{step}", self._directory / f".step_{step}.old"
        if target.exists():
            target.rename(replaced)
        partial.rename(target)
        sync_folder(self._directory)
        shutil.rmtree(replaced, ignore_errors=True)
        logger.info("saved %s", target)
        self._committed.append(step)
        for old in _expired(committed_steps(self._directory), step, self._config):
            _delete(self._directory / f"step_{old}")


def read_extra(path: Path) -> dict[str, Any]:
    """The extra of a checkpoint; needs no process group. Raises CheckpointError when it is missing or damaged."""
    try:
        return json.loads((path / EXTRA).read_text())
    except FileNotFoundError:
        raise CheckpointError(f"{path} is not a checkpoint: {EXTRA} is missing") from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path / EXTRA} cannot be read: {error}") from None


def resolve_resume(resume: str, directory: Path, *, group: dist.ProcessGroup | None = None) -> Path | None:
    """The checkpoint that checkpoint.resume asks for, verified; None to begin anew. Collective over group.

    resume: auto: the newest good one in directory, if any; never; or the path of a checkpoint, of a run, or of its
    `checkpoints/`. group: None: the default group, or this process alone where there is none.
    Raises CheckpointError when a path is not there or is damaged, or when checkpoints exist and none of them is good:
    beginning anew, silently, would bury them.
    """
    if resume == "never":
        return None
    if resume != "auto":
        return find_checkpoint(Path(resume).expanduser(), name="checkpoint.resume", group=group)
    found, damaged = _newest_good(directory, Ranks(group))
    if found is None and damaged:
        raise CheckpointError(
            f"checkpoint.resume=auto: every checkpoint in {directory} is damaged: {'; '.join(damaged)}. "
            "Restore one of them, or begin anew with checkpoint.resume=never"
        )
    return found


def find_checkpoint(path: Path, *, name: str, group: dist.ProcessGroup | None = None) -> Path:
    """The checkpoint at path, verified: path itself, or the newest good one of a run or of its `checkpoints/`.

    name: what the user calls the path, for messages. Collective over group, as resolve_resume is. Raises
    CheckpointError when there is none, or none that is good.
    """
    ranks = Ranks(group)
    kind = ranks.on_first(lambda: _kind(path, name))
    if kind == "checkpoint":
        problems = _verify_together(path, ranks)
        if problems:
            raise CheckpointError(f"{name}={path} is damaged: {'; '.join(problems)}")
        return path
    directory = path / "checkpoints" if kind == "run" else path
    found, damaged = _newest_good(directory, ranks)
    if found is None:
        raise CheckpointError(
            f"{name}={path}: every checkpoint in {directory} is damaged: {'; '.join(damaged)}. Restore one of them"
        )
    return found


def newest_checkpoint(path: Path, *, name: str) -> Path:
    """What `find_checkpoint` looks at first, not verified; needs no process group. Raises CheckpointError for none."""
    kind = _kind(path, name)
    if kind == "checkpoint":
        return path
    directory = path / "checkpoints" if kind == "run" else path
    return directory / f"step_{committed_steps(directory)[-1]}"


def _kind(path: Path, name: str) -> str:
    """What a path is: checkpoint, run, or checkpoints (a folder of them)."""
    if not path.exists():
        raise CheckpointError(f"{name}={path} does not exist; give a checkpoint, a run or its checkpoints/")
    if _STEP.fullmatch(path.resolve().name) or (path / EXTRA).exists():
        return "checkpoint"
    if committed_steps(path / "checkpoints"):
        return "run"
    if committed_steps(path):
        return "checkpoints"
    raise CheckpointError(f"{name}={path} holds no checkpoint (no step_N in it or in its checkpoints/)")


def _newest_good(directory: Path, ranks: Ranks) -> tuple[Path | None, list[str]]:
    """The newest good checkpoint, and what is wrong with each newer one."""
    damaged: list[str] = []
    for step in reversed(ranks.on_first(lambda: committed_steps(directory))):
        path = directory / f"step_{step}"
        problems = _verify_together(path, ranks)
        if not problems:
            return path, damaged
        damaged.append(f"step_{step}: {', '.join(problems)}")
        if ranks.rank == 0:
            logger.warning("%s is damaged and not used: %s", path, "; ".join(problems))
    return None, damaged


def _verify_together(path: Path, ranks: Ranks) -> list[str]:
    """`verify` with the files shared out over the ranks, largest first; the same answer on all of them."""

    def manifest_or_problem() -> Manifest | str:
        try:
            return read_manifest(path)
        except CheckpointError as error:
            return str(error)

    manifest = ranks.on_first(manifest_or_problem)
    if isinstance(manifest, str):
        return [manifest]
    files = sorted(manifest.files.items(), key=lambda item: (-item[1].size, item[0]))[ranks.rank :: ranks.size]
    found = ranks.everywhere(lambda: [file_problem(path, name, record) for name, record in files])
    return sorted(problem for part in found for problem in part if problem is not None)


def committed_steps(directory: Path) -> list[int]:
    """Steps of the checkpoints in a directory, ascending; empty when there is no directory."""
    if not directory.is_dir():
        return []
    matches = (_STEP.fullmatch(entry.name) for entry in directory.iterdir() if entry.is_dir())
    return sorted(int(match[1]) for match in matches if match)


def _expired(steps: list[int], committed: int, config: CheckpointConfig) -> list[int]:
    """Steps to delete now that `committed` is complete: only older ones, whatever later steps an earlier run left."""
    if config.keep_last == 0:
        return []
    older = [step for step in steps if step < committed]
    given_up = older[: max(0, len(older) - (config.keep_last - 1))]
    return [step for step in given_up if not (config.keep_every and step % config.keep_every == 0)]


def _delete(path: Path) -> None:
    """Remove a checkpoint; renamed first, so that a crash half way leaves nothing that looks like one."""
    try:
        trash = path.with_name(f".{path.name}.trash")
        path.rename(trash)
        shutil.rmtree(trash)
    except OSError as error:
        logger.warning("the old checkpoint %s could not be deleted: %s", path, error)


def _fresh(folder: Path) -> None:
    if folder.exists():
        shutil.rmtree(folder)
    folder.mkdir(parents=True)


def _tidy(directory: Path) -> None:
    """Rank 0, at start: finish or undo what a crash interrupted."""
    for entry in list(directory.iterdir()) if directory.is_dir() else []:
        match = _LEFTOVER.fullmatch(entry.name)
        if match is None:
            continue
        if match[2] == "old" and not (directory / match[1]).exists():
            logger.warning("a crash interrupted the replacement of %s; the earlier one is put back", match[1])
            entry.rename(directory / match[1])
        else:
            shutil.rmtree(entry)


def _encode(extra: Mapping[str, Any]) -> str:
    problem = _not_json(dict(extra), "extra")
    if problem is not None:
        raise CheckpointError(f"{problem} cannot be saved as JSON; use str, int, float, bool, None, list or dict")
    return json.dumps(dict(extra), indent=1)


def _not_json(value: Any, name: str) -> str | None:
    """The first part of value that JSON does not return as it is (an integer key would come back as a string)."""
    if isinstance(value, dict):
        for key, item in value.items():
            if not isinstance(key, str):
                return f"{name}: the key {key!r} ({type(key).__name__})"
            if (problem := _not_json(item, f"{name}.{key}")) is not None:
                return problem
        return None
    if isinstance(value, (list, tuple)):
        return next((p for i, item in enumerate(value) if (p := _not_json(item, f"{name}[{i}]")) is not None), None)
    return None if value is None or isinstance(value, (str, int, float, bool)) else f"{name} ({type(value).__name__})"
