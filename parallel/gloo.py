"""Gloo process groups whose collectives run on one thread each, because on two they corrupt the heap.

torch gives a group two threads, which take collectives from a queue. After each, both write its name into the group's
status without a lock (`ProcessGroupGloo::runLoop`, `lastCompletedWorkName`; torch 2.13). A name of more than 15 letters
lies on the heap, that of a functional all-gather is ALLGATHER_COALESCED, and so two of these that end together free one
name twice: "malloc(): unaligned tcache chunk detected", or a hang, some steps later and elsewhere. docs/LOG.md has the
program that shows it within seconds.

Collectives of one group begin in one order on all ranks anyway, and those of several groups still run side by side.
"""

from __future__ import annotations

import os
from datetime import timedelta
from typing import Any

import torch.distributed as dist

_make = dist.ProcessGroupGloo.__init__ if dist.is_gloo_available() else None


def _make_with_one_thread(
    self: Any, store: dist.Store, rank: int, size: int, timeout: Any = timedelta(minutes=30)
) -> None:
    """What torch does with these arguments, but for the number of threads. timeout: or Options, taken as they are."""
    assert _make is not None
    if not isinstance(timeout, timedelta):
        _make(self, store, rank, size, timeout)
        return
    gloo = dist.ProcessGroupGloo
    interfaces = os.environ.get("GLOO_SOCKET_IFNAME", "")
    options = gloo._Options()  # type: ignore[attr-defined]
    options._timeout, options._threads = timeout, 1
    options._devices = [gloo.create_device(interface=name) for name in interfaces.split(",") if name]
    options._devices = options._devices or [gloo.create_default_device()]
    _make(self, store, rank, size, options)


def give_gloo_groups_one_thread() -> None:
    """For all groups that this process makes from now on. Without gloo, nothing. May be called again."""
    if _make is not None:
        dist.ProcessGroupGloo.__init__ = _make_with_one_thread  # type: ignore[method-assign]
