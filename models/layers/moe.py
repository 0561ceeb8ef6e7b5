"""The mixture of experts in place of a block's feed-forward network.

B batch, T tokens, D hidden_size, E experts, k experts per token, N = B T k choices, F features inside an expert.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from kernels.grouped_linear import grouped_linear
from models.config import ModelConfig
from models.layers.mlp import ACTIVATION_FUNCTIONS, MLP
from models.layers.router import Router


class MoE(nn.Module):
    """sum over the chosen experts of weight * expert(x), plus the shared experts (DeepSeekMoE, 2401.06066).

    No choice is lost unless the router dropped it: choices are sorted by expert and each expert multiplies as many
    rows as it got (MegaBlocks, 2211.15841).
    """

    def __init__(self, config: ModelConfig, layer: int, seed: int) -> None:
        super().__init__()
        self.router = Router(config, layer, seed)
        self.experts = Experts(config)
        shared = config.moe.num_shared * config.moe.intermediate_size
        self.shared = MLP(replace(config, intermediate_size=shared)) if shared else None

    def forward(self, x: Tensor, *, samples: Tensor | None, aux_scale: Tensor | None) -> tuple[Tensor, Tensor]:
        """x [B, T, D] to [B, T, D], and the router's report [E + 5].

        aux_scale: 0-d, the gradient of the training loss with respect to the auxiliary losses; None: they have none.
        """
        routing = self.router(x, samples)
        y = self.experts(x.flatten(0, 1), routing.experts.flatten(0, 1), routing.weights.flatten(0, 1)).view_as(x)
        if self.shared is not None:
            y = y + self.shared(x)
        if aux_scale is not None:
            y = _AddLoss.apply(y, routing.loss, aux_scale)
        return y, routing.report


class Experts(nn.Module):
    """E gated feed-forward networks whose weights are stacked."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        hidden, inner = config.hidden_size, config.moe.intermediate_size
        self.activation = ACTIVATION_FUNCTIONS[config.activation]
        self.gate = GroupedLinear(config.moe.num_experts, hidden, inner)
        self.up = GroupedLinear(config.moe.num_experts, hidden, inner)
        self.down = GroupedLinear(config.moe.num_experts, inner, hidden)

    def forward(self, x: Tensor, experts: Tensor, weights: Tensor) -> Tensor:
        """x [B T, D] through its experts [B T, k] (E: none), added up with weights [B T, k]. Returns [B T, D]."""
        num_experts, k = self.gate.weight.shape[0], experts.shape[1]
        flat = experts.flatten()
        order = flat.argsort(stable=True)
        inverse = torch.empty_like(order).scatter_(0, order, torch.arange(order.shape[0], device=order.device))
        ends = torch.searchsorted(flat[order], torch.arange(num_experts, device=x.device), right=True).to(torch.int32)
        rows = _Dispatch.apply(x, order // k, inverse, k)
        rows = self.down(self.activation(self.gate(rows, ends)) * self.up(rows, ends), ends)
        chosen = _Permute.apply(rows, inverse, order).unflatten(0, (-1, k))
        return (chosen * weights[..., None].to(x.dtype)).sum(1)


class GroupedLinear(nn.Module):
    """One linear map per expert, without bias."""

    def __init__(self, num_experts: int, in_features: int, out_features: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_experts, out_features, in_features))

    def forward(self, rows: Tensor, ends: Tensor) -> Tensor:
        """rows [N, in], sorted by expert, those of expert e ending before ends[e] (int32 [E]). Returns [N, out]."""
        return grouped_linear(rows, self.weight, ends)


class _Dispatch(torch.autograd.Function):
    """x [B T, D] to the rows [N, D] of x numbered token [N]. Backward gathers too: no atomic additions, one order."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, token: Tensor, inverse: Tensor, k: int) -> Tensor:
        ctx.save_for_backward(inverse)
        ctx.k = k
        return x[token]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        (inverse,) = ctx.saved_tensors
        return grad[inverse].unflatten(0, (-1, ctx.k)).sum(1), None, None, None


class _Permute(torch.autograd.Function):
    """rows[permutation]; inverse is that of the permutation."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, permutation: Tensor, inverse: Tensor) -> Tensor:
        ctx.save_for_backward(inverse)
        return rows[permutation]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (inverse,) = ctx.saved_tensors
        return grad[inverse], None, None


class _AddLoss(torch.autograd.Function):
    """y unchanged; its backward also starts one from `loss`, with the gradient `scale`.

    So a loss of a middle layer needs no way out of the model, on which pipeline stages and checkpointing would have to
    carry it.
    """

    @staticmethod
    def forward(ctx: Any, y: Tensor, loss: Tensor, scale: Tensor) -> Tensor:
        ctx.save_for_backward(scale)
        return y.view_as(y)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        (scale,) = ctx.saved_tensors
        return grad, scale, None
