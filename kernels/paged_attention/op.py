"""Paged attention as ops that compiled graphs keep whole.

A page holds the keys and values of `page_size` successive tokens of one sequence; a sequence's block table lists its
pages in order (PagedAttention, 2309.06180). Queries of all sequences of a step lie one behind the other, whether a
sequence has one (decoding) or many (a chunk of its prompt).

Pages may hold keys and values in 8 bits: codes in float8_e4m3fn or int8, and beside them a scale for each token and
head.

N queries, S sequences, P pages, M pages of a sequence at most, H query heads, G key/value heads, K features of query
and key, V of value.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.backend import refuse_dtensors, runs_triton
from kernels.paged_attention.reference import (
    LARGEST,
    paged_attention_reference,
    rotate_and_write_reference,
    write_pages_reference,
)


def implementation(device: torch.device, dtype: torch.dtype) -> str:
    """What computes attention of queries of a dtype on a device: triton, or the reference and why."""
    if device.type != "cuda":
        return f"reference (on {device.type})"
    return "reference (triton has no fp64)" if dtype == torch.float64 else "triton"


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
    decodes: bool = False,
    splits: int | None = None,
    batch_invariant: bool = False,
    k_scales: Tensor | None = None,
    v_scales: Tensor | None = None,
) -> Tensor:
    """Causal attention of q [N, H, K] over k_pages [P, page_size, G, K] and v_pages [P, page_size, G, V].

    block_tables [S, M] int32; query_starts [S + 1] int32, ascending: the queries of sequence s are from query_starts[s]
    to before query_starts[s + 1] and are the last of its lengths[s] (int32 [S]) tokens, all of whose keys are written.
    Queries behind query_starts[S] pad: their result is 0. v_pages may be a slice of k_pages (latent attention).

    scale: of the scores, K^-1/2 unless given. A query sees the last `window` keys, itself included (None: all); slopes
    [H] fp32 add ALiBi, sinks [H] attention sinks. Softmax in fp32; fp64 is computed in fp64, by the reference on any
    device. decodes: N = S, every sequence has one query or, with length 0, pads; query_starts is not read. splits:
    programs that share the keys of a sequence, a power of two (None: as many as the GPU has room for, so that the last
    bits of a result depend on how many sequences there are; with a number they do not). batch_invariant: a query's
    result is a function of it and of the keys it sees alone, to the bit, whatever other queries there are, as one or as
    several, and wherever the pages lie; without splits, and slower. k_scales and v_scales [P, page_size, G] fp32: pages
    in 8 bits hold codes, keys and values are these times the scale of their row; not with batch_invariant.

    Returns [N, H, V] in q's dtype, without a gradient. Raises TypeError for DTensors and wrong dtypes, ValueError for
    shapes.
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
    _check_scales(k_pages=(k_pages, k_scales), v_pages=(v_pages, v_scales))
    if v_pages.shape[:3] != k_pages.shape[:3]:
        raise ValueError(f"v_pages has shape {list(v_pages.shape)}; beside k_pages {list(k_pages.shape)} use [..., V]")
    sequences = lengths.shape[0]
    if block_tables.shape[0] != sequences or query_starts.shape != (sequences + 1,):
        raise ValueError(
            f"block_tables {list(block_tables.shape)}, query_starts {list(query_starts.shape)} and lengths "
            f"{list(lengths.shape)} are [S, M], [S + 1] and [S]"
        )
    if decodes and q.shape[0] != sequences:
        raise ValueError(f"q has {q.shape[0]} queries; decodes=True is for one of each of the {sequences} sequences")
    if splits is not None and (splits < 1 or splits & (splits - 1)):
        raise ValueError(f"splits={splits} must be a power of two, or None")
    if window is not None and window < 1:
        raise ValueError(f"window={window} must be at least 1, the query itself")
    if batch_invariant and k_scales is not None:
        raise ValueError("batch_invariant=True is for pages that are not in 8 bits")
    scale = q.shape[2] ** -0.5 if scale is None else scale
    return _paged_attention(
        q,
        k_pages,
        v_pages,
        block_tables,
        query_starts,
        lengths,
        scale,
        window,
        slopes,
        sinks,
        splits,
        decodes,
        batch_invariant,
        k_scales,
        v_scales,
    )


def _check_scales(**both: tuple[Tensor | None, Tensor | None]) -> None:
    """Pages in 8 bits have scales, others have none."""
    for name, (pages, scales) in both.items():
        quantized = pages is not None and pages.dtype in LARGEST
        if quantized != (scales is not None):
            raise ValueError(f"{name} in {'8 bits need' if quantized else 'more than 8 bits have no'} scales")
        if pages is not None and scales is not None and scales.shape != pages.shape[:3]:
            raise ValueError(f"scales of {name} have shape {list(scales.shape)}; use {list(pages.shape[:3])}")
        if scales is not None and scales.dtype != torch.float32:
            raise TypeError(f"scales of {name} have dtype {scales.dtype}; use torch.float32")


