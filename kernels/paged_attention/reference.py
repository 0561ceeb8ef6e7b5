"""Paged attention in plain PyTorch: a loop over sequences, each of whose pages are put together first.

Letters as in op.py.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.attention.reference import masked_attention
from kernels.rms_norm.reference import rms_norm_reference
from kernels.rope.reference import rope_reference

LARGEST = {torch.float8_e4m3fn: 448.0, torch.int8: 127.0}
"""What the largest element of a quantised row becomes, by dtype of the pages."""
SMALLEST_SCALE = torch.finfo(torch.float32).tiny


def quantize_rows(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """x [..., K] as codes [..., K] of a dtype of LARGEST times a scale [...] fp32 of each row, to the nearest code.

    A row of zeros has scale 1. Of a row with NaN, and with infinities, the scale is NaN or infinite, so that neither
    gets lost.
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    amax = x.to(wide).abs().amax(-1)
    largest = amax.new_full((), LARGEST[dtype], dtype=torch.float32)  # by a number CUDA does not divide: it multiplies
    scales = (amax.float() / largest).clamp(min=SMALLEST_SCALE)
    scales = torch.where(amax == 0, 1.0, scales)
    codes = x.to(wide) / scales[..., None].to(wide)
    if dtype == torch.int8:
        return codes.nan_to_num().round().clamp(-127, 127).to(dtype), scales
    return codes.clamp(-LARGEST[dtype], LARGEST[dtype]).to(dtype), scales


def dequantized(codes: Tensor, scales: Tensor | None, dtype: torch.dtype) -> Tensor:
    """What rows stand for, in dtype; scales None: they are not quantised."""
    if scales is None:
        return codes
    wide = torch.promote_types(dtype, torch.float32)
    return (codes.to(wide) * scales[..., None].to(wide)).to(dtype)


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
    decodes: bool = False,
    splits: int | None = None,
    batch_invariant: bool = False,
    k_scales: Tensor | None = None,
    v_scales: Tensor | None = None,
) -> Tensor:
    """Arguments and result as in op.paged_attention. Reads the numbers of queries and keys on the host."""
    wide = torch.promote_types(q.dtype, torch.float32)
    output = q.new_zeros(*q.shape[:2], v_pages.shape[3])
    starts = list(range(len(q) + 1)) if decodes else query_starts.tolist()
    for number, length in enumerate(lengths.tolist()):
        first, last = starts[number], starts[number + 1]
        if first == last or length == 0:
            continue
        pages = block_tables[number, : -(-length // k_pages.shape[1])].long()
        k, v = (
            dequantized(x[pages], None if scales is None else scales[pages], wide).flatten(0, 1)[:length]
            for x, scales in ((k_pages, k_scales), (v_pages, v_scales))
        )
        its_q = q[None, first:last].to(k.dtype)  # a quantised key is not rounded to the dtype of q
        if batch_invariant:
            for n in range(first, last):
                end = length - (last - 1 - n)
                seen_from = 0 if window is None else max(end - window, 0)
                output[n] = _alone(q[n], k[seen_from:end], v[seen_from:end], scale, slopes, sinks)
            continue
        key = torch.arange(length, device=q.device)
        query = key[length - (last - first) :, None]
        seen = key <= query
        if window is not None:
            seen = seen & (key > query - window)
        bias = None if slopes is None else -slopes[:, None, None] * (query - key)
        result, _ = masked_attention(its_q, k[None], v[None], seen[None, None], scale=scale, bias=bias, sinks=sinks)
        output[first:last] = result[0].to(q.dtype)
    return output


def _alone(q: Tensor, k: Tensor, v: Tensor, scale: float | None, slopes: Tensor | None, sinks: Tensor | None) -> Tensor:
    """[H, V] of the one query q [H, K] that sees all keys, k [T, G, K] and v [T, G, V], in memory of their own."""
    length = k.shape[0]
    behind = torch.arange(length - 1, -1, -1, device=q.device)
    seen = torch.ones(1, 1, 1, length, dtype=torch.bool, device=q.device)
    bias = None if slopes is None else -slopes[:, None, None] * behind
    q_, k_, v_ = (x.clone() for x in (q[None, None], k[None], v[None]))
    return masked_attention(q_, k_, v_, seen, scale=scale, bias=bias, sinks=sinks)[0][0, 0]


def rotate_and_write_reference(
    qkv: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    eps: float,
    k_pages: Tensor,
    v_pages: Tensor,
    slots: Tensor,
    k_scales: Tensor | None = None,
    v_scales: Tensor | None = None,
) -> None:
    """Arguments as in op.rotate_and_write."""
    G = k_pages.shape[2]
    q, k, v = qkv.split((qkv.shape[1] - 2 * G, G, G), dim=1)
    if q_weight is not None and k_weight is not None:
        q, k = rms_norm_reference(q, q_weight, eps), rms_norm_reference(k, k_weight, eps)
    if cos is not None and sin is not None:
        tables = (x.reshape(1, qkv.shape[0], 1, -1) for x in (cos, sin))
        turned_q, turned_k = rope_reference(q[None], k[None], *tables)
        assert turned_k is not None
        q, k = turned_q[0], turned_k[0]
    write_pages_reference(k_pages, v_pages, k, v, slots, k_scales, v_scales)
    if k_scales is not None:
        k, v = (dequantized(*quantize_rows(x, pages.dtype), qkv.dtype) for x, pages in ((k, k_pages), (v, v_pages)))
        qkv[:, -G:] = v
    qkv[:, : -2 * G], qkv[:, -2 * G : -G] = q, k


def write_pages_reference(
    k_pages: Tensor,
    v_pages: Tensor | None,
    k: Tensor,
    v: Tensor | None,
    slots: Tensor,
    k_scales: Tensor | None = None,
    v_scales: Tensor | None = None,
) -> None:
    """Arguments as in op.write_pages."""
    written = slots >= 0
    for pages, x, scales in ((k_pages, k, k_scales), (v_pages, v, v_scales)):
        if pages is None or x is None:
            continue
        page, offset = slots[written] // pages.shape[1], slots[written] % pages.shape[1]
        if scales is None:
            pages[page, offset] = x[written].to(pages.dtype)
        else:
            pages[page, offset], scales[page, offset] = quantize_rows(x[written], pages.dtype)
