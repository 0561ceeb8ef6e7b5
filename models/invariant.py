"""A model whose every token depends on itself and the tokens it sees alone, to the bit: in training and in serving.

Ordinarily a token's last bits depend on what is computed beside it. A matrix product is cut into tiles, and its sums
split, by the number of its rows; a kernel of attention is chosen by the number of queries; on the CPU the last elements
of an array take other instructions. In half precision that is enough for another token to be the most probable one,
and for a trainer and an engine to disagree about probabilities. Applied from outside, as fp8 is: the functions by which
layers compute are replaced by ones that

    multiply      one tile and one order of the sum, whatever the number of rows   kernels/invariant_linear,
                                                                                   kernels/grouped_linear (experts)
    normalise     a row is one program's                                           kernels/rms_norm, layer_norm
    attend        one block of queries and keys, over pages, without a split       kernels/paged_attention
    lose          a row of logits is one program's                                 kernels/cross_entropy

and on the CPU by those same operations on one row at a time (kernels/rows.py). What acts elementwise is left as it is
on a GPU. A forward pass without a cache attends through pages as well (models/layers/as_served.py), so it has the bits
of one with a cache, however that one was cut into chunks, batched, cached, paged or preempted.

Gradients are those of ordinary products and ordinary attention: they are sums over tokens, and not what is compared.
"""

from __future__ import annotations

from functools import partial
from types import MethodType

import torch.nn.functional as F
from torch import Tensor, nn

from kernels.invariant_linear import invariant_linear
from kernels.layer_norm import layer_norm
from kernels.rms_norm import rms_norm
from kernels.rows import each_row, each_row_off_gpu, has_kernel
from models.decoder import Decoder
from models.layers.embedding import LMHead
from models.layers.mla import LatentAttention
from models.layers.mlp import MLP
from models.layers.moe import Experts, GroupedLinear
from models.layers.router import Router
from models.lora import reads_weights


def make_batch_invariant(model: Decoder) -> None:
    """Make a model that was just built so, in place. Before compilation and data parallelism.

    Raises ValueError for one that cannot be, with the reason.
    """
    if model.batch_invariant:
        return
    if problem := _obstacle(model):
        raise ValueError(problem)
    for module in model.modules():
        if hasattr(module, "adaptation") and not isinstance(module, GroupedLinear):
            module.product = invariant_linear  # type: ignore[assignment]
        elif type(module) is nn.Linear:
            module.forward = MethodType(_linear, module)  # type: ignore[method-assign]
        elif isinstance(module, nn.RMSNorm):
            module.forward = MethodType(_rms_norm, module)  # type: ignore[method-assign]
        elif isinstance(module, nn.LayerNorm):
            module.forward = MethodType(_layer_norm, module)  # type: ignore[method-assign]
        elif isinstance(module, MLP | Experts):
            module.activation = partial(each_row_off_gpu, module.activation)
        elif isinstance(module, LMHead):
            module.product = invariant_linear
        elif isinstance(module, Router):
            module.product, module.score = invariant_linear, partial(each_row_off_gpu, module.score)
        elif isinstance(module, GroupedLinear):
            module.implementation = "invariant"
        elif isinstance(module, LatentAttention):
            module.batch_invariant = True
    model.batch_invariant = True


def _obstacle(model: Decoder) -> str | None:
    """Why a model cannot be made batch-invariant; None: it can."""
    groups = model.groups
    if groups.tp is not None:
        return (
            f"a batch-invariant model cannot be cut over tp={groups.tp.size()} ranks: their partial sums are added up "
            "in an order that depends on the size of the batch; use parallel.tp=1"
        )
    if groups.cp_size > 1:
        return "a batch-invariant model cannot be cut over cp ranks, whose keys arrive in pieces; use parallel.cp=1"
    if problem := reads_weights(model):
        return problem
    for name, module in model.named_modules():
        if getattr(module, "in_fp8", False):
            return f"{name} multiplies in fp8, whose scales are those of a whole batch; use precision.compute=bf16"
        if getattr(module, "weight_gradients", None) is not None:
            return f"{name} puts its weight gradients off (split backward), for which there is no batch-invariant layer"
    return None


# Methods of the layers, which blocks of one kind can share (models/fp8.py).


def _linear(layer: nn.Linear, x: Tensor) -> Tensor:
    return invariant_linear(x, layer.weight, layer.bias)


def _rms_norm(layer: nn.RMSNorm, x: Tensor) -> Tensor:
    weight, eps = layer.weight, layer.eps
    assert eps is not None
    if has_kernel(x):
        return rms_norm(x, weight, eps)
    return each_row(lambda row: F.rms_norm(row, row.shape[-1:], weight, eps), x)


def _layer_norm(layer: nn.LayerNorm, x: Tensor) -> Tensor:
    weight, bias, eps = layer.weight, layer.bias, layer.eps
    if has_kernel(x):
        return layer_norm(x, weight, bias, eps)
    return each_row(lambda row: F.layer_norm(row, row.shape[-1:], weight, bias, eps), x)
