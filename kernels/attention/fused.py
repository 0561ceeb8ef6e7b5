"""Attention by the project's own Triton kernels, as an op that compiled graphs keep whole.

For what torch's fused kernels do not have: documents, windows and sinks without a mask in memory, and the log-sum-exp
with its gradient, by which the parts of a sequence are put together. CPU tensors run the reference.

B batch, T queries, S keys, H query heads, G key/value heads (H is a multiple of G), K features of a head's query and
key, V of its value.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from kernels import backend
from kernels.attention.mask import Mask, Ranges, run_mask
from kernels.attention.reference import masked_attention
from kernels.backend import reference_gradients, refuse_dtensors, runs_triton

MAX_HEAD_DIM = 256
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def obstacle(device: torch.device, dtype: torch.dtype, head_dim: int, value_dim: int) -> str | None:
    """Why the kernels cannot run; None: they can."""
    if device.type != "cuda" and not backend.interpreting():
        return f"does not run on {device.type}: the kernels are for CUDA"
    if dtype not in DTYPES:
        return f"has no kernel for {dtype}"
    if max(head_dim, value_dim) > MAX_HEAD_DIM:
        return f"has no kernel for heads of {max(head_dim, value_dim)} features, more than {MAX_HEAD_DIM}"
    return None


def build_mask(
    seq_len: int, device: torch.device, *, window: int | None = None, documents: Tensor | None = None
) -> Mask:
    """The mask of causal self-attention, to be built once per forward pass. documents: [B, T], ascending in a row."""
    return run_mask(seq_len, seq_len, device, window=window, query_documents=documents, key_documents=documents)


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Mask,
    *,
    scale: float | None = None,
    slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    wide: bool = False,
) -> tuple[Tensor, Tensor]:
    """Attention of q [B, T, H, K] over k [B, S, G, K], v [B, S, G, V] under a mask of kernels.attention.mask.

    Returns the output [B, T, H, V] in q's dtype (fp32 if wide), contiguous, and the log-sum-exp [B, H, T] of each
    query's scores, fp32 (fp64 for fp64, which only the CPU takes); both have gradients. A query that sees no key gets 0
    and -inf. scale: of the scores, positive, K^-1/2 unless given. slopes [H]: ALiBi (2108.12409), without gradient.
    sinks [H] (2508.10925): logits that take part in the softmax, and in the log-sum-exp, and have no value.

    Products are made in q's dtype and added up in fp32; k and v of another dtype are cast, and get their gradient in
    their own. Two runs give the same bits, forward and backward. Raises TypeError for DTensors and dtypes that are not
    floating, ValueError for sizes that do not fit each other or the kernels, and for slopes with pieces of a sequence.
    """
    refuse_dtensors(q=q, k=k, v=v, slopes=slopes, sinks=sinks)
    _check(q, k, v, mask, slopes, sinks)
    scale = q.shape[3] ** -0.5 if scale is None else scale
    if not 0.0 < scale < math.inf:
        raise ValueError(f"scale={scale} must be a positive number")
    ranges = (None,) * 4 if mask.ranges is None else tuple(mask.ranges)
    numbers = (mask.causal, mask.window, mask.offset or 0, scale, wide)
    output, lse = _attention(q, k, v, slopes, sinks, *ranges, *numbers)
    return output, lse


def _check(q: Tensor, k: Tensor, v: Tensor, mask: Mask, slopes: Tensor | None, sinks: Tensor | None) -> None:
    for name, x in {"q": q, "k": k, "v": v}.items():
        if not x.is_floating_point():
            raise TypeError(f"{name} has dtype {x.dtype}; attention takes floating point")
        if x.ndim != 4:
            raise ValueError(f"{name} has shape {list(x.shape)}; it must be [batch, tokens, heads, features]")
    B, T, H, K = q.shape
    S, G = k.shape[1:3]
    if tuple(k.shape) != (B, S, G, K) or tuple(v.shape[:3]) != (B, S, G):
        raise ValueError(
            f"q {list(q.shape)}, k {list(k.shape)} and v {list(v.shape)} are not [B,T,H,K], [B,S,G,K], [B,S,G,V]"
        )
    if G == 0 or H % G:
        raise ValueError(f"q has {H} heads, which is no multiple of the {G} of k and v")
    for name, per_head in {"slopes": slopes, "sinks": sinks}.items():
        if per_head is not None and tuple(per_head.shape) != (H,):
            raise ValueError(f"{name} has shape {list(per_head.shape)}; there is one for each of the {H} heads of q")
    if slopes is not None and mask.offset is None:
        raise ValueError(
            "slopes need runs of a sequence (run_mask), not pieces, whose distances the mask does not know"
        )
    if runs_triton(q) and (reason := obstacle(q.device, q.dtype, K, v.shape[3])):
        raise ValueError(f"the fused attention {reason}")
    if mask.ranges is not None:
        first_key, _, first_query, _ = mask.ranges
        rows = first_key.shape[0]
        # Not `rows in (1, B)`: dynamo compares members of a tuple by identity, and a B of a dynamic shape equals none.
        if first_key.shape[1] != T or first_query.shape[1] != S or (rows != 1 and rows != B):
            found = f"{first_key.shape[1]} queries and {first_query.shape[1]} keys in {rows} rows"
            raise ValueError(f"the mask is one of {found}; q and k have {T} and {S} in {B}")


def _mask(ranges: tuple[Tensor | None, ...], causal: bool, window: int | None, offset: int) -> Mask:
    first_key, end_key, first_query, end_query = ranges
    if first_key is None or end_key is None or first_query is None or end_query is None:
        return Mask(causal, window, offset)
    return Mask(causal, window, offset, Ranges(first_key, end_key, first_query, end_query))


def _reference(
    q: Tensor, k: Tensor, v: Tensor, slopes: Tensor | None, sinks: Tensor | None, mask: Mask, scale: float, wide: bool
) -> tuple[Tensor, Tensor]:
    T, S = q.shape[1], k.shape[1]
    bias = None
    if slopes is not None:
        distance = torch.arange(T, device=q.device)[:, None] + (mask.offset or 0) - torch.arange(S, device=q.device)
        bias = -slopes[:, None, None] * distance
    q = q.to(_wide(q)) if wide else q
    return masked_attention(q, k, v, mask.dense(T, S, q.device), scale=scale, bias=bias, sinks=sinks)


def _wide(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _rows(x: Tensor, dtype: torch.dtype) -> Tensor:
    """As the kernels read it: features side by side, any other strides."""
    x = x.to(dtype)
    return x if x.stride(-1) == 1 else x.contiguous()


@torch.library.custom_op("lattice::attention", mutates_args=())
def _attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    slopes: Tensor | None,
    sinks: Tensor | None,
    first_key: Tensor | None,
    end_key: Tensor | None,
    first_query: Tensor | None,
    end_query: Tensor | None,
    causal: bool,
    window: int | None,
    offset: int,
    scale: float,
    wide: bool,
) -> tuple[Tensor, Tensor]:
    mask = _mask((first_key, end_key, first_query, end_query), causal, window, offset)
    if not runs_triton(q):
        output, lse = _reference(q, k, v, slopes, sinks, mask, scale, wide)
        return output.contiguous(), lse.contiguous()
    from kernels.attention.kernel import attention_forward

    q_, k_, v_ = (_rows(x, q.dtype) for x in (q, k, v))
    dtype = _wide(q) if wide else q.dtype
    return attention_forward(q_, k_, v_, mask, scale=scale, slopes=slopes, sinks=sinks, dtype=dtype)


@register_flop_formula(torch.ops.lattice.attention)
def _attention_flops(q: torch.Size, k: torch.Size, v: torch.Size, *_: Any, **__: Any) -> int:
    """For torch's FlopCounterMode, whose formulas count all pairs, masked or not; the arguments are shapes."""
    return 2 * q[0] * q[1] * q[2] * k[1] * (q[3] + v[3])


