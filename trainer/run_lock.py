"""One process at a time writes to a run directory."""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import socket
from pathlib import Path
from typing import TextIO

LOCK = "lock"

logger = logging.getLogger(__name__)


class RunLock:
    """Held by rank 0 from `take` to `release`, or to the end of its process.

    A second start in the same folder (a job that was queued twice, a terminal that was forgotten) would resume from
    the first one's checkpoint, cut its metrics.jsonl and delete the checkpoint it is writing. A record lock (fcntl),
    not flock: it does not pass to the loader's forked workers, which may outlive a killed parent by seconds, and it
    works over NFS.
    """

    def __init__(self, run_dir: Path) -> None:
        self._path = run_dir / LOCK
        self._file: TextIO | None = None

    def take(self, *, create: bool) -> str | None:
        """Why this start has to keep out; None: it need not. create: false: write nothing, a new folder is free."""
        if self._file is None and (create or self._path.exists()):
            problem = self._lock()
            if problem is not None:
                return problem
        if create and self._file is not None:
            self._file.truncate(0)
            self._file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
            self._file.flush()
        return None

    def _lock(self) -> str | None:
        run_dir = self._path.parent
        try:
            file = open(self._path, "a+")  # noqa: SIM115 (open as long as the lock is held)
        except OSError as error:
            return f"run.dir={run_dir} cannot be written: {self._path.name}: {error.strerror}; choose another"
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            file.seek(0)
            holder = file.read().strip()
            file.close()
            if error.errno in (errno.EACCES, errno.EAGAIN):
                return (
                    f"run.dir={run_dir} is in use by {holder or 'another process'}; end it, or choose another run.dir "
                    f"(if its machine is gone for good, delete {self._path})"
                )
            logger.warning("%s cannot be locked (%s): nothing keeps a second run out", self._path, error.strerror)
            return None
        self._file = file
        return None

    def release(self) -> None:
        """Let others in. The file stays: to delete it could free a lock that someone else has just taken."""
        if self._file is not None:
            self._file.close()
            self._file = None
