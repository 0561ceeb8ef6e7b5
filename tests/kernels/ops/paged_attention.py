"""Cases of attention over pages."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.paged_attention import paged_attention, rotate_and_write, write_pages
from kernels.paged_attention.op import _paged_attention, _write_pages
from kernels.paged_attention.reference import dequantized, paged_attention_reference, quantize_rows
from models.layers.rope import rotate
from tests.kernels.ops.case import Case, Inputs, Shape, normal

SHAPE = (6, 2, 20, 12, 3)  # H, G, K, V, page_size
COUNTS, LENGTHS = (1, 7, 0, 1, 2), (9, 7, 4, 1, 35)  # queries and tokens of each sequence
PADDING = 2


def _inputs(shape: Shape, dtype: torch.dtype, generator: torch.Generator) -> Inputs:
    """q, pages, tables; slopes and sinks at the end. Pages of a sequence lie anywhere, and some belong to nobody."""
    H, G, K, V, page_size = shape
    needed = [-(-length // page_size) for length in LENGTHS]
    order = torch.randperm(sum(needed) + 3, generator=generator).to(torch.int32)
    tables = torch.full((len(LENGTHS), max(needed) + 1), 0, dtype=torch.int32)
    for table, n, end in zip(tables, needed, torch.tensor(needed).cumsum(0).tolist(), strict=True):
        table[:n] = order[end - n : end]
    starts = torch.tensor((0, *COUNTS)).cumsum(0).to(torch.int32)
    return (
        normal((sum(COUNTS) + PADDING, H, K), dtype, generator),
        normal((len(order), page_size, G, K), dtype, generator),
        normal((len(order), page_size, G, V), dtype, generator),
        tables,
        starts,
        torch.tensor(LENGTHS, dtype=torch.int32),
        normal((H,), torch.float32, generator).abs() * 0.1,
        normal((H,), torch.float32, generator),
    )


def _call(function: Any, *inputs: Any, slopes: bool = False, sinks: bool = False, **settings: Any) -> Tensor:
    *tensors, its_slopes, its_sinks = inputs
    return function(*tensors, slopes=its_slopes if slopes else None, sinks=its_sinks if sinks else None, **settings)


def _quantized(function: Any, *inputs: Any, codes: torch.dtype, call: Any = _call, **settings: Any) -> Tensor:
    """Pages as codes with scales."""
    q, *pages, tables, starts, lengths, slopes, sinks = inputs
    (k, k_scales), (v, v_scales) = (quantize_rows(x, codes) for x in pages)
    scales = {"k_scales": k_scales, "v_scales": v_scales}
    return call(function, q, k, v, tables, starts, lengths, slopes, sinks, **scales, **settings)


def _write_codes(
    function: Any, q: Tensor, k_pages: Tensor, v_pages: Tensor, *rest: Any, codes: torch.dtype
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What the pages hold, and their scales, after writing tokens as `_write` does; one of zeros."""
    k, v = (pages.flatten(0, 1)[:6] * 2 for pages in (k_pages, v_pages))
    k[1] = 0
    slots = torch.arange(6, device=q.device) * 7
    slots[2] = -1
    (k_codes, k_scales), (v_codes, v_scales) = (
        (torch.zeros_like(pages, dtype=codes), torch.zeros_like(pages[..., 0], dtype=torch.float32))
        for pages in (k_pages, v_pages)
    )
    function(k_codes, v_codes, k, v, slots, k_scales=k_scales, v_scales=v_scales)
    return dequantized(k_codes, k_scales, q.dtype), dequantized(v_codes, v_scales, q.dtype), k_scales, v_scales


