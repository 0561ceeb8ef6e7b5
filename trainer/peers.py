"""Peer checkpoints: copies of the state in host memory, from which a restart goes on a step behind instead of a
checkpoint behind (as in Gemini, Wang et al., SOSP 2023).

After a step each rank copies its part of the state to a file in memory (/dev/shm, which outlives the process), and a
second copy goes to a rank of the next host, beside the next step. A rank that starts again in the same layout takes its
own file; on a new machine it is sent the other copy. Files are written in turn, so that at any moment one is whole:

    PEER_DIR/lattice-UID-RUN/rank_R.A  rank_R.B       a header of JSON, then the bytes of every part

Copies are for a crash. A run that ends in order deletes them, as does one whose state cannot be trusted. They are used
if every rank's part of one and the same step is somewhere, of this run, undamaged, and newer than its checkpoints.
Nothing that is read is executed, and the folder is its owner's alone.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import socket
import threading
import uuid
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from parallel.regions import Located
from trainer.agreement import CheckpointError, Ranks
from trainer.staging import HostArena, Shard, local_shards

_ID = "peers_id"
"""In run.dir: what copies have to name to belong to this run, and not to an earlier one in a folder of that name."""
_LENGTH_BYTES = 8  # of the header's length


@dataclass(frozen=True)
class Header:
    """What a file begins with; filled by who wrote it."""

    run: str
    owner: int  # the rank whose part this is
    world_size: int
    step: int
    parts: list[list[Any]]  # of each part: name, first index, shape, dtype
    crc32: int  # of the bytes that follow
    extra: dict[str, Any]  # as of a checkpoint


class PeerCheckpoints:
    """The copies of one run. Every method but `discard` and `close` is collective: all ranks, in the same order."""

    def __init__(self, run_dir: Path, folder: Path, *, device: torch.device, ranks_per_host: int) -> None:
        """folder: resilience.peer_dir, which is made; nothing is written to run_dir before `start`.

        Raises CheckpointError, on every rank, when a rank cannot write there.
        """
        # Of its own, because a thread's messages must not interleave with the trainer's on one group.
        self._ranks = Ranks(dist.new_group(backend="gloo"))
        self._id = run_dir / _ID
        self._run = self._ranks.on_first(lambda: self._id.read_text() if self._id.exists() else None)
        name = hashlib.sha256(str(run_dir.resolve()).encode()).hexdigest()[:16]
        self._folder = folder / f"lattice-{os.getuid()}-{name}"
        places = self._ranks.everywhere(lambda: _own_folder(self._folder))
        rank, size = self._ranks.rank, self._ranks.size
        self._target, self._source = (rank + ranks_per_host) % size, (rank - ranks_per_host) % size
        self._sends, self._receives = (places[r] != places[rank] for r in (self._target, self._source))
        self._arena = HostArena(device)
        self._thread: threading.Thread | None = None
        self._error: Exception | None = None
        self._slot = "A"  # of the next save, the same on every rank
        self._found: dict[tuple[int, int], Path] = {}  # (owner, step) of files here; filled by `newest`
        self._holders: dict[tuple[int, int], int] = {}  # the rank that has it
        self._slots: dict[int, str] = {}  # of steps that are somewhere

    def start(self) -> None:
        """run_dir is this run's, and can be written: from here on copies may be saved."""
        self._run = self._ranks.on_first(lambda: self._run or _new_id(self._id))

    def save(self, step: int, tensors: Mapping[str, Located], extra: Mapping[str, Any]) -> None:
        """Copy the state after `step`. On return the tensors may change; files follow beside the next step.

        extra: JSON values. Raises the error of the copy before, if that one failed.
        """
        self.wait()
        staged = self._arena.stage(local_shards(tensors))
        slot, self._slot = self._slot, _other(self._slot)
        self._thread = threading.Thread(
            target=self._write, args=(step, staged, dict(extra), slot), name="peers", daemon=True
        )
        self._thread.start()

    def wait(self) -> None:
        """Return when no copy is being made. Raises the error of the last one, once."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        error, self._error = self._error, None
        if error is not None:
            raise CheckpointError(f"the copy of the state in memory ({self._folder}) failed: {error}") from error

    def newest(self) -> int | None:
        """The newest step of which every rank's part is somewhere; None without one."""
        self._found = self._look() if self._run is not None else {}
        self._holders, self._slots = {}, {}
        slots = {key: path.suffix[1:] for key, path in self._found.items()}
        for rank, theirs in enumerate(self._ranks.everywhere(lambda: slots)):
            for key, slot in theirs.items():
                self._slots.setdefault(key[1], slot)
                self._holders.setdefault(key, rank)
                if key[0] == rank:  # the owner's own file needs no journey
                    self._holders[key] = rank
        steps = {step for _, step in self._holders}
        owners = range(self._ranks.size)
        return max((step for step in steps if all((owner, step) in self._holders for owner in owners)), default=None)

    def load(self, step: int, tensors: Mapping[str, Located]) -> dict[str, Any]:
        """Fill tensors from the copies of `step`, which `newest` has named; its extra.

        Raises CheckpointError on every rank, before any tensor is touched, when parts are of another layout.
        """
        content = self._fetch(step)
        shards = local_shards(tensors)

        def check() -> tuple[Header, memoryview]:
            header, data = _parse(content)
            if header.parts != _parts(shards):
                raise CheckpointError(f"the copies of step {step} in memory are of another layout")
            return header, data

        checked: list[tuple[Header, memoryview]] = []
        self._ranks.everywhere(lambda: checked.append(check()))
        header, data = checked[0]
        self._slot = _other(self._slots[step])  # until the next copy is whole everywhere, this one is the newest
        begin = 0
        with torch.no_grad():
            for shard in shards:
                end = begin + shard.data.nbytes
                if end > begin:
                    part = torch.frombuffer(bytearray(data[begin:end]), dtype=shard.data.dtype)
                    shard.data.copy_(part.view(shard.data.shape))
                begin = end
        return header.extra

    def discard(self) -> None:
        """Delete the copies on this host."""
        with contextlib.suppress(CheckpointError):
            self.wait()
        shutil.rmtree(self._folder, ignore_errors=True)

    def close(self) -> None:
        """Give the memory back; files stay."""
        with contextlib.suppress(CheckpointError):
            self.wait()
        self._arena.release()

    def _write(self, step: int, staged: list[Shard], extra: dict[str, Any], slot: str) -> None:
        """Body of the thread. An error is kept for the next call of save or wait."""
        try:
            rank = self._ranks.rank
            assert self._run is not None
            content = _content(self._run, rank, self._ranks.size, step, staged, extra)
            _replace(self._folder / f"rank_{rank}.{slot}", content)
            sent = self._send(content, self._target) if self._sends else []
            if self._receives:
                _replace(self._folder / f"rank_{self._source}.{slot}", self._receive(self._source))
            for work in sent:
                work.wait()
        except Exception as error:
            self._error = error

    def _look(self) -> dict[tuple[int, int], Path]:
        """Good files of this run on this host."""
        found = {}
        for path in sorted(self._folder.glob("rank_*.[AB]")):
            with contextlib.suppress(OSError, CheckpointError):
                header, _ = _parse(path.read_bytes())
                if header.run == self._run and header.world_size == self._ranks.size:
                    found[header.owner, header.step] = path
        return found

    def _fetch(self, step: int) -> bytes:
        """This rank's file of a step: from this host, or sent by the rank that has it."""
        rank, mine = self._ranks.rank, b""
        for owner in range(self._ranks.size):
            holder = self._holders[owner, step]
            if rank == owner == holder:
                mine = self._found[owner, step].read_bytes()
            elif rank == holder:
                for work in self._send(self._found[owner, step].read_bytes(), owner):
                    work.wait()
            elif rank == owner:
                mine = self._receive(holder)
        return mine

    def _send(self, content: bytes, to: int) -> list[dist.Work]:
        size, data = torch.tensor([len(content)]), torch.frombuffer(bytearray(content), dtype=torch.uint8)
        works = [dist.isend(tensor, group=self._ranks.group, group_dst=to) for tensor in (size, data)]
        return [work for work in works if work is not None]

    def _receive(self, source: int) -> bytes:
        size = torch.empty(1, dtype=torch.int64)
        dist.recv(size, group=self._ranks.group, group_src=source)
        data = torch.empty(int(size), dtype=torch.uint8)
        dist.recv(data, group=self._ranks.group, group_src=source)
        return data.numpy().tobytes()


