"""The rank pool itself: results, errors, deaths."""

from __future__ import annotations

import os
import time

import pytest
import torch
import torch.distributed as dist

from tests.pool import RankError, RankPool


def _sum_of_ranks() -> float:
    t = torch.tensor(float(dist.get_rank()), requires_grad=True)
    (t * 1).backward()
    total = t.detach().clone()
    dist.all_reduce(total)
    return total.item()


def _fail_on_last() -> None:
    if dist.get_rank() == dist.get_world_size() - 1:
        raise ValueError("planted")


def _die_on_last() -> None:
    if dist.get_rank() == dist.get_world_size() - 1:
        os._exit(9)
    dist.barrier()


def _abort() -> None:
    os.abort()


def _hang_on_last() -> None:
    if dist.get_rank() < dist.get_world_size() - 1:
        dist.barrier()
    time.sleep(60)


def _compute_for(seconds: float) -> float:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        pass
    return seconds


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_every_rank_answers(ranks: RankPool, world_size: int) -> None:
    assert ranks.run(world_size, _sum_of_ranks) == [world_size * (world_size - 1) / 2] * world_size


def test_an_error_on_one_rank_comes_back_and_the_pool_lives_on(ranks: RankPool) -> None:
    with pytest.raises(RankError, match="planted"):
        ranks.run(2, _fail_on_last)
    assert ranks.run(2, _sum_of_ranks) == [1.0, 1.0]


def test_a_dead_rank_is_reported_and_replaced(ranks: RankPool) -> None:
    with pytest.raises(RankError, match=r"died|Connection"):
        ranks.run(2, _die_on_last)
    assert ranks.run(2, _sum_of_ranks) == [1.0, 1.0]


def test_a_rank_that_a_signal_ends_says_where_it_was(ranks: RankPool) -> None:
    """Heap corruption ends a process with a line that names nothing."""
    with pytest.raises(RankError, match=r"Fatal Python error: Aborted(.*\n)*.* in _abort\n(.*\n)*rank 0 died"):
        ranks.run(1, _abort)
    assert ranks.run(1, _sum_of_ranks) == [0.0]


def test_ranks_that_wait_for_each_other_are_given_up(ranks: RankPool) -> None:
    """A collective that one rank does not enter, for which the whole suite would wait."""
    begun = time.monotonic()
    with pytest.raises(RankError, match=r"ranks \[0, 1\] gave no answer within 1.0 s"):
        ranks.run(2, _hang_on_last, timeout=1.0)
    assert time.monotonic() - begun < 11
    assert ranks.run(2, _sum_of_ranks) == [1.0, 1.0]


@pytest.mark.skipif(not os.path.exists("/proc/self/schedstat"), reason="the kernel does not count")
def test_ranks_that_compute_are_waited_for(ranks: RankPool) -> None:
    """On a loaded machine every layout that takes long fails, one after the other, of nothing but the load."""
    assert ranks.run(2, _compute_for, 1.5, timeout=0.5) == [1.5, 1.5]
