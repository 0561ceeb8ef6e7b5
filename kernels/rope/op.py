"""Rotary position embedding as ops that compiled graphs keep whole."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kernels.backend import refuse_dtensors, runs_triton
from kernels.rope.reference import rope_qkv_reference, rope_reference


def rope(q: Tensor, k: Tensor | None, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor | None]:
    """q [B, T, H, K] and k [B, T, Hkv, K] (or None), turned by their positions (RoPE, 2104.09864), contiguous.

    Dimensions i and i + K/2 of a head are a pair, as models/layers/rope.py has it; cos and sin [B or 1, T, 1, K/2] are
    its tables, fp32. Computed in fp32 and rounded once. q and k may be slices of one projection's output: only the
    numbers of a head must lie side by side, or they are copied. The same bits in every run, for each token alike.
    Backward turns back and keeps nothing but the tables, which get no gradient. Raises TypeError for DTensors and for
    tables that are not fp32, ValueError for shapes.
    """
    check(q, k, cos, sin)
    q, turned = _rope(q, k, cos, sin, False)
    return q, None if k is None else turned


@torch.no_grad()
def rope_(q: Tensor, k: Tensor | None, cos: Tensor, sin: Tensor) -> None:
    """`rope` in place, without a gradient: for serving, or for tensors that autograd does not see.

    Errors as in `rope`; RuntimeError for tensors that need a gradient, ValueError where the numbers of a head do not
    lie side by side.
    """
    check(q, k, cos, sin)
    for name, x in (("q", q), ("k", k)):
        if x is not None and x.requires_grad:
            raise RuntimeError(f"{name} needs a gradient, which a rotation in place does not give; use rope")
        if x is not None and x.stride(-1) != 1:
            raise ValueError(f"{name} has strides {list(x.stride())}; in place the last must be 1")
    _rope_in_place(q, k, cos, sin)


def rope_qkv(
    qkv: Tensor, cos: Tensor, sin: Tensor, *, num_heads: int, num_kv_heads: int
) -> tuple[Tensor, Tensor, Tensor]:
    """q [B, T, H, K], k and v [B, T, Hkv, K] of one projection's output [B, T, H + 2 Hkv, K], q and k turned.

    For training: the gradients of the three are written into one tensor, where slices would each be padded to the
    whole and added up. v is copied for it. Otherwise as `rope`.
    """
    heads = num_heads + 2 * num_kv_heads
    check(qkv, None, cos, sin)
    if num_heads < 1 or num_kv_heads < 1 or qkv.shape[2] != heads:
        raise ValueError(
            f"qkv has shape {list(qkv.shape)}; its dim 2 must be H + 2 Hkv = {num_heads} + 2*{num_kv_heads}"
        )
    return _rope_qkv(qkv, cos, sin, num_heads, num_kv_heads)


def check(q: Tensor, k: Tensor | None, cos: Tensor, sin: Tensor) -> None:
    refuse_dtensors(q=q, k=k, cos=cos, sin=sin)
    if cos.dtype != torch.float32 or sin.dtype != torch.float32:
        raise TypeError(
            f"tables have dtypes {cos.dtype} and {sin.dtype}; use fp32: bf16 cannot tell far positions apart"
        )
    if q.ndim != 4 or q.shape[3] % 2 or not q.shape[3]:
        raise ValueError(f"q has shape {list(q.shape)}; use [B, T, H, K] with an even K")
    B, T, _, K = q.shape
    if k is not None and (k.ndim != 4 or (k.shape[:2], k.shape[3]) != ((B, T), K)):
        raise ValueError(f"k has shape {list(k.shape)}; beside q {list(q.shape)} use [{B}, {T}, Hkv, {K}]")
    for name, table in (("cos", cos), ("sin", sin)):
        if table.shape not in ((1, T, 1, K // 2), (B, T, 1, K // 2)) or table.shape != cos.shape:
            raise ValueError(
                f"{name} has shape {list(table.shape)}; for q {list(q.shape)} use [{B} or 1, {T}, 1, {K // 2}]"
            )


@torch.library.custom_op("lattice::rope", mutates_args=())
def _rope(q: Tensor, k: Tensor | None, cos: Tensor, sin: Tensor, inverse: bool) -> tuple[Tensor, Tensor]:
    """Turned q and k; the latter empty for None."""
    if not runs_triton(q):
        turned = rope_reference(q, k, cos, sin, inverse=inverse)
        return turned[0].contiguous(), q.new_empty(0) if turned[1] is None else turned[1].contiguous()
    from kernels.rope.kernel import like, turn

    pairs = [(x, like(x)) for x in (q, k) if x is not None]
    turn(pairs, cos, sin, inverse=inverse)
    return pairs[0][1], q.new_empty(0) if k is None else pairs[1][1]


@_rope.register_fake
def _(q: Tensor, k: Tensor | None, cos: Tensor, sin: Tensor, inverse: bool) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape), q.new_empty(0) if k is None else k.new_empty(k.shape)


@torch.library.custom_op("lattice::rope_in_place", mutates_args=("q", "k"))
def _rope_in_place(q: Tensor, k: Tensor | None, cos: Tensor, sin: Tensor) -> None:
    if not runs_triton(q):
        for x, turned in zip((q, k), rope_reference(q, k, cos, sin), strict=True):
            if x is not None and turned is not None:
                x.copy_(turned)
        return
    from kernels.rope.kernel import turn

    pairs = [(x, x) for x in (q, k) if x is not None]
    turn(pairs, cos, sin)


@torch.library.custom_op("lattice::rope_qkv", mutates_args=())
def _rope_qkv(
    qkv: Tensor, cos: Tensor, sin: Tensor, num_heads: int, num_kv_heads: int
) -> tuple[Tensor, Tensor, Tensor]:
    if not runs_triton(qkv):
        q, k, v = rope_qkv_reference(qkv, cos, sin, num_heads, num_kv_heads)
        return q.contiguous(), k.contiguous(), v.contiguous()
    from kernels.rope.kernel import like, turn

    parts = qkv.split((num_heads, num_kv_heads, num_kv_heads), dim=2)
    q, k, v = (like(x) for x in parts)
    pairs = list(zip(parts, (q, k, v), strict=True))
    turn(pairs, cos, sin)
    return q, k, v


@_rope_qkv.register_fake
def _(qkv: Tensor, cos: Tensor, sin: Tensor, num_heads: int, num_kv_heads: int) -> tuple[Tensor, Tensor, Tensor]:
    B, T, _, K = qkv.shape
    q, k, v = (qkv.new_empty(B, T, heads, K) for heads in (num_heads, num_kv_heads, num_kv_heads))
    return q, k, v


@torch.library.custom_op("lattice::rope_qkv_backward", mutates_args=())
def _rope_qkv_backward(d_q: Tensor, d_k: Tensor, d_v: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    if not runs_triton(d_q):
        turned_q, turned_k = rope_reference(d_q, d_k, cos, sin, inverse=True)
        assert turned_k is not None
        return torch.cat((turned_q, turned_k, d_v), dim=2).contiguous()
    from kernels.rope.kernel import turn

    B, T, H, K = d_q.shape
    d_qkv = d_q.new_empty(B, T, H + 2 * d_k.shape[2], K)
    parts = d_qkv.split((H, d_k.shape[2], d_v.shape[2]), dim=2)
    turn(list(zip((d_q, d_k, d_v), parts, strict=True)), cos, sin, inverse=True)
    return d_qkv


@_rope_qkv_backward.register_fake
def _(d_q: Tensor, d_k: Tensor, d_v: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    B, T, H, K = d_q.shape
    return d_q.new_empty(B, T, H + 2 * d_k.shape[2], K)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    _, k, cos, sin, ctx.inverse = inputs
    ctx.has_k = k is not None
    ctx.save_for_backward(cos, sin)


def _gradients(ctx: Any, d_q: Tensor, d_k: Tensor) -> tuple[Tensor | None, ...]:
    d_q, d_k = _rope(d_q, d_k if ctx.has_k else None, *ctx.saved_tensors, not ctx.inverse)
    return d_q, d_k if ctx.has_k else None, None, None, None


def _save_qkv(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(inputs[1], inputs[2])


def _gradient_qkv(ctx: Any, d_q: Tensor, d_k: Tensor, d_v: Tensor) -> tuple[Tensor | None, ...]:
    return _rope_qkv_backward(d_q, d_k, d_v, *ctx.saved_tensors), None, None, None, None


_rope.register_autograd(_gradients, setup_context=_save)
_rope_qkv.register_autograd(_gradient_qkv, setup_context=_save_qkv)
