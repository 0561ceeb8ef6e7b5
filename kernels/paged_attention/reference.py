"""Paged attention in plain PyTorch: a loop over sequences, each of whose pages are put together first.

Letters as in op.py.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.attention.reference import masked_attention


def paged_attention_reference(
    q: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    block_tables: Tensor,
    query_starts: Tensor,
    lengths: Tensor,
    *,
    scale: float | None = None,
    window: int | None = None,
    slopes: Tensor | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """Arguments and result as in op.paged_attention. Reads the numbers of queries and keys on the host."""
    output = q.new_zeros(*q.shape[:2], v_pages.shape[3])
    starts = query_starts.tolist()
    for number, length in enumerate(lengths.tolist()):
        first, last = starts[number], starts[number + 1]
        if first == last:
            continue
        pages = block_tables[number, : -(-length // k_pages.shape[1])].long()
        k, v = (x[pages].flatten(0, 1)[:length] for x in (k_pages, v_pages))
        key = torch.arange(length, device=q.device)
        query = key[length - (last - first) :, None]
        seen = key <= query
        if window is not None:
            seen = seen & (key > query - window)
        bias = None if slopes is None else -slopes[:, None, None] * (query - key)
        result, _ = masked_attention(
            q[None, first:last], k[None], v[None], seen[None, None], scale=scale, bias=bias, sinks=sinks
        )
        output[first:last] = result[0]
    return output


def write_pages_reference(k_pages: Tensor, v_pages: Tensor | None, k: Tensor, v: Tensor | None, slots: Tensor) -> None:
    """Arguments as in op.write_pages."""
    written = slots >= 0
    for pages, x in ((k_pages, k), (v_pages, v)):
        if pages is not None and x is not None:
            page, offset = slots[written] // pages.shape[1], slots[written] % pages.shape[1]
            pages[page, offset] = x[written].to(pages.dtype)
