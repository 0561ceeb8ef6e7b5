"""Blocks in serving, in fewer launches: the same layers and weights, what lies between products in one kernel each.

The sum of a branch with the residual stream waits for the norm that follows, so the stream travels as two summands. For
a few tokens norm, product, activation and sum are one launch.

Over tp every rank has the whole stream and makes a summand of each branch of its own heads and inner features, as in
training (parallel/tensor.py): one all-reduce a branch, and the residual stream is added behind it.

N tokens of a step, R of them wanted, D hidden_size, H query heads, G key/value heads, K head_dim; H and
G are those of this rank.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kernels import skinny_linear as skinny
from kernels.rms_norm import add_rms_norm, rms_norm
from kernels.skinny_linear import add_skinny_linear, skinny_linear
from kernels.swiglu import swiglu_fused
from models.config import ModelConfig
from models.layers.attention import Context
from models.layers.mlp import MLP
from models.layers.moe import MoE
from models.layers.paged_cache import PagedCache
from parallel.collectives import all_reduce
from parallel.groups import ModelParallel
from parallel.tensor import ColumnParallelLinear, RowParallelLinear, local_shard, project

PLAIN = (nn.Linear, ColumnParallelLinear, RowParallelLinear)


def obstacle(config: ModelConfig, groups: ModelParallel) -> str | None:
    """Why the blocks of a model are served as they are trained, in one line; None: they are served by this file."""
    if config.mla.kv_rank:
        return "latent attention has no fused launches"
    if config.norm != "rmsnorm" or not config.norm_first or not config.final_norm:
        return "only RMSNorm before a branch is fused with the sum before it"
    if not config.fused_projections:
        return "model.fused_projections=false"
    if groups.sequence_parallel:
        return "ranks of tp have slices of the stream (sequence_parallel)"
    return None


def serve(blocks: Iterable[Any], final_norm: Any, x: Tensor, context: Context) -> Tensor:
    """x [1, N, D] through blocks and final norm; [1, R, D] where the context's cache says which are wanted.

    The context has a cache, and `obstacle` said None.
    """
    cache = context.cache
    assert cache is not None
    x, branch = x[0], None
    remaining = list(blocks)
    while remaining:
        block = remaining.pop(0)
        qkv, x = _qkv(block, x, branch)
        q, k, v = cache.rotate_and_keep(block.attention.layer, qkv, **_rotation(block.attention, context))
        if not remaining and cache.wanted is not None:
            tokens, _ = cache.wanted
            x, q = x[tokens], q[tokens]
            if not tokens.numel():  # all keys are kept, and there is nothing to sum over tp
                return x[None]
            cache = cache.of_wanted()
        x, branch = _rest(block, q, k, v, x, cache, context)
    return _norm(final_norm, x, branch)[0][None]


def _norm(norm: Any, x: Tensor, branch: Tensor | None) -> tuple[Tensor, Tensor]:
    """The norm of x + branch, and that sum, the stream from here on."""
    weight = _replicated(norm.weight)
    return (rms_norm(x, weight, norm.eps), x) if branch is None else add_rms_norm(branch, x, weight, norm.eps)


def _qkv(block: Any, x: Tensor, branch: Tensor | None) -> tuple[Tensor, Tensor]:
    """What q, k and v are made of, [N, H + 2G, K], and x + branch, the stream."""
    layer: Any = block.attention
    if layer.fused:
        qkv, x = _normed_product(layer.qkv, block.attention_norm, x, branch)
    else:  # ranks of tp that share key/value heads
        h, x = _norm(block.attention_norm, x, branch)
        qkv = torch.cat(project(h, (layer.q, layer.k, layer.v)), dim=-1)
    return qkv.unflatten(-1, (-1, layer.head_dim)), x


def _rotation(layer: Any, context: Context) -> dict[str, Any]:
    found: dict[str, Any] = {"cos": context.cos, "sin": context.sin}
    if layer.q_norm is not None and layer.k_norm is not None:
        weights = {"q_weight": _replicated(layer.q_norm.weight), "k_weight": _replicated(layer.k_norm.weight)}
        found |= weights | {"eps": layer.q_norm.eps}
    return found


def _rest(
    block: Any, q: Tensor, k: Tensor, v: Tensor, x: Tensor, cache: PagedCache, context: Context
) -> tuple[Tensor, Tensor | None]:
    """The stream behind a block, as two summands, from its queries and the stream before it on."""
    layer: Any = block.attention
    sinks = None if layer.sinks is None else _cut(layer.sinks)
    how = {"scale": layer.head_dim**-0.5, "window": layer.window, "slopes": context.slopes, "sinks": sinks}
    y = cache.attend_kept(layer.layer, q, k, v, **how).flatten(1)
    x, branch = _end_of_branch(layer.o, y, x)
    mlp: MLP | MoE = block.mlp
    if isinstance(mlp, MLP) and mlp.fused and mlp.activation is F.silu:
        gated, x = _swiglu(mlp.gate_up, block.mlp_norm, x, branch)
        return _end_of_branch(mlp.down, gated, x)
    h, x = _norm(block.mlp_norm, x, branch)
    if isinstance(mlp, MoE):
        return x, mlp(h[None], samples=context.samples, indices=context.indices, aux_scale=None)[0][0]
    return x, mlp(h)


def _swiglu(layer: Any, norm: Any, x: Tensor, branch: Tensor | None) -> tuple[Tensor, Tensor]:
    """silu(gate) * up of the norm of x + branch, and that sum."""
    if _few(layer, x):
        return _normed_product(layer, norm, x, branch, gated=True)
    gate_up, x = _normed_product(layer, norm, x, branch)
    return swiglu_fused(gate_up), x


def _normed_product(
    layer: Any, norm: Any, x: Tensor, branch: Tensor | None, *, gated: bool = False
) -> tuple[Tensor, Tensor]:
    """What a layer makes of the norm of x + branch, [N, O] of this rank, and that sum. gated: of a few rows alone."""
    if _few(layer, x):
        weight = _cut(layer.weight)
        how: dict[str, Any] = {"norm_weight": _replicated(norm.weight), "eps": norm.eps, "gated": gated}
        return (skinny_linear(x, weight, **how), x) if branch is None else add_skinny_linear(branch, x, weight, **how)
    h, x = _norm(norm, x, branch)
    (y,) = project(h, (layer,))
    return y, x


def _end_of_branch(layer: Any, y: Tensor, x: Tensor) -> tuple[Tensor, Tensor | None]:
    """The stream x and what the last layer of a branch makes of y, as two summands or one.

    Of a few rows one, unless the branch is summed over tp. If the product of one rank added the stream, every step of
    that sum would round the stream again, in its dtype; the product behind it adds it in no launch more.
    """
    if not _few(layer, y):
        return x, layer(y)
    if isinstance(layer, RowParallelLinear):
        return x, all_reduce(skinny_linear(y, _cut(layer.weight)), layer.axis)
    return skinny_linear(y, layer.weight, residual=x), None


def _few(layer: Any, x: Tensor) -> bool:
    """Whether a layer is for kernels/skinny_linear: a plain product, not one in fp8 or the like."""
    return type(layer) in PLAIN and layer.bias is None and skinny.obstacle(x.shape[0], _cut(layer.weight)) is None


# What this rank has of parameters. No gradient is wanted: of what local_shard is told, the placement alone counts.


def _cut(parameter: Tensor) -> Tensor:
    return local_shard(parameter, grad="sharded")


def _replicated(parameter: Tensor) -> Tensor:
    return local_shard(parameter, grad="replicated")
