"""Bucket layouts against DTensor's own idea of a row shard."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from parallel.buckets import plan_buckets

SHAPES = {"a": (7, 3), "b": (2,), "c": (1, 5), "d": (8, 2, 2), "e": (6, 4, 3)}


@pytest.mark.parametrize("num_ranks", [1, 2, 3, 4, 9])
def test_a_bucket_holds_every_element_where_torch_chunk_puts_it(num_ranks: int) -> None:
    """A row off by one would update a neighbour's weights; uneven and empty shards are where that happens."""
    tensors = {n: torch.randn(s) for n, s in SHAPES.items()}
    (layout,) = plan_buckets({n: t.shape for n, t in tensors.items()}, num_ranks=num_ranks, max_elements=10**6)
    buffer = torch.zeros(num_ranks * layout.shard_length)
    for slot in layout.slots:
        target, source = slot.pair(slot.of_whole(buffer), tensors[slot.name])
        target.copy_(source)
        back = torch.full_like(tensors[slot.name], float("nan"))
        source, target = slot.pair(slot.of_whole(buffer), back)
        target.copy_(source)
        assert torch.equal(tensors[slot.name], back)
        assert slot.dim == (slot.name == "e" and num_ranks == 4)  # matrices of a stack: 6 over 4, 4 rows over 4
        chunks = list(tensors[slot.name].chunk(num_ranks, dim=slot.dim))
        for rank in range(num_ranks):
            local = slot.local_view(slot.of_whole(buffer)[rank], rank)
            expected = chunks[rank] if rank < len(chunks) else chunks[0][:0]
            assert torch.equal(local, slot.local_part(tensors[slot.name], rank))
            assert torch.equal(local.reshape(-1), expected.reshape(-1))
            assert local.is_contiguous()
        if slot.is_parameter:
            assert torch.equal(slot.of_whole(buffer).flatten(), tensors[slot.name].flatten())
    assert any(slot.is_parameter for slot in layout.slots) == (num_ranks < 9)
    parts = [slot.of_shard(torch.arange(layout.shard_length)) for slot in layout.slots]
    assert torch.equal(torch.cat(parts), torch.arange(layout.shard_length))


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(1, 40), min_size=1, max_size=20), st.integers(1, 5), st.integers(1, 100))
def test_buckets_keep_the_order_and_respect_the_limit(rows: list[int], num_ranks: int, limit: int) -> None:
    """A parameter lost or doubled between buckets would train on a stale gradient."""
    shapes = {f"p{i}": torch.Size((r, 2)) for i, r in enumerate(rows)}
    layouts = plan_buckets(shapes, num_ranks=num_ranks, max_elements=limit)
    assert [slot.name for layout in layouts for slot in layout.slots] == list(shapes)
    for layout in layouts:
        assert len(layout.slots) == 1 or layout.shard_length * num_ranks <= limit
        assert [s.start for s in layout.slots[1:]] == [s.start + s.length for s in layout.slots[:-1]]
