"""Things made once and kept on disk: whole folders that appear under their final name only when complete."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

from data.config import DataError


def digest(*values: Any) -> str:
    """32 hexadecimal digits of SHA-256 over the JSON form of values: the name of what is made from them."""
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:32]


def cached(folder: Path, build: Callable[[Path], None]) -> Path:
    """Return folder; when it does not exist, build(scratch) fills a scratch folder that is then renamed to it.

    Any number of processes may call this at once. On one host the first builds while the others wait for its lock
    (flock: released by the kernel when the holder dies). Hosts that share the file system but not its locks may each
    build; the first to rename wins, which is harmless because a folder's name is the hash of all that decides its
    content. Raises DataError when the place cannot be written to or locked; errors of build pass through and leave
    nothing.
    """
    if folder.is_dir():
        return folder
    scratch_prefix = f".{folder.name}.{socket.gethostname()}."
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        lock = open(folder.parent / f".{folder.name}.lock", "w")  # noqa: SIM115 (held over the whole build)
    except OSError as error:
        raise DataError(f"data.cache_dir: cannot write to {folder.parent} ({error}); choose another folder") from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX)
        except OSError as error:  # Lustre without -o flock, some FUSE and object stores
            raise DataError(
                f"data.cache_dir: {folder.parent} is on a file system without locks ({error.strerror}); choose a "
                "folder on another, such as a local disk"
            ) from error
        if folder.is_dir():
            return folder
        for left in folder.parent.glob(f"{scratch_prefix}*"):  # of a builder that was killed: we hold its lock now
            shutil.rmtree(left, ignore_errors=True)
        scratch = folder.parent / f"{scratch_prefix}{os.getpid()}"
        scratch.mkdir()
        try:
            build(scratch)
            _sync(scratch)
            try:
                scratch.rename(folder)
            except OSError:
                if not folder.is_dir():
                    raise
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
    return folder


def _sync(folder: Path) -> None:
    """Force the files to the disk: a rename that survives a power failure must not name empty files."""
    for path in folder.iterdir():
        fd = os.open(path, os.O_RDONLY)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)