def _other(slot: str) -> str:
    return "B" if slot == "A" else "A"


def _new_id(path: Path) -> str:
    path.write_text(uuid.uuid4().hex)
    return path.read_text()


def _own_folder(folder: Path) -> tuple[str, str]:
    """Make the folder, for this user alone; host and path."""
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    if folder.is_symlink() or folder.stat().st_uid != os.getuid():
        raise PermissionError(f"{folder} is another user's; set another resilience.peer_dir")
    return socket.gethostname(), str(folder)


def _parts(shards: Sequence[Shard]) -> list[list[Any]]:
    return [[s.name, list(s.offsets), list(s.data.shape), str(s.data.dtype)] for s in shards]


def _content(run: str, rank: int, world_size: int, step: int, staged: Sequence[Shard], extra: dict[str, Any]) -> bytes:
    """A whole file."""
    data = b"".join(shard.data.contiguous().view(-1).view(torch.uint8).numpy().tobytes() for shard in staged)
    header = Header(run, rank, world_size, step, _parts(staged), zlib.crc32(data), extra)
    text = json.dumps(asdict(header)).encode()
    return len(text).to_bytes(_LENGTH_BYTES, "big") + text + data


def _parse(content: bytes) -> tuple[Header, memoryview]:
    """Header and data of a whole file. Raises CheckpointError when it is damaged."""
    begin = _LENGTH_BYTES + int.from_bytes(content[:_LENGTH_BYTES], "big")
    try:
        header = Header(**json.loads(content[_LENGTH_BYTES:begin]))
    except (ValueError, TypeError) as error:
        raise CheckpointError(f"a copy in memory has no header that can be read: {error}") from None
    data = memoryview(content)[begin:]
    if zlib.crc32(data) != header.crc32:
        raise CheckpointError("a copy in memory is damaged: checksum mismatch")
    return header, data


def _replace(path: Path, content: bytes) -> None:
    """Readers see the old file or the new one. Not synced: it is memory."""
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_bytes(content)
    os.replace(temporary, path)
