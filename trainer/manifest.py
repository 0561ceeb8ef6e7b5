"""The manifest of a checkpoint: size and checksum of each file, so that damage is found and named before it is loaded.

The checksum is CRC-32. It finds every flipped bit and every damaged run of up to 32 bits, and misses any other damage
with probability 2^-32. Measured on one core (AMD EPYC, Python 3.11): CRC-32 6.5 GB/s, SHA-256 1.9, BLAKE2b 1.3; only
the first stays ahead of a local NVMe disk. Deliberate changes are not what it guards against; against those, loading
never runs code that comes from a checkpoint (trainer/storage.py).
"""

from __future__ import annotations

import io
import json
import os
import zlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from trainer.agreement import CheckpointError

MANIFEST = "manifest.json"
EXTRA = "extra.json"
METADATA = ".metadata"
FORMAT = 1
_BLOCK = 1 << 22


@dataclass(frozen=True)
class FileRecord:
    """What a file held when it was written; filled by the writer of the file."""

    size: int  # bytes
    crc32: int


@dataclass(frozen=True)
class Manifest:
    """Filled by rank 0 when a checkpoint is complete."""

    step: int
    world_size: int  # ranks that wrote it; any number can read it
    files: Mapping[str, FileRecord]


class ChecksummedFile(io.BufferedWriter):
    """A new file that sums its bytes on their way to the disk, so that the sum is of what was meant to be written."""

    def __init__(self, raw: io.RawIOBase) -> None:
        super().__init__(raw, buffer_size=1 << 20)
        self._size = 0
        self._crc32 = 0

    @classmethod
    def create(cls, path: Path) -> ChecksummedFile:
        """Open path for writing, empty."""
        return cls(open(path, "wb", buffering=0))

    @property
    def record(self) -> FileRecord:
        """What the file holds; valid after close, too."""
        return FileRecord(size=self._size, crc32=self._crc32)

    def write(self, data: Any) -> int:
        self._crc32 = zlib.crc32(data, self._crc32)
        self._size += memoryview(data).nbytes
        return super().write(data)

    def close(self) -> None:
        """Force everything written to the disk, then close."""
        try:
            if not self.closed:
                self.flush()
                os.fsync(self.fileno())
        finally:
            super().close()


def write_synced(path: Path, text: str) -> FileRecord:
    """Write a new text file through to the disk."""
    with ChecksummedFile.create(path) as file:
        file.write(text.encode())
    return file.record


def sync_folder(path: Path) -> None:
    """Force the names in a folder to the disk: without it a crash can undo a rename."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write folder/manifest.json. It carries a checksum of itself."""
    body = {"format": FORMAT, **asdict(manifest)}
    write_synced(folder / MANIFEST, json.dumps({**body, "crc32": _crc_of_json(body)}, indent=1))


def read_manifest(folder: Path) -> Manifest:
    """Read folder/manifest.json. Raises CheckpointError, naming the file, when it is missing or damaged."""
    path = folder / MANIFEST
    try:
        body = json.loads(path.read_text())
        recorded = body.pop("crc32")
        if recorded != _crc_of_json(body):
            raise ValueError("its checksum does not match")
        if body["format"] != FORMAT:
            raise CheckpointError(f"{MANIFEST}: format {body['format']} is unknown; this version reads format {FORMAT}")
        for name in body["files"]:
            if Path(name).name != name or name in ("", ".."):
                raise ValueError(f"it names {name!r}, outside of the checkpoint")
        files = {name: FileRecord(**record) for name, record in body["files"].items()}
        numbers = [body["step"], body["world_size"], *(n for r in files.values() for n in (r.size, r.crc32))]
        if wrong := [number for number in numbers if type(number) is not int or number < 0]:
            raise ValueError(f"{wrong[0]!r} is no number of steps, ranks or bytes")
        return Manifest(step=body["step"], world_size=body["world_size"], files=files)
    except FileNotFoundError:
        raise CheckpointError(f"{MANIFEST}: missing") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{MANIFEST}: damaged ({error})") from None


def file_problem(folder: Path, name: str, record: FileRecord) -> str | None:
    """Why folder/name is not what the manifest recorded; None when it is. Reads the whole file."""
    try:
        size = (folder / name).stat().st_size
        if size < record.size:
            return f"{name}: truncated, {size} of {record.size} bytes"
        if size > record.size:
            return f"{name}: {size} bytes, {record.size} were written"
        crc32 = 0
        with open(folder / name, "rb") as file:
            while block := file.read(_BLOCK):
                crc32 = zlib.crc32(block, crc32)
    except FileNotFoundError:
        return f"{name}: missing"
    except OSError as error:
        return f"{name}: cannot be read ({error})"
    return None if crc32 == record.crc32 else f"{name}: checksum mismatch"


def verify(folder: Path) -> list[str]:
    """Every problem of a checkpoint, one line each beginning with the file's name; empty when it is good."""
    try:
        manifest = read_manifest(folder)
    except CheckpointError as error:
        return [str(error)]
    found = (file_problem(folder, name, record) for name, record in manifest.files.items())
    return [problem for problem in found if problem is not None]


def _crc_of_json(body: Mapping[str, Any]) -> int:
    return zlib.crc32(json.dumps(body, sort_keys=True).encode())
