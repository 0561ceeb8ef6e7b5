"""Norms and SwiGLU that write what products in fp8 read, applied to a model from outside, after models/fp8.py.

A layer that quantizes its input reads what the step before it has just written. Here that step writes fp8 itself:

    RMSNorm   (of stream + branch) for q, k and v, or for gate and up; the stream is its other result
    SwiGLU    for down; and in backward, from the gradient of its output, the gradient of gate and up

Both make the very bytes that quantizing their results does (quantized.py of kernels/rms_norm and of kernels/swiglu), so
nothing else changes. It takes scales that are known before: rowwise, for norms, and tensorwise_delayed, from
its second step on (the first finds its scales in the tensors, and runs as without this).

Autograd sees tensors of activations' dtype only, because it would cast the gradient of a tensor in fp8 to fp8: a
`stand-in`, of the right shape but without memory, goes from the producer to the layer and brings the gradient back.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from kernels.fp8 import GRADIENT, INPUT, Quantized, fp8_matmul
from kernels.rms_norm import rms_norm_backward, rms_norm_fp8
from kernels.rms_norm.op import MAX_WIDTH
from kernels.swiglu import swiglu_backward_quantized, swiglu_quantized
from models.decoder import Block
from models.fp8 import Fp8Linears, Prepared, local_parameters
from models.fp8_gradients import Plan, arrived, start_gradients
from models.layers.attention import Attention
from models.layers.mlp import MLP
from models.layers.norm import ReplicatedNorm
from parallel.tensor import ColumnParallelLinear, local_shard

SWIGLU_RECIPES = ("tensorwise_delayed",)
NORM_RECIPES = ("tensorwise_delayed", "rowwise")


def apply_producers(blocks: nn.Module, linears: Fp8Linears, *, activation: str) -> str:
    """Make norms and SwiGLUs of blocks, whose layers are in fp8 already (`apply_fp8`), quantize what they make where
    that is possible. In place; says how many do, and of the others why they do not, for run.json."""
    norms, activations, others = 0, 0, Counter[str]()
    for block in blocks.modules():
        if not isinstance(block, Block):
            continue
        branches: list[tuple[Any, list[Any]]] = [
            (block.attention_norm, _attention_layers(block)),
            (block.mlp_norm, _mlp_layers(block)),
        ]
        for norm, layers in branches:
            norm.fp8_layers = ()
            if obstacle := _norm_obstacle(norm, layers, linears, norm_first=block.norm_first):
                others[f"norm: {obstacle}"] += 1
                continue
            norm.fp8_layers, norms = tuple(layers), norms + 1
        block.begin_branch = MethodType(_begin_branch, block)  # type: ignore[method-assign]
        if obstacle := _activation_obstacle(block.mlp, linears, activation):
            others[f"activation: {obstacle}"] += 1
            continue
        mlp: Any = block.mlp
        mlp.forward, activations = MethodType(_mlp, mlp), activations + 1
    made = f"written by {norms} norms and {activations} activations"
    return "; ".join([made, *(f"not by {count} ({why})" for why, count in sorted(others.items()))])


def writes_fp8(mlp: MLP) -> bool:
    """Whether its SwiGLU quantizes what it makes (`apply_producers`)."""
    return "forward" in vars(mlp)


def _attention_layers(block: Block) -> list[Any]:
    attention = block.attention
    if not isinstance(attention, Attention):
        return []
    return [attention.qkv] if attention.fused else [attention.q, attention.k, attention.v]


def _mlp_layers(block: Block) -> list[Any]:
    return block.mlp._first_layers() if isinstance(block.mlp, MLP) else []


def _norm_obstacle(norm: Any, layers: Sequence[Any], linears: Fp8Linears, *, norm_first: bool) -> str | None:
    """Why it cannot write for these layers, the first of a branch; None: it can."""
    if linears.recipe.kind not in NORM_RECIPES:
        return f"{linears.recipe.kind} finds scales in what is written"
    if not norm_first:
        return "model.norm_first=false"
    if not layers:
        return "latent attention or experts"
    if not all(layer.in_fp8 for layer in layers):
        return "a layer behind it is not in fp8"
    if not (isinstance(norm, nn.RMSNorm) or (isinstance(norm, ReplicatedNorm) and norm.bias is None)):
        return "not RMSNorm"
    if norm.weight.shape[0] > MAX_WIDTH:
        return f"wider than {MAX_WIDTH}"
    if isinstance(layers[0], ColumnParallelLinear) and layers[0].sequence_parallel:
        return "parallel.sequence_parallel=true gathers what it makes"
    return None


def _activation_obstacle(mlp: Any, linears: Fp8Linears, activation: str) -> str | None:
    if linears.recipe.kind not in SWIGLU_RECIPES:
        return f"{linears.recipe.kind} finds scales in what is written"
    if not isinstance(mlp, MLP):
        return "experts"
    if not mlp.gated or activation != "silu":
        return "not SwiGLU"
    if not mlp.fused:
        return "model.fused_projections=false"
    gate_up: Any = mlp.gate_up
    down: Any = mlp.down
    if not (gate_up.in_fp8 and down.in_fp8):
        return "a layer beside it is not in fp8"
    if gate_up.bias is not None:
        return "model.mlp_bias=true sums its gradient unquantized"
    return None


# ---- what is put in the place of methods


def _begin_branch(block: Any, norm: Any, x: Tensor, branch: Tensor | None = None) -> tuple[Any, Tensor]:
    """`Block.begin_branch`: norm(x + branch), for fp8 layers quantized, and x + branch."""
    layers = norm.fp8_layers
    if not layers or not layers[0].fp8.knows_scales:
        return Block.begin_branch(block, norm, x, branch)
    linears: Fp8Linears = layers[0].fp8
    weight, eps = norm.weight, norm.eps
    if isinstance(norm, ReplicatedNorm):
        weight = local_shard(weight, grad=norm.grad)
    scale = None if linears.scaling is None else layers[0].fp8_scaling.scale[INPUT]
    made = rms_norm_fp8(
        x.detach(),
        weight.detach(),
        eps,
        scale=scale,
        residual=None if branch is None else branch.detach(),
        transpose=torch.is_grad_enabled(),
    )
    stand_in, stream = _Norm.apply(x, branch, weight, None if branch is None else made.stream, made.rstd, eps)
    width = x.shape[-1]
    by_row = made.amax is None
    quantized = Quantized(
        made.y.view(-1, width),
        made.scale.view(-1, 1) if by_row else made.scale,
        made.transposed,
        made.transposed_scale,
    )
    return Prepared(stand_in, quantized, made.amax), stream


def _mlp(mlp: Any, x: Tensor | Prepared) -> Tensor:
    """`MLP.forward`."""
    linears: Fp8Linears = mlp.down.fp8
    if not linears.knows_scales:
        assert isinstance(x, Tensor)
        return MLP.forward(mlp, x)
    return mlp.down(_gated(linears, x, mlp.gate_up, mlp.down))


def _gated(linears: Fp8Linears, x: Tensor | Prepared, gate_up: Any, down: Any) -> Prepared:
    """SwiGLU of gate and up of x [..., K], for `down`."""
    plan = linears.plan_of([gate_up])
    weight = gate_up.weight
    if isinstance(gate_up, ColumnParallelLinear):
        ((weight,), _) = local_parameters([gate_up])
    made = linears.operands(x, [gate_up], [weight], plan)
    (weight_q,) = made.weights
    y = fp8_matmul(
        made.x.data,
        made.x.scale,
        weight_q.data,
        weight_q.scale,
        out_dtype=made.source.dtype,
        fast_accumulation=plan.recipe.fast_accumulation[0],
    )
    quantized, amax = swiglu_quantized(y, down.fp8_scaling.scale[INPUT], transpose=torch.is_grad_enabled())
    bytes_of_weight = weight_q.data if made.gathered[0] else None
    stand_in = _Gated.apply(
        made.source, plan, y, made.x.transposed, made.x.scale, weight, bytes_of_weight, made.carriers[0],
        weight_q.scale, gate_up.fp8_scaling.scale[GRADIENT],
    )  # fmt: skip
    return Prepared(stand_in.view(*made.shape[:-1], stand_in.shape[-1]), quantized, amax)


# ---- gradients


def _without_memory(like: Tensor, *shape: int) -> Tensor:
    return like.new_empty(()).expand(*shape)


class _Norm(torch.autograd.Function):
    """The stand-in of a norm that is computed already, and the stream: x + branch, or x."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, branch: Tensor | None, weight: Tensor, stream: Tensor | None, rstd: Tensor, eps: float
    ) -> tuple[Tensor, Tensor]:
        kept = x if stream is None else stream
        ctx.save_for_backward(kept, weight, rstd)
        ctx.eps, ctx.added = eps, stream is not None
        return _without_memory(x, *x.shape), kept.view_as(kept)

    @staticmethod
    def backward(ctx: Any, d_y: Tensor, d_stream: Tensor) -> tuple[Any, ...]:
        stream, weight, rstd = ctx.saved_tensors
        d_x, d_weight = rms_norm_backward(d_y, stream, weight, rstd, ctx.eps, d_stream=d_stream)
        return d_x, d_x if ctx.added else None, d_weight, None, None, None