def write_pages(
    k_pages: Tensor,
    v_pages: Tensor | None,
    k: Tensor,
    v: Tensor | None,
    slots: Tensor,
    *,
    k_scales: Tensor | None = None,
    v_scales: Tensor | None = None,
) -> None:
    """Put k [N, G, K] and v [N, G, V] into pages [P, page_size, G, .], in place.

    slots int64 [N]: token n goes to place slots[n] % page_size of page slots[n] // page_size; -1: nowhere; else no two
    alike. v_pages and v are None where values are made of the keys. Pages in 8 bits get codes, k_scales and v_scales
    [P, page_size, G] fp32 the scales: the largest magnitude of a row over that of the dtype. Raises TypeError for
    DTensors and wrong dtypes, ValueError for shapes.
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
    _check_scales(k_pages=(k_pages, k_scales), v_pages=(v_pages, v_scales))
    _write_pages(k_pages, v_pages, k, v, slots, k_scales, v_scales)


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
    splits: int | None,
    decodes: bool,
    batch_invariant: bool = False,
    k_scales: Tensor | None = None,
    v_scales: Tensor | None = None,
) -> Tensor:
    if not runs_triton(q) or q.dtype == torch.float64:
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
            decodes=decodes,
            batch_invariant=batch_invariant,
            k_scales=k_scales,
            v_scales=v_scales,
        )
    from kernels.paged_attention.kernel import attend

    return attend(
        q,
        k_pages,
        v_pages,
        block_tables,
        query_starts,
        lengths,
        scale,
        window,
        slopes,
        sinks,
        splits,
        decodes,
        batch_invariant,
        k_scales,
        v_scales,
    )


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
    splits: int | None,
    decodes: bool,
    batch_invariant: bool = False,
    k_scales: Tensor | None = None,
    v_scales: Tensor | None = None,
) -> Tensor:
    return q.new_empty(*q.shape[:2], v_pages.shape[3])


@torch.library.custom_op("lattice::write_pages", mutates_args=("k_pages", "v_pages", "k_scales", "v_scales"))
def _write_pages(
    k_pages: Tensor,
    v_pages: Tensor | None,
    k: Tensor,
    v: Tensor | None,
    slots: Tensor,
    k_scales: Tensor | None,
    v_scales: Tensor | None,
) -> None:
    if not runs_triton(k) or k.dtype == torch.float64:
        write_pages_reference(k_pages, v_pages, k, v, slots, k_scales, v_scales)
        return
    from kernels.paged_attention.write_kernel import write

    write(k_pages, v_pages, k, v, slots, k_scales, v_scales)


def rotate_and_write(
    qkv: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    slots: Tensor,
    *,
    cos: Tensor | None = None,
    sin: Tensor | None = None,
    q_weight: Tensor | None = None,
    k_weight: Tensor | None = None,
    eps: float = 0.0,
    k_scales: Tensor | None = None,
    v_scales: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """All that happens between the projection and attention, in place: qkv [N, H + 2G, K] in, q [N, H, K], k and v
    [N, G, K] out, its parts.

    q and k are normalised (RMSNorm over K by q_weight and k_weight [K] and eps; None: not), then turned by cos and sin
    [..., N, 1, K/2], the tables of models/layers/rope.py (None: not), each step rounded as on its own; k and v go into
    their pages as `write_pages` puts them. With pages in 8 bits k and v come out as these hold them, so that attention
    that does not read pages sees what attention that does will see. Errors as there.
    """
    refuse_dtensors(qkv=qkv, k_pages=k_pages, v_pages=v_pages, q_weight=q_weight, k_weight=k_weight)
    G, K = k_pages.shape[2:]
    if qkv.ndim != 3 or qkv.shape[1] <= 2 * G or qkv.shape[2] != K or K % 2 or v_pages.shape != k_pages.shape:
        raise ValueError(
            f"qkv has shape {list(qkv.shape)}, k_pages {list(k_pages.shape)}, v_pages {list(v_pages.shape)}; they are "
            "[N, H + 2G, K] with an even K, and [P, page_size, G, K] both"
        )
    tables = [x for x in (cos, sin) if x is not None]
    if len(tables) == 1 or any(x.numel() != qkv.shape[0] * (K // 2) or x.dtype != torch.float32 for x in tables):
        raise ValueError(f"cos and sin are both given or None; beside qkv {list(qkv.shape)} use fp32 [N, 1, K/2]")
    weights = [x for x in (q_weight, k_weight) if x is not None]
    if len(weights) == 1 or any(x.shape != (K,) for x in weights) or slots.shape != qkv.shape[:1]:
        raise ValueError(f"q_weight and k_weight are both [{K}] or None, slots [{qkv.shape[0]}]")
    _check_scales(k_pages=(k_pages, k_scales), v_pages=(v_pages, v_scales))
    _rotate_and_write(qkv, cos, sin, q_weight, k_weight, eps, k_pages, v_pages, slots, k_scales, v_scales)
    q, k, v = qkv.split((qkv.shape[1] - 2 * G, G, G), dim=1)
    return q, k, v


@torch.library.custom_op(
    "lattice::rotate_and_write", mutates_args=("qkv", "k_pages", "v_pages", "k_scales", "v_scales")
)
def _rotate_and_write(
    qkv: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    eps: float,
    k_pages: Tensor,
    v_pages: Tensor,
    slots: Tensor,
    k_scales: Tensor | None,
    v_scales: Tensor | None,
) -> None:
    if not runs_triton(qkv) or qkv.dtype == torch.float64:
        rotate_and_write_reference(qkv, cos, sin, q_weight, k_weight, eps, k_pages, v_pages, slots, k_scales, v_scales)
        return
    from kernels.paged_attention.write_kernel import rotate_and_write

    rotate_and_write(qkv, cos, sin, q_weight, k_weight, eps, k_pages, v_pages, slots, k_scales, v_scales)
