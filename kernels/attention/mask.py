"""Which keys a query sees, as the fused kernel takes it: a range of keys per query, never a T x S mask.

Queries and keys are ascending pieces of a sequence, and documents are numbered in ascending order in it. Then the keys
that a query sees under causality, a window and documents together lie side by side, and their first and last ascend
with the query. So a block of queries knows from four numbers which blocks of keys it can skip and which it sees whole.

B batch, T queries, S keys.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Ranges(NamedTuple):
    """int32 [B or 1, T] and [B or 1, S], ascending along a row. An empty range ends where it starts, or before."""

    first_key: Tensor  # [., T] that a query sees
    end_key: Tensor  # [., T] behind the last
    first_query: Tensor  # [., S] that sees a key
    end_query: Tensor  # [., S] behind the last


class Mask(NamedTuple):
    """What `fused.attention` needs to know of a mask; a pytree. Made by `run_mask` or `piece_mask`."""

    causal: bool = True
    window: int | None = None  # a query sees this many last keys, itself included; None: all
    offset: int | None = 0  # index of query 0 in the sequence minus that of key 0; None: not runs, but pieces with gaps
    ranges: Ranges | None = None  # all of the above, and documents, as ranges; None: the numbers above are everything

    def dense(self, num_queries: int, num_keys: int, device: torch.device) -> Tensor:
        """bool [B or 1, 1, T, S]: the same mask written out."""
        key = torch.arange(num_keys, device=device)
        if self.ranges is not None:
            first, end = (x[:, None, :, None] for x in (self.ranges.first_key, self.ranges.end_key))
            return (key >= first) & (key < end)
        query = torch.arange(num_queries, device=device)[:, None] + (self.offset or 0)
        seen = key <= query if self.causal else torch.ones_like(key <= query)
        if self.window is not None:
            seen = seen & (key > query - self.window)
        return seen[None, None]


def run_mask(
    num_queries: int,
    num_keys: int,
    device: torch.device,
    *,
    causal: bool = True,
    window: int | None = None,
    first_query: int = 0,
    first_key: int = 0,
    query_documents: Tensor | None = None,
    key_documents: Tensor | None = None,
) -> Mask:
    """The mask of a run of queries over a run of keys, each known by the index of its first token in the sequence.

    query_documents [B, T], key_documents [B, S]: whole numbers that ascend along a row (data.batch.Batch.documents, cut
    to the runs). Raises ValueError for a window without causality, of less than one key, and for documents of queries
    or keys alone. Documents that do not ascend fail an assertion on the device, which is not waited for.
    """
    _check(causal, window, query_documents, key_documents)
    offset = first_query - first_key
    if window is not None and window >= offset + num_queries:
        window = None  # it reaches back to before the first key
    if window is None and offset >= num_keys - 1:
        causal = False  # all keys lie before all queries, as in most pairs of a ring
    if query_documents is None or key_documents is None:
        return Mask(causal, window, offset)
    query = torch.arange(offset, offset + num_queries, device=device, dtype=torch.int32)
    key = torch.arange(num_keys, device=device, dtype=torch.int32)
    ranges = _ranges(query, key, causal, window, query_documents, key_documents)
    return Mask(causal, window, offset, ranges)


def piece_mask(
    query_positions: Tensor,
    key_positions: Tensor,
    *,
    causal: bool = True,
    window: int | None = None,
    query_documents: Tensor | None = None,
    key_documents: Tensor | None = None,
) -> Mask:
    """`run_mask` of pieces with gaps (a zigzag part, say): [T] and [S] indices in the sequence, ascending."""
    _check(causal, window, query_documents, key_documents)
    _assert_ascending(query_positions[None], "query_positions")
    _assert_ascending(key_positions[None], "key_positions")
    query, key = query_positions.int(), key_positions.int()
    return Mask(causal, window, None, _ranges(query, key, causal, window, query_documents, key_documents))


def _ranges(
    query: Tensor,
    key: Tensor,
    causal: bool,
    window: int | None,
    query_documents: Tensor | None,
    key_documents: Tensor | None,
) -> Ranges:
    """Ranges of queries and keys at the positions query [T], key [S]: binary searches on the device."""
    first = torch.zeros_like(query)[None]
    end = torch.full_like(first, key.shape[0])
    if causal:
        end = _number_below_or_equal(key, query)[None]
    if window is not None:
        first = _number_below_or_equal(key, query - window)[None]
    if query_documents is not None and key_documents is not None:
        of_queries, of_keys = (_assert_ascending(x, "documents") for x in (query_documents, key_documents))
        of_queries = of_queries.to(of_keys.dtype)
        first = torch.maximum(first, torch.searchsorted(of_keys, of_queries, out_int32=True))
        end = torch.minimum(end, _number_below_or_equal(of_keys, of_queries))
    # Query i sees key j if first[i] <= j < end[i]; both ascend, so these i lie side by side as well.
    keys = torch.arange(key.shape[0], device=key.device, dtype=torch.int32).expand(first.shape[0], -1).contiguous()
    first, end = first.contiguous(), end.contiguous()
    return Ranges(first, end, _number_below_or_equal(end, keys), _number_below_or_equal(first, keys))


def _number_below_or_equal(ascending: Tensor, values: Tensor) -> Tensor:
    return torch.searchsorted(ascending, values, right=True, out_int32=True)


def _assert_ascending(x: Tensor, name: str) -> Tensor:
    torch._assert_async((x[:, 1:] >= x[:, :-1]).all(), f"{name} of the fused attention must ascend along each row")
    return x.contiguous()


def _check(causal: bool, window: int | None, query_documents: Tensor | None, key_documents: Tensor | None) -> None:
    if window is not None and not causal:
        raise ValueError(f"window={window} with causal=False: a window reaches back from a query; use window=None")
    if window is not None and window < 1:
        raise ValueError(f"window={window} must be at least 1, the query itself")
    if (query_documents is None) != (key_documents is None):
        raise ValueError("documents are given for queries or keys alone; give query_documents and key_documents")
