"""Names of nodes: from SLURM's compressed lists to nodes, to the address where ranks meet."""

from __future__ import annotations

import re
import socket
from collections.abc import Iterable
from itertools import product

FIRST_PORT, NUM_PORTS = 20000, 10000
"""Below 32768, where Linux begins to give out ports for outgoing connections: one of those could take ours between
the moment it is chosen and the moment rank 0 listens."""


def expand(hosts: str) -> list[str]:
    """`gpu[01-03,7],login` to gpu01, gpu02, gpu03, gpu7, login; in order, as `scontrol show hostnames` does.

    Several brackets in a name vary from the right. Raises ValueError for what is no list of hosts.
    """
    names: list[str] = []
    for item in _split(hosts):
        parts = re.split(r"\[([^\[\]]*)\]", item)  # text, range, text, range, ..., text
        if any(bracket in text for text in parts for bracket in "[]"):
            raise ValueError(f"{hosts!r} is no list of hosts: brackets do not match")
        choices = [[part] if index % 2 == 0 else _numbers(part) for index, part in enumerate(parts)]
        names += ["".join(choice) for choice in product(*choices)]
    return names


def _split(hosts: str) -> list[str]:
    """At commas outside of brackets."""
    return [item for item in re.split(r",(?![^\[]*\])", hosts.strip()) if item]


def _numbers(ranges: str) -> list[str]:
    """`01-03,7` to 01, 02, 03, 7: numbers keep the width they begin with."""
    numbers: list[str] = []
    for item in ranges.split(","):
        first, _, last = item.partition("-")
        last = last or first
        if not (first.isdecimal() and last.isdecimal()):
            raise ValueError(f"[{ranges}] is no range of numbers")
        numbers += [f"{number:0{len(first)}d}" for number in range(int(first), int(last) + 1)]
    return numbers


def address_of(node: str, description: str) -> str:
    """Where a node is reached: NodeAddr in what `scontrol show node` says, else its name."""
    found = re.search(r"\bNodeAddr=(\S+)", description)
    return found.group(1) if found else node


def ports(job_id: int, start: int) -> Iterable[int]:
    """Ports to try for the rendezvous, each once. start: counts the starts of this job.

    Jobs that share a node begin at different ports, and so do the starts of one: what is left of an earlier start, on a
    node that hangs, does not find the new one.
    """
    first = job_id * 101 + start * 13
    return (FIRST_PORT + (first + offset) % NUM_PORTS for offset in range(NUM_PORTS))


def free_port(candidates: Iterable[int]) -> int:
    """The first on which nobody listens on this machine. Raises OSError when there is none."""
    for port in candidates:
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as the store of torch.distributed does
            try:
                probe.bind(("", port))
            except OSError:
                continue
            return port
    raise OSError(f"no port from {FIRST_PORT} to {FIRST_PORT + NUM_PORTS - 1} is free for the rendezvous")
