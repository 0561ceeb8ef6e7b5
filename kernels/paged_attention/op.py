"""Paged attention as ops that compiled graphs keep whole.

A page holds the keys and values of `page_size` successive tokens of one sequence; a sequence's block table lists its
pages in order (PagedAttention, 2309.06180). Queries of all sequences of a step lie one behind the other, whether a
sequence has one (decoding) or many (a chunk of its prompt).

N queries, S sequences, P pages, M pages of a sequence at most, H query heads, G key/value heads, K features of query
and key, V of value.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.backend import refuse_dtensors, runs_triton
from kernels.paged_attention.reference import paged_attention_reference, write_pages_reference


def implementation(device: torch.device, dtype: torch.dtype) -> str:
    """What computes attention of queries of a dtype on a device: triton, or the reference and why."""
    if device.type != "cuda":
        return f"reference (on {device.type})"
    obstacle = _obstacle(dtype, on_gpu=True)
    return "triton" if obstacle is None else f"reference (triton {obstacle})"


def _obstacle(dtype: torch.dtype, *, on_gpu: bool) -> str | None:
    """Why the kernel, where there is one, must not run; None: it may."""
    if dtype == torch.float64:
        return "has no fp64"
    if on_gpu and dtype != torch.float32:
        return f"is not right yet in {str(dtype).removeprefix('torch.')} on a GPU"  # Triton 3.6 on an H200: docs/LOG.md
    return None


def paged_attention(
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
    """Causal attention of q [N, H, K] over k_pages [P, page_size, G, K] and v_pages [P, page_size, G, V].

    block_tables [S, M] int32; query_starts [S + 1] int32, ascending: the queries of sequence s are from query_starts[s]
    to before query_starts[s + 1] and are the last of its lengths[s] (int32 [S]) tokens, all of whose keys are written.
    Queries behind query_starts[S] pad: their result is 0. v_pages may be a slice of k_pages (latent attention).

    scale: of the scores, K^-1/2 unless given. A query sees the last `window` keys, itself included (None: all); slopes
    [H] fp32 add ALiBi, sinks [H] attention sinks. Softmax in fp32; fp64 is computed in fp64, by the reference on any
    device. Returns [N, H, V] in q's dtype, without a gradient. Raises TypeError for DTensors and wrong dtypes,
    ValueError for shapes.
    """
    refuse_dtensors(q=q, k_pages=k_pages, v_pages=v_pages)
    for name, x in (("block_tables", block_tables), ("query_starts", query_starts), ("lengths", lengths)):
        if x.dtype != torch.int32:
            raise TypeError(f"{name} has dtype {x.dtype}; use torch.int32")
    heads = k_pages.shape[2]
    if q.ndim != 3 or k_pages.ndim != 4 or q.shape[2] != k_pages.shape[3] or q.shape[1] % heads:
        raise ValueError(
            f"q has shape {list(q.shape)}, k_pages {list(k_pages.shape)}; they are [N, H, K] and [P, page_size, G, K]"
        )
    if v_pages.shape[:3] != k_pages.shape[:3]:
        raise ValueError(f"v_pages has shape {list(v_pages.shape)}; beside k_pages {list(k_pages.shape)} use [..., V]")
    sequences = lengths.shape[0]
    if block_tables.shape[0] != sequences or query_starts.shape != (sequences + 1,):
        raise ValueError(
            f"block_tables {list(block_tables.shape)}, query_starts {list(query_starts.shape)} and lengths "
            f"{list(lengths.shape)} are [S, M], [S + 1] and [S]"
        )
    if window is not None and window < 1:
        raise ValueError(f"window={window} must be at least 1, the query itself")
    scale = q.shape[2] ** -0.5 if scale is None else scale
    return _paged_attention(q, k_pages, v_pages, block_tables, query_starts, lengths, scale, window, slopes, sinks)


def write_pages(k_pages: Tensor, v_pages: Tensor | None, k: Tensor, v: Tensor | None, slots: Tensor) -> None:
    """Put k [N, G, K] and v [N, G, V] into pages [P, page_size, G, .], in place.

    slots int64 [N]: token n goes to place slots[n] % page_size of page slots[n] // page_size; -1: nowhere; else no two
    alike. v_pages and v are None where values are made of the keys. Raises TypeError for DTensors, ValueError for
    shapes.
    """
    refuse_dtensors(k_pages=k_pages, v_pages=v_pages, k=k, v=v)
    for name, pages, x in (("k", k_pages, k), ("v", v_pages, v)):
        if (pages is None) != (x is None):
            raise ValueError(f"{name} and {name}_pages come together, or neither does")
        if pages is not None and x is not None and x.shape != (slots.shape[0], *pages.shape[2:]):
            raise ValueError(
                f"{name} has shape {list(x.shape)}; for pages {list(pages.shape)} and {slots.shape[0]} slots use "
                f"{[slots.shape[0], *pages.shape[2:]]}"
            )
    _write_pages(k_pages, v_pages, k, v, slots)


@torch.library.custom_op("lattice::paged_attention", mutates_args=())
def _paged_attention(
    q: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    block_tables: Tensor,
    query_starts: Tensor,
    lengths: Tensor,
    scale: float,
    window: int | None,
    slopes: Tensor | None,
    sinks: Tensor | None,
) -> Tensor:
    if not runs_triton(q) or _obstacle(q.dtype, on_gpu=q.is_cuda) is not None:
        return paged_attention_reference(
            q,
            k_pages,
            v_pages,
            block_tables,
            query_starts,
            lengths,
            scale=scale,
            window=window,
            slopes=slopes,
            sinks=sinks,
        )
    from kernels.paged_attention.kernel import attend

    return attend(q, k_pages, v_pages, block_tables, query_starts, lengths, scale, window, slopes, sinks)


@_paged_attention.register_fake
def _(
    q: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    block_tables: Tensor,
    query_starts: Tensor,
    lengths: Tensor,
    scale: float,
    window: int | None,
    slopes: Tensor | None,
    sinks: Tensor | None,
) -> Tensor:
    return q.new_empty(*q.shape[:2], v_pages.shape[3])


@torch.library.custom_op("lattice::write_pages", mutates_args=("k_pages", "v_pages"))
def _write_pages(k_pages: Tensor, v_pages: Tensor | None, k: Tensor, v: Tensor | None, slots: Tensor) -> None:
    if not runs_triton(k):
        write_pages_reference(k_pages, v_pages, k, v, slots)
        return
    from kernels.paged_attention.kernel import write

    write(k_pages, v_pages, k, v, slots)