class _Gated(torch.autograd.Function):
    """The stand-in of SwiGLU of y = x W^T, both computed already. x stands for what its gradient belongs to."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        plan: Plan,
        y: Tensor,
        x_transposed: Tensor | None,
        x_scale: Tensor,
        weight: Tensor,
        bytes_of_weight: Tensor | None,
        carrier: Tensor | None,
        weight_scale: Tensor,
        gradient_scale: Tensor,
    ) -> Tensor:
        ctx.weight_dtype = weight.dtype
        weight = weight if bytes_of_weight is None else bytes_of_weight
        ctx.plan, ctx.shape, ctx.dtype, ctx.recorded = plan, x.shape, x.dtype, carrier is not None
        ctx.save_for_backward(y, x_transposed, x_scale, weight, weight_scale, gradient_scale)
        return _without_memory(y, y.shape[0], y.shape[1] // 2)

    @staticmethod
    def backward(ctx: Any, d_h: Tensor) -> tuple[Any, ...]:
        y, x_t, x_scale, weight, weight_scale, scale = ctx.saved_tensors
        plan: Plan = ctx.plan
        d_y, amax = swiglu_backward_quantized(d_h, y, scale, dtype=plan.recipe.gradient)
        d_x, (d_weight,) = start_gradients(
            plan, ctx.shape, (ctx.dtype, ctx.weight_dtype), [d_y], [weight], [weight_scale], x_t, x_scale
        )
        recorded = amax if ctx.recorded else None
        return arrived(d_x, plan), None, None, None, None, d_weight, None, recorded, None, None