@torch.library.custom_op("lattice::attention_backward", mutates_args=())
def _attention_backward(
    d_output: Tensor,
    d_lse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    slopes: Tensor | None,
    sinks: Tensor | None,
    output: Tensor,
    lse: Tensor,
    first_key: Tensor | None,
    end_key: Tensor | None,
    first_query: Tensor | None,
    end_query: Tensor | None,
    causal: bool,
    window: int | None,
    offset: int,
    scale: float,
    wide: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v and the sinks (an empty tensor without sinks)."""
    mask = _mask((first_key, end_key, first_query, end_query), causal, window, offset)
    if not runs_triton(q):
        inputs, wanted = (q, k, v, slopes, sinks, mask, scale, wide), (0, 1, 2) if sinks is None else (0, 1, 2, 4)
        found = [x.contiguous() for x in reference_gradients(_reference, inputs, (d_output, d_lse), wanted)]
        return found[0], found[1], found[2], found[3] if sinks is not None else lse.new_empty(0)
    from kernels.attention.kernel_backward import attention_backward, attention_delta

    q_, k_, v_, d_output = (_rows(x, q.dtype) for x in (q, k, v, d_output))
    delta = attention_delta(d_output, output, d_lse.contiguous())
    d_q, d_k, d_v = attention_backward(
        d_output, q_, k_, v_, mask, lse=lse, delta=delta, scale=scale, slopes=slopes, dtypes=(q.dtype, k.dtype, v.dtype)
    )
    return d_q, d_k, d_v, lse.new_empty(0) if sinks is None else _sink_gradient(sinks, lse, delta)


def partial_attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Mask, *, slopes: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """`attention`, wide, without gradient and outside of compiled graphs. On a device that runs kernels."""
    from kernels.attention.kernel import attention_forward

    _check(q, k, v, mask, slopes, None)
    q_, k_, v_ = (_rows(x, q.dtype) for x in (q, k, v))
    scale = q.shape[3] ** -0.5
    return attention_forward(q_, k_, v_, mask, scale=scale, slopes=slopes, sinks=None, dtype=_wide(q))


def merge_(output: Tensor, lse: Tensor, block_output: Tensor, block_lse: Tensor) -> None:
    """blockwise.BlockAttention.merge_ of fp32 tensors in one pass. On a device that runs kernels."""
    from kernels.attention.kernel import attention_merge

    attention_merge(output, lse, _rows(block_output, block_output.dtype), block_lse.contiguous())


def delta(d_output: Tensor, output: Tensor) -> Tensor:
    """fp32 [B, H, T]: over V, the sum of d_output [B, T, H, V] times output. On a device that runs kernels."""
    from kernels.attention.kernel_backward import attention_delta

    return attention_delta(_rows(d_output, d_output.dtype), _rows(output, output.dtype), None)


def partial_gradients(
    d_output: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Mask,
    *,
    lse: Tensor,
    delta: Tensor,
    slopes: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """fp32 shares of the gradients of q, k and v by these keys, of which lse and delta [B, H, T] know more.

    blockwise.BlockAttention.backward says what is what. On a device that runs kernels.
    """
    from kernels.attention.kernel_backward import attention_backward

    q_, k_, v_, d_output = (_rows(x, q.dtype) for x in (q, k, v, d_output))
    lse, delta, scale = lse.contiguous(), delta.contiguous(), q.shape[3] ** -0.5
    dtypes = (torch.float32,) * 3
    return attention_backward(
        d_output, q_, k_, v_, mask, lse=lse, delta=delta, scale=scale, slopes=slopes, dtypes=dtypes
    )


def _sink_gradient(sinks: Tensor, lse: Tensor, delta: Tensor) -> Tensor:
    """[H]: d_score = P (dP - delta) of a key whose dP is 0, summed over all queries."""
    probabilities = torch.exp(sinks.float()[:, None] - lse.masked_fill(lse == -math.inf, math.inf))
    return -(probabilities * delta).sum(dim=(0, 2)).to(sinks.dtype)


@_attention.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    B, T, H, _ = q.shape
    wide = rest[-1]
    output = q.new_empty(B, T, H, v.shape[3], dtype=_wide(q) if wide else q.dtype)
    return output, q.new_empty(B, H, T, dtype=_wide(q))


@_attention_backward.register_fake
def _(
    d_output: Tensor, d_lse: Tensor, q: Tensor, k: Tensor, v: Tensor, slopes: Any, sinks: Tensor | None, *rest: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    d_sinks = d_lse.new_empty(0) if sinks is None else sinks.new_empty(sinks.shape)
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape), d_sinks


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs[:5], *output, *inputs[5:9])
    ctx.numbers = inputs[9:]


def _gradients(ctx: Any, d_output: Tensor, d_lse: Tensor) -> tuple[Tensor | None, ...]:
    d_q, d_k, d_v, d_sinks = _attention_backward(d_output, d_lse, *ctx.saved_tensors, *ctx.numbers)
    return d_q, d_k, d_v, None, d_sinks if ctx.needs_input_grad[4] else None, *(None,) * 9


_attention.register_autograd(_gradients, setup_context=_save)
