"""The rank pool itself: results, errors, deaths."""

from __future__ import annotations

import os

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
