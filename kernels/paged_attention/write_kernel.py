"""Writing keys and values into their pages, in Triton: as they are, or straight from the projection; in 8 bits or not.

Letters as in op.py.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from kernels.backend import interpreting, launches_overlap
from kernels.fp8.quantize.kernel import to_fp8
from kernels.paged_attention.reference import LARGEST, SMALLEST_SCALE

MAX_FEATURES_WRITTEN = 8192
MAX_HEADS = 8
"""Of a program that rotates."""
ROUNDS = tl.constexpr(12582912.0)  # 1.5 * 2^23: adding it to a smaller number leaves no fraction
SMALLEST = tl.constexpr(SMALLEST_SCALE)


def write(
    k_pages: Tensor,
    v_pages: Tensor | None,
    k: Tensor,
    v: Tensor | None,
    slots: Tensor,
    k_scales: Tensor | None = None,
    v_scales: Tensor | None = None,
) -> None:
    """Arguments as in op.write_pages."""
    slots = slots.contiguous()
    for pages, x, scales in ((k_pages, k, k_scales), (v_pages, v, v_scales)):
        if pages is None or x is None or not x.numel():
            continue
        heads, features = x.shape[1:]
        if scales is not None:
            _cache_write_quantized[(x.shape[0], heads)](
                pages,
                scales,
                x,
                slots,
                *pages.stride(),
                *scales.stride(),
                *x.stride(),
                PAGE_SIZE=pages.shape[1],
                FEATURES=features,
                PADDED=triton.next_power_of_2(features),
                LARGEST=LARGEST[pages.dtype],
                EMULATE=interpreting(),
                num_warps=1 if features <= 256 else 4,
            )
            continue
        block = min(triton.next_power_of_2(heads * features), MAX_FEATURES_WRITTEN)
        _cache_write[(x.shape[0], triton.cdiv(heads * features, block))](
            pages,
            x,
            slots,
            *pages.stride(),
            *x.stride(),
            PAGE_SIZE=pages.shape[1],
            FEATURES=features,
            SIZE=heads * features,
            BLOCK=block,
            num_warps=4,
        )


@triton.jit
def _cache_write(
    pages_ptr,
    x_ptr,
    slots_ptr,
    stride_pp,
    stride_pt,
    stride_pg,
    stride_pk,
    stride_xn,
    stride_xg,
    stride_xk,
    PAGE_SIZE: tl.constexpr,
    FEATURES: tl.constexpr,
    SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One token of keys, or of values."""
    slot = tl.load(slots_ptr + tl.program_id(0))
    if slot >= 0:
        element = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        head, feature = element // FEATURES, element % FEATURES
        inside = element < SIZE
        x_ptr += tl.program_id(0).to(tl.int64) * stride_xn
        x = tl.load(x_ptr + head * stride_xg + feature * stride_xk, mask=inside, other=0.0)
        pages_ptr += slot // PAGE_SIZE * stride_pp + slot % PAGE_SIZE * stride_pt
        tl.store(pages_ptr + head * stride_pg + feature * stride_pk, x.to(pages_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _scale_of(magnitude_bits, LARGEST: tl.constexpr):
    """Of rows, by the bits of their largest magnitudes (reference.quantize_rows), among which NaN is the largest."""
    amax = magnitude_bits.to(tl.float32, bitcast=True)
    scale = tl.div_rn(amax, tl.full(amax.shape, LARGEST, tl.float32))
    return tl.where(amax == 0.0, 1.0, tl.where(scale < SMALLEST, SMALLEST, scale))


@triton.jit
def _magnitude_bits(x):
    return x.to(tl.int32, bitcast=True) & 0x7FFFFFFF


@triton.jit
def _codes_of(x, scale, dtype: tl.constexpr, LARGEST: tl.constexpr, EMULATE: tl.constexpr):
    """x / scale to the nearest code, ties to even."""
    y = tl.div_rn(x, tl.broadcast_to(scale, x.shape))
    if dtype == tl.int8:
        return ((y + ROUNDS) - ROUNDS).to(tl.int8)
    else:
        return to_fp8(y, dtype, LARGEST, EMULATE)


@triton.jit
def _cache_write_quantized(
    pages_ptr,
    scales_ptr,
    x_ptr,
    slots_ptr,
    stride_pp,
    stride_pt,
    stride_pg,
    stride_pk,
    stride_sp,
    stride_st,
    stride_sg,
    stride_xn,
    stride_xg,
    stride_xk,
    PAGE_SIZE: tl.constexpr,
    FEATURES: tl.constexpr,
    PADDED: tl.constexpr,
    LARGEST: tl.constexpr,
    EMULATE: tl.constexpr,
):
    """One head of one token of keys, or of values."""
    slot = tl.load(slots_ptr + tl.program_id(0))
    if slot >= 0:
        feature, head = tl.arange(0, PADDED), tl.program_id(1)
        inside = feature < FEATURES
        x_ptr += tl.program_id(0).to(tl.int64) * stride_xn + head * stride_xg
        x = tl.load(x_ptr + feature * stride_xk, mask=inside, other=0.0).to(tl.float32)[None, :]
        scale = _scale_of(tl.max(_magnitude_bits(x), axis=1), LARGEST)
        codes = _codes_of(x, scale[:, None], pages_ptr.dtype.element_ty, LARGEST, EMULATE)
        page, place = slot // PAGE_SIZE, slot % PAGE_SIZE
        row = pages_ptr + page * stride_pp + place * stride_pt + head * stride_pg
        tl.store(row + feature[None, :] * stride_pk, codes, mask=inside[None, :])
        at = scales_ptr + page * stride_sp + place * stride_st + head * stride_sg
        tl.store(at + tl.arange(0, 1), scale)


def rotate_and_write(
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
    N, heads, K = qkv.shape
    G = k_pages.shape[2]
    if N == 0:
        return
    half = triton.next_power_of_2(K // 2)
    block = min(MAX_HEADS, triton.next_power_of_2(heads))
    overlap = launches_overlap(qkv)
    _cache_rotate_and_write[(N, triton.cdiv(heads, block))](
        qkv,
        cos,
        sin,
        q_weight,
        k_weight,
        k_pages,
        v_pages,
        slots.contiguous(),
        k_scales,
        v_scales,
        *qkv.stride(),
        *k_pages.stride(),
        *v_pages.stride(),
        *((0, 0, 0) if k_scales is None else k_scales.stride()),
        *((0, 0, 0) if v_scales is None else v_scales.stride()),
        eps,
        H=heads - 2 * G,
        G=G,
        HALF=K // 2,
        PADDED_HALF=half,
        HEADS=block,
        PAGE_SIZE=k_pages.shape[1],
        ROTATES=cos is not None,
        NORMS=q_weight is not None,
        LARGEST=LARGEST.get(k_pages.dtype, 0.0),
        EMULATE=interpreting(),
        OVERLAPS=overlap,
        num_warps=2,
        **({"launch_pdl": True} if overlap else {}),
    )


@triton.jit
def _cache_rotate_and_write(
    qkv_ptr,
    cos_ptr,
    sin_ptr,
    q_weight_ptr,
    k_weight_ptr,
    k_ptr,
    v_ptr,
    slots_ptr,
    k_scales_ptr,
    v_scales_ptr,
    stride_n,
    stride_h,
    stride_f,
    stride_kp,
    stride_kt,
    stride_kg,
    stride_kk,
    stride_vp,
    stride_vt,
    stride_vg,
    stride_vv,
    stride_ksp,
    stride_kst,
    stride_ksg,
    stride_vsp,
    stride_vst,
    stride_vsg,
    eps,
    H: tl.constexpr,
    G: tl.constexpr,
    HALF: tl.constexpr,
    PADDED_HALF: tl.constexpr,
    HEADS: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    ROTATES: tl.constexpr,
    NORMS: tl.constexpr,
    LARGEST: tl.constexpr,
    EMULATE: tl.constexpr,
    OVERLAPS: tl.constexpr,
):
    """Some heads of one token, as two halves that turn together. LARGEST: of codes in 8 bits; 0: pages have none."""
    if OVERLAPS:
        gdc_wait()
        gdc_launch_dependents()
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)[:, None]
    pair = tl.arange(0, PADDED_HALF)[None, :]
    is_q, is_k, is_v = head < H, (head >= H) & (head < H + G), (head >= H + G) & (head < H + 2 * G)
    there = pair < HALF
    source = qkv_ptr + token * stride_n + head * stride_h + pair * stride_f
    inside = there & (head < H + 2 * G)
    first_given = tl.load(source, mask=inside, other=0.0)
    second_given = tl.load(source + HALF * stride_f, mask=inside, other=0.0)
    first, second = first_given.to(tl.float32), second_given.to(tl.float32)
    if NORMS:
        mean = (tl.sum(first * first, axis=1) + tl.sum(second * second, axis=1)) / (2 * HALF)
        inverse = 1.0 / tl.sqrt_rn(mean + eps)
        weight = tl.where(is_q, q_weight_ptr + pair, k_weight_ptr + pair)
        first = first * inverse[:, None] * tl.load(weight, mask=there, other=0.0).to(tl.float32)
        second = second * inverse[:, None] * tl.load(weight + HALF, mask=there, other=0.0).to(tl.float32)
        first = first.to(qkv_ptr.dtype.element_ty).to(tl.float32)  # rounded, as a norm on its own would
        second = second.to(qkv_ptr.dtype.element_ty).to(tl.float32)
    if ROTATES:
        cos = tl.load(cos_ptr + token * HALF + pair, mask=there, other=0.0)
        sin = tl.load(sin_ptr + token * HALF + pair, mask=there, other=0.0)
        first, second = first * cos - second * sin, second * cos + first * sin
    slot = tl.load(slots_ptr + token)
    page, place = slot // PAGE_SIZE, slot % PAGE_SIZE
    k_row = k_ptr + page * stride_kp + place * stride_kt + (head - H) * stride_kg + pair * stride_kk
    v_row = v_ptr + page * stride_vp + place * stride_vt + (head - H - G) * stride_vg + pair * stride_vv
    kept_k, kept_v = is_k & there & (slot >= 0), is_v & there & (slot >= 0)
    if LARGEST == 0.0:
        tl.store(source, first.to(qkv_ptr.dtype.element_ty), mask=(is_q | is_k) & there)
        tl.store(source + HALF * stride_f, second.to(qkv_ptr.dtype.element_ty), mask=(is_q | is_k) & there)
        tl.store(k_row, first.to(k_ptr.dtype.element_ty), mask=kept_k)
        tl.store(k_row + HALF * stride_kk, second.to(k_ptr.dtype.element_ty), mask=kept_k)
        tl.store(v_row, first_given.to(v_ptr.dtype.element_ty), mask=kept_v)
        tl.store(v_row + HALF * stride_vv, second_given.to(v_ptr.dtype.element_ty), mask=kept_v)
    else:
        first = tl.where(is_v, first_given, first.to(qkv_ptr.dtype.element_ty)).to(tl.float32)
        second = tl.where(is_v, second_given, second.to(qkv_ptr.dtype.element_ty)).to(tl.float32)
        bits = tl.maximum(tl.max(_magnitude_bits(first), axis=1), tl.max(_magnitude_bits(second), axis=1))
        scale = _scale_of(bits, LARGEST)[:, None]
        codes_1 = _codes_of(first, scale, k_ptr.dtype.element_ty, LARGEST, EMULATE)
        codes_2 = _codes_of(second, scale, k_ptr.dtype.element_ty, LARGEST, EMULATE)
        tl.store(k_row, codes_1, mask=kept_k)
        tl.store(k_row + HALF * stride_kk, codes_2, mask=kept_k)
        tl.store(v_row, codes_1, mask=kept_v)
        tl.store(v_row + HALF * stride_vv, codes_2, mask=kept_v)
        k_scale = k_scales_ptr + page * stride_ksp + place * stride_kst + (head - H) * stride_ksg
        v_scale = v_scales_ptr + page * stride_vsp + place * stride_vst + (head - H - G) * stride_vsg
        tl.store(k_scale, scale, mask=is_k & (slot >= 0))
        tl.store(v_scale, scale, mask=is_v & (slot >= 0))
        first = tl.where(is_q, first, codes_1.to(tl.float32) * scale)
        second = tl.where(is_q, second, codes_2.to(tl.float32) * scale)
        tl.store(source, first.to(qkv_ptr.dtype.element_ty), mask=inside)
        tl.store(source + HALF * stride_f, second.to(qkv_ptr.dtype.element_ty), mask=inside)
