"""Gloo groups with one thread each (parallel/gloo.py)."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

THREADS = """
import os
import torch, torch.distributed as dist
from parallel.mesh import init_distributed
init_distributed(torch.device("cpu"), 60.0)
for group in (dist.group.WORLD, dist.new_group([0], backend="gloo"), dist.new_group([0], backend="gloo")):
    dist.all_reduce(torch.zeros(1), group=group)  # its thread has a name by then
names = [open(f"/proc/self/task/{thread}/comm").read().strip() for thread in os.listdir("/proc/self/task")]
timeout = dist.group.WORLD._get_backend(torch.device("cpu")).options._timeout
print(names.count("pt_gloo_runloop"), dist.get_backend(), timeout)
"""

GATHERS = """
import torch, torch.distributed as dist
from parallel.mesh import init_distributed
init_distributed(torch.device("cpu"), 60.0)
torch.set_num_threads(1)
gather, wait = torch.ops._c10d_functional.all_gather_into_tensor, torch.ops._c10d_functional.wait_tensor
for step in range(10_000):
    pending = [gather(torch.full((2,), float(i)), 1, dist.group.WORLD.group_name) for i in range(16)]
    assert [wait(each)[1].item() for each in pending] == list(range(16)), step
"""


def _run(program: str, **environment: str) -> subprocess.CompletedProcess[str]:
    inherited = {name: value for name, value in os.environ.items() if name not in ("RANK", "MASTER_ADDR")}
    command = [sys.executable, "-c", program]
    return subprocess.run(command, env=inherited | environment, capture_output=True, text=True, timeout=300)


def test_a_group_has_one_thread() -> None:
    """Threads of a group that write its status at the same time; an interface or a timeout that is not passed on."""
    done = _run(THREADS, GLOO_SOCKET_IFNAME="lo")
    assert done.stdout.split() == ["3", "gloo", "0:01:00"], done.stderr
    wrong = _run(THREADS, GLOO_SOCKET_IFNAME="nowhere0")
    assert "nowhere0" in wrong.stderr
    assert wrong.returncode


@pytest.mark.thorough
def test_gathers_that_end_together_leave_the_heap_alone() -> None:
    """Names of collectives that are freed twice: with two threads this ended in malloc in four of six runs."""
    done = _run(GATHERS)
    assert not done.returncode, done.stderr
