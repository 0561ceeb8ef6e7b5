"""Lists of nodes, and where ranks meet."""

from __future__ import annotations

import socket
from itertools import islice

import pytest

from launch.slurm.hosts import FIRST_PORT, NUM_PORTS, address_of, expand, free_port, ports

# A list of hosts and its names as `scontrol show hostnames` of SLURM 22.05 gives them (held to it in test_cluster.py).
HOSTS = {
    "n0": ["n0"],
    "n[0-2]": ["n0", "n1", "n2"],
    "gpu-a[08-11,7],login": ["gpu-a08", "gpu-a09", "gpu-a10", "gpu-a11", "gpu-a7", "login"],
    "rack[1-2]node[01-02]": ["rack1node01", "rack1node02", "rack2node01", "rack2node02"],
    "n[098-101]": ["n098", "n099", "n100", "n101"],
}


@pytest.mark.parametrize("hosts", HOSTS)
def test_a_list_of_hosts_has_the_names_that_slurm_gives(hosts: str) -> None:
    """Would catch: a comma within brackets that splits, or zeros in front that are lost."""
    assert expand(hosts) == HOSTS[hosts]


@pytest.mark.parametrize("hosts", ["n[0-2", "n0-2]", "n[a-c]", "n[1-]x[-3]"])
def test_what_is_no_list_of_hosts_is_refused(hosts: str) -> None:
    """Would catch: a job that trains on nodes that do not exist."""
    with pytest.raises(ValueError, match=r"no list of hosts|no range"):
        expand(hosts)


def test_the_rendezvous_is_where_slurm_reaches_the_node() -> None:
    """Would catch: a node's name where the cluster's network has another for it."""
    described = "NodeName=n7 Arch=x86_64\n   NodeAddr=10.0.3.7 NodeHostName=gpu7 Version=22.05.8\n"
    assert address_of("n7", described) == "10.0.3.7"
    assert address_of("n7", "") == "n7"  # the controller does not answer


def test_starts_meet_at_different_ports_below_those_of_outgoing_connections() -> None:
    """Would catch: ranks of an earlier start, on a node that hung, that join the next one."""
    first = {next(iter(ports(job, start))) for job in (1, 2, 3, 90210) for start in range(4)}
    assert len(first) == 16
    assert sorted(ports(90210, 1)) == list(range(FIRST_PORT, FIRST_PORT + NUM_PORTS))
    assert FIRST_PORT >= 1024
    assert FIRST_PORT + NUM_PORTS <= 32768


def test_a_port_that_is_taken_is_passed_over() -> None:
    """Would catch: two jobs on a node, of which one fails."""
    with socket.socket() as other:
        other.bind(("", 0))
        other.listen()
        taken = other.getsockname()[1]
        assert free_port([taken, *islice(ports(7, 0), 50)]) != taken
        with pytest.raises(OSError, match="no port"):
            free_port([taken])
