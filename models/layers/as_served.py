"""A forward pass without a cache that computes attention as one with a cache does, to the bit.

Keys and values are put into pages that live as long as the layer runs, and the kernel that serves reads them there.
Its result has no gradient: in training the ordinary attention runs beside it and gives its own, that of the same
function up to rounding.

B batch, T tokens, N = B T, S sequences (documents, or rows of the batch), M pages of the longest.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from models.layers.paged_cache import PagedCache

PAGE_SIZE = 16
"""Of the throwaway pages. Any number gives the same bits."""


class Runs(NamedTuple):
    """Where the sequences of a batch [B, T] lie in pages; a pytree. Made by `runs_of`."""

    slots: Tensor  # [N] int64
    block_tables: Tensor  # [S, M] int32
    query_starts: Tensor  # [S + 1] int32
    lengths: Tensor  # [S] int32
    num_pages: int

    def attend(self, _layer: int, q: Tensor, k: Tensor, v: Tensor | None, **how: Any) -> Tensor:
        """As PagedCache.attend, of q [B, T, H, K], k [B, T, G, K] and v [B, T, G, V]: [B, T, H, V]."""

        def pages(x: Tensor) -> Tensor:
            return x.new_zeros(1, self.num_pages, PAGE_SIZE, *x.shape[2:])

        cache = PagedCache(
            keys=pages(k),
            values=None if v is None else pages(v),
            slots=self.slots,
            block_tables=self.block_tables,
            query_starts=self.query_starts,
            lengths=self.lengths,
            max_seq_len=q.shape[1],
            batch_invariant=True,
        )
        flat = (None if x is None else x.flatten(0, 1)[None] for x in (q, k, v))
        return cache.attend(0, *flat, **how).view(*q.shape[:2], q.shape[2], -1)  # type: ignore[arg-type]


def runs_of(batch: int, seq_len: int, documents: Tensor | None, device: torch.device) -> Runs:
    """Of B rows of T tokens, or of their documents [B, T]. With documents the host waits for their number."""
    N = batch * seq_len
    if documents is None:
        starts = torch.arange(0, N, max(seq_len, 1), device=device)
        longest, owner = seq_len, torch.arange(N, device=device) // max(seq_len, 1)
        num_pages = batch * -(-seq_len // PAGE_SIZE)
    else:
        begins = torch.ones(batch, seq_len, dtype=torch.bool, device=device)
        begins[:, 1:] = documents[:, 1:] != documents[:, :-1]
        starts, owner = begins.flatten().nonzero()[:, 0], begins.flatten().cumsum(0) - 1
        longest, num_pages = seq_len, N // PAGE_SIZE + starts.shape[0]
    ends = torch.cat([starts[1:], starts.new_full((min(batch, 1),), N)])
    pages = (ends - starts + PAGE_SIZE - 1) // PAGE_SIZE
    first_page = pages.cumsum(0) - pages
    place = torch.arange(N, device=device) - starts[owner]
    tables = first_page[:, None] + torch.arange(-(-longest // PAGE_SIZE), device=device)
    return Runs(
        slots=first_page[owner] * PAGE_SIZE + place,
        block_tables=tables.clamp(max=max(num_pages - 1, 0)).to(torch.int32),  # behind a sequence: read by nobody
        query_starts=torch.cat([starts, starts.new_full((1,), N)]).to(torch.int32),
        lengths=(ends - starts).to(torch.int32),
        num_pages=num_pages,
    )


def value_as_served(ordinary: Callable[[], Tensor], served: Callable[[], Tensor]) -> Tensor:
    """What served() gives, with the gradient of ordinary(), which runs only if there is to be one."""
    with torch.no_grad():
        value = served()
    return _ValueOf.apply(ordinary(), value) if torch.is_grad_enabled() else value


class _ValueOf(torch.autograd.Function):
    """The second argument; its gradient is the first one's."""

    @staticmethod
    def forward(ctx: Any, ordinary: Tensor, value: Tensor) -> Tensor:
        return value.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None