def _rotate_codes(function: Any, q: Tensor, k_pages: Tensor, *rest: Any, codes: torch.dtype) -> tuple[Tensor, ...]:
    """What comes out of the projection and what the pages hold; the first token is kept nowhere."""
    N, (G, K) = len(q), k_pages.shape[2:]
    slots = torch.arange(N, device=q.device) * 3 - 1
    angles = torch.arange(N * (K // 2), device=q.device, dtype=torch.float32).view(1, N, 1, K // 2) * 0.37
    k_codes, v_codes = (torch.zeros_like(k_pages, dtype=codes) for _ in range(2))
    k_scales, v_scales = (torch.zeros_like(k_pages[..., 0], dtype=torch.float32) for _ in range(2))
    qkv = torch.cat([q, q[:, :G] * 2, q[:, :G] - 1], dim=1)
    tables = {"cos": angles.cos(), "sin": angles.sin()}
    out = function(qkv, k_codes, v_codes, slots, **tables, k_scales=k_scales, v_scales=v_scales)
    kept = (dequantized(x, scales, q.dtype) for x, scales in ((k_codes, k_scales), (v_codes, v_scales)))
    return torch.cat(out, 1), *kept, k_scales, v_scales


def _latent(function: Any, q: Tensor, k_pages: Tensor, v_pages: Tensor, *rest: Any) -> Tensor:
    """Values that are the beginning of the keys."""
    return _call(function, q, k_pages, k_pages[..., : v_pages.shape[3]], *rest, scale=0.3)


def _decode(function: Any, *inputs: Any, **settings: Any) -> Tensor:
    """One query of each sequence, the keys of each shared by several programs; one sequence pads."""
    q, k_pages, v_pages, tables, _, lengths, *rest = inputs
    lengths = lengths.clone()
    lengths[2] = 0
    starts = torch.arange(len(lengths) + 1, dtype=torch.int32, device=q.device)
    return _call(
        function, q[: len(lengths)], k_pages, v_pages, tables, starts, lengths, *rest, decodes=True, **settings
    )


def _rotate(
    function: Any, q: Tensor, k_pages: Tensor, v_pages: Tensor, *rest: Any, norms: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """q and pages after tokens went to the places with numbers 1, 6, 11, ... and one nowhere."""
    k_pages, v_pages = k_pages.clone(), v_pages.clone()
    N, G, K = len(q), k_pages.shape[2], q.shape[2]
    slots = torch.arange(N, device=q.device) * 5 + 1
    slots[3] = -1
    angles = torch.arange(N * (K // 2), device=q.device, dtype=torch.float32).view(1, N, 1, K // 2) * 0.37
    tables = {"cos": angles.cos(), "sin": angles.sin()} if not norms else {}
    weights = {"q_weight": k_pages[0, 0, 0] + 1, "k_weight": k_pages[1, 0, 0] - 1, "eps": 1e-5} if norms else {}
    qkv = torch.cat([q, q[:, : 2 * G] * 2], dim=1)
    return torch.cat(function(qkv, k_pages, v_pages, slots, **tables, **weights), 1), k_pages, v_pages


def _plain_rotate(
    qkv: Tensor, k_pages: Tensor, v_pages: Tensor, slots: Tensor, **given: Any
) -> tuple[Tensor, Tensor, Tensor]:
    G, given = k_pages.shape[2], {"eps": 0.0} | given
    q, k, v = qkv[:, : -2 * G], qkv[:, -2 * G : -G], qkv[:, -G:]
    if "q_weight" in given:
        wide = torch.promote_types(q.dtype, torch.float32)
        q, k = (
            F.rms_norm(x.to(wide), x.shape[-1:], weight.to(wide), given["eps"]).to(x.dtype)
            for x, weight in ((q, given["q_weight"]), (k, given["k_weight"]))
        )
    if "cos" in given:
        q, k = (rotate(x[None], given["cos"], given["sin"])[0] for x in (q, k))
    scales = given.get("k_scales"), given.get("v_scales")
    _plain_write(k_pages, v_pages, k, v, slots, *scales)
    if scales[0] is not None:
        k, v = (dequantized(*quantize_rows(x, k_pages.dtype), x.dtype) for x in (k, v))
    return q, k, v


def _write(
    function: Any, q: Tensor, k_pages: Tensor, v_pages: Tensor, tables: Tensor, *rest: Any
) -> tuple[Tensor, Tensor]:
    """Pages after writing tokens to the places with numbers 0, 7, 14, ... and one nowhere."""
    k_pages, v_pages = k_pages.clone(), v_pages.clone()
    k, v = (pages.flatten(0, 1)[:6] * 2 for pages in (k_pages, v_pages))
    slots = torch.arange(6, device=q.device) * 7
    slots[2] = -1
    function(k_pages, v_pages, k, v, slots)
    return k_pages, v_pages


def _plain_write(
    k_pages: Tensor,
    v_pages: Tensor,
    k: Tensor,
    v: Tensor,
    slots: Tensor,
    k_scales: Tensor | None = None,
    v_scales: Tensor | None = None,
) -> None:
    for pages, x, scales in ((k_pages, k, k_scales), (v_pages, v, v_scales)):
        for token, slot in enumerate(slots.tolist()):
            at = slot // pages.shape[1], slot % pages.shape[1]
            if slot >= 0 and scales is None:
                pages[at] = x[token]
            elif slot >= 0 and scales is not None:
                pages[at], scales[at] = quantize_rows(x[token], pages.dtype)


def _checks(inputs: Inputs) -> list[tuple[Any, Inputs]]:
    *tensors, slopes, sinks = inputs
    _, k_pages, v_pages = tensors[:3]
    tokens = [pages[0].clone() for pages in (k_pages, v_pages)]
    slots = torch.arange(k_pages.shape[1], device=slopes.device) + 5
    return [
        (_paged_attention, (*tensors, 0.2, 3, slopes, sinks, 2, False, False, None, None)),
        (_write_pages, (k_pages.clone(), v_pages.clone(), *tokens, slots, None, None)),
    ]


def _case(name: str, call: Any, shapes: list[Shape], **changes: Any) -> Case:
    function = call.func if isinstance(call, partial) else call
    op, reference = OPS.get(function, (paged_attention, paged_attention_reference))
    return Case(
        name=name,
        op=partial(call, op),
        reference=partial(call, reference),
        inputs=_inputs,
        shapes=shapes,
        differentiable=(),
        extreme_arguments=(0, 1, 2),
        batch_dim=None,
        **changes,
    )


OPS: dict[Any, tuple[Any, Any]] = {
    function: both
    for functions, both in (
        ((_write, _write_codes), (write_pages, _plain_write)),
        ((_rotate, _rotate_codes), (rotate_and_write, _plain_rotate)),
    )
    for function in functions
}
# Of larger scores the reference's log-sum-exp rounds the number of keys away.
MODERATE = (0.0, 1.0, -1.0)
FP8, INT8 = torch.float8_e4m3fn, torch.int8
TUNED = "kernels.paged_attention.kernel:ATTEND"
CASES = [
    _case("paged_attention", _call, [SHAPE, (5, 1, 7, 33, 16)], checks=_checks, tuned=TUNED, extremes=MODERATE),
    _case("paged_attention_masked", partial(_call, slopes=True, sinks=True, window=6), [SHAPE], extremes=MODERATE),
    _case("paged_attention_split", partial(_call, splits=4, sinks=True, window=20), [SHAPE], extremes=MODERATE),
    _case("paged_attention_decode", partial(_decode, slopes=True), [SHAPE], extremes=MODERATE),
    _case(
        "paged_attention_decode_split",
        partial(_decode, splits=8, sinks=True),
        [SHAPE, (5, 1, 7, 33, 16)],
        extremes=MODERATE,
    ),
    _case("paged_attention_latent", _latent, [(17, 1, 18, 15, 4)], extremes=MODERATE),
    _case("write_pages", _write, [SHAPE]),
    _case("rotate_and_write", _rotate, [(6, 2, 20, 20, 3), (5, 1, 8, 8, 16)]),
    _case("paged_attention_int8", partial(_quantized, codes=INT8, sinks=True, window=20), [SHAPE], extremes=MODERATE),
    _case("paged_attention_fp8", partial(_quantized, codes=FP8, splits=4), [SHAPE], extremes=MODERATE),
    _case("paged_attention_decode_fp8", partial(_quantized, codes=FP8, call=_decode), [SHAPE], extremes=MODERATE),
    _case("write_pages_int8", partial(_write_codes, codes=INT8), [SHAPE, (5, 1, 7, 33, 16)]),
    _case("write_pages_fp8", partial(_write_codes, codes=FP8), [SHAPE]),
    _case("rotate_and_write_int8", partial(_rotate_codes, codes=INT8), [(6, 2, 20, 20, 3)]),
    _case("rotate_and_write_fp8", partial(_rotate_codes, codes=FP8), [(6, 2, 20, 20, 3)]),
    _case("normalise_and_write", partial(_rotate, norms=True), [(6, 2, 20, 20, 3)]),
]
