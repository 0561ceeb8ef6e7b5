"""The mixture of experts in place of a block's feed-forward network.

B batch, T tokens, D hidden_size, E experts, k experts per token, N = B T k choices, F features inside an expert.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import Shard

from kernels.grouped_linear import grouped_linear, grouped_linear_pair, input_gradient, weight_gradient
from kernels.moe_permute import permute, sort_by_expert, unpermute
from models.config import ModelConfig
from models.layers.mlp import ACTIVATION_FUNCTIONS, MLP
from models.layers.router import Router
from parallel.collectives import Axis
from parallel.expert import Buffers, Routes, plan_buffers, plan_routes, rows_per_pair
from parallel.groups import NO_GROUPS, ModelParallel
from parallel.pipeline.weight_gradients import OUTSIDE, Deferring
from parallel.tensor import empty_parameter, enter, leave, local_shard

OUT_FEATURES, IN_FEATURES = 1, 2
"""Dims of the weights [E, out, in] of stacked linear layers."""


class MoE(nn.Module):
    """sum over the chosen experts of weight * expert(x), plus the shared experts (DeepSeekMoE, 2401.06066).

    No choice is lost unless the router dropped it: choices are sorted by expert and each expert multiplies as many
    rows as it got (MegaBlocks, 2211.15841).

    Over tp it is one branch (parallel/tensor.py): the input is gathered once, the router runs alike on every rank, all
    experts are cut over their inner features, and the summands of routed and shared experts leave in one sum.
    """

    def __init__(self, config: ModelConfig, layer: int, seed: int, groups: ModelParallel = NO_GROUPS) -> None:
        super().__init__()
        self.tp = None if groups.tp is None else Axis.of(groups.tp)
        self.sequence_parallel = groups.sequence_parallel
        self.router = Router(config, layer, seed, groups)
        self.experts = Experts(config, groups)
        shared = config.moe.num_shared * config.moe.intermediate_size
        self.shared = MLP(replace(config, intermediate_size=shared), groups) if shared else None

    def forward(
        self, x: Tensor, *, samples: Tensor | None, indices: Tensor | None = None, aux_scale: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """x [B, T, D] to [B, T, D], and the report [E + len(REPORT)]. samples, indices: those of Router.forward.

        aux_scale: 0-d, the gradient of the training loss with respect to the auxiliary losses; None: they have none.
        With sequence parallelism x and the result have this rank's slice of the T tokens.
        """
        if self.tp is not None:
            x = enter(x, self.tp, sequence_parallel=self.sequence_parallel)
        routing = self.router(x, samples, indices)
        chosen, weights = routing.experts.flatten(0, 1), routing.weights.flatten(0, 1)
        y, left_over = self.experts(x.flatten(0, 1), chosen, weights, routing.limit)
        y = y.view_as(x)
        if self.shared is not None:
            y = y + self.shared.summand(x)
        if aux_scale is not None:
            # Gradients of router and input are summed over tp, where every rank has this loss: each adds its share.
            y = _AddLoss.apply(y, routing.loss, aux_scale if self.tp is None else aux_scale / self.tp.size)
        if self.tp is not None:
            y = leave(y, self.tp, sequence_parallel=self.sequence_parallel)
        report = torch.cat([routing.report, left_over[None]])
        return y if self.shared is None else self.shared.finish(y), report


class Experts(nn.Module):
    """E gated feed-forward networks whose weights are stacked; over ep, E/R of them are here (parallel/expert.py).

    Over tp each is cut by its inner features, and the result is a summand. Where the ranks of ep have the same tokens
    (ModelParallel.tokens_alike), what the experts of one make of them is a summand as well.
    """

    def __init__(self, config: ModelConfig, groups: ModelParallel = NO_GROUPS) -> None:
        super().__init__()
        hidden, inner = config.hidden_size, config.moe.intermediate_size
        self.num_experts = config.moe.num_experts
        self.ep = None if groups.experts is None else Axis.of(groups.experts["ep"])
        self.ep_buffer, self.tokens_alike = groups.ep_buffer, groups.tokens_alike
        self.activation = ACTIVATION_FUNCTIONS[config.activation]
        self.gate = GroupedLinear(self.num_experts, hidden, inner, cut_dim=OUT_FEATURES, groups=groups)
        self.up = GroupedLinear(self.num_experts, hidden, inner, cut_dim=OUT_FEATURES, groups=groups)
        self.down = GroupedLinear(self.num_experts, inner, hidden, cut_dim=IN_FEATURES, groups=groups)

    def forward(self, x: Tensor, experts: Tensor, weights: Tensor, limit: int | None = None) -> tuple[Tensor, Tensor]:
        """x [B T, D] through its experts [B T, k] (E: none), added up with weights [B T, k]. Returns [B T, D].

        limit: how often an expert is chosen at most; None: not known. Also returns 0-d fp32, the number of choices that
        found no room on their way over ep: unless it is 0, the result is not to be used.
        """
        if self.ep is not None and self.tokens_alike:
            return self._of_experts_here(x, experts, weights, self.ep), torch.zeros((), device=x.device)
        permutation = sort_by_expert(experts, self.num_experts)
        rows = permute(x, permutation)
        left_over = torch.zeros((), device=x.device)
        if self.ep is None:
            rows = self._compute(rows, permutation.ends)
        else:
            rows, left_over = self._compute_elsewhere(
                rows, permutation.ends, self._room(rows.shape[0], experts.shape[1], limit)
            )
        return unpermute(rows, weights, permutation), left_over

    def _of_experts_here(self, x: Tensor, experts: Tensor, weights: Tensor, ep: Axis) -> Tensor:
        """`forward` with the choices that fell on this rank's experts; the sum over ep is that of all."""
        num_here = self.num_experts // ep.size
        permutation = sort_by_expert(experts - ep.rank * num_here, num_here)  # outside of these: no expert
        return unpermute(self._compute(permute(x, permutation), permutation.ends), weights, permutation)

    def _compute(self, rows: Tensor, ends: Tensor) -> Tensor:
        """rows [N, D] through the experts here, sorted by expert and ending before ends [number of them]; or 0."""
        if self.gate.plain and self.up.plain:
            gate, up = (local_shard(layer.weight, grad="sharded") for layer in (self.gate, self.up))
            gate, up = grouped_linear_pair(rows, gate, up, ends, implementation=self.gate.implementation)
        else:
            gate, up = self.gate(rows, ends), self.up(rows, ends)
        return self.down(self.activation(gate) * up, ends)

    def _room(self, num_rows: int, top_k: int, limit: int | None) -> int | None:
        """`rows_per_pair`. Outside of training, where no layer keeps its rows for backward, always enough for all."""
        assert self.ep is not None
        buffer = self.ep_buffer if self.training or self.ep_buffer == 0 else self.ep.size
        return rows_per_pair(
            num_rows, size=self.ep.size, num_experts=self.num_experts, top_k=top_k, buffer=buffer, limit=limit
        )

    def _compute_elsewhere(self, rows: Tensor, ends: Tensor, per_pair: int | None) -> tuple[Tensor, Tensor]:
        """The same with all E experts, wherever on ep they are, and ends [E]; and how many rows are left over."""
        assert self.ep is not None
        counts, num_rows = ends.diff(prepend=ends.new_zeros(1)).long(), rows.shape[0]
        routes: Routes | Buffers
        if per_pair is None:
            routes, left_over = plan_routes(counts, self.ep), torch.zeros((), device=rows.device)
        else:
            routes = plan_buffers(counts, self.ep, per_pair=per_pair, num_rows=num_rows)
            left_over = routes.left_over
        return routes.from_experts(self._compute(routes.to_experts(rows), routes.ends), num_rows=num_rows), left_over


class GroupedLinear(Deferring):
    """One linear map per expert, without bias: the experts of this rank of ep, cut over tp along cut_dim."""

    def __init__(
        self, num_experts: int, in_features: int, out_features: int, *, cut_dim: int, groups: ModelParallel = NO_GROUPS
    ) -> None:
        super().__init__()
        self.implementation: str | None = None  # of grouped_linear; models/invariant.py sets it
        shape = (num_experts, out_features, in_features)
        mesh = groups.tp if groups.experts is None else groups.experts
        if mesh is None:
            self.weight = nn.Parameter(torch.empty(shape))
        else:
            cuts = {"ep": Shard(0), "tp": Shard(cut_dim)}
            placements = [cuts[axis] for axis in mesh.mesh_dim_names or ()]
            self.weight = empty_parameter(*shape, mesh=mesh, placement=placements)

    @property
    def plain(self) -> bool:
        """Whether it multiplies with its weight and no more: it has no adapter, is not quantized, and its gradient is
        not put off."""
        return self.weight_gradients is None and not hasattr(self, "adaptation")

    def forward(self, rows: Tensor, ends: Tensor) -> Tensor:
        """rows [N, in], sorted by expert, those of expert e ending before ends[e] (int32 [E]). Returns [N, out]."""
        if self.weight_gradients is not None:
            return self._deferring(rows, ends)
        weight = local_shard(self.weight, grad="sharded")
        return grouped_linear(rows, weight, ends, implementation=self.implementation)

    @torch.compiler.disable(reason=OUTSIDE)
    def _deferring(self, rows: Tensor, ends: Tensor) -> Tensor:
        return _DeferringGroupedLinear.apply(rows, ends, self)


class _DeferringGroupedLinear(torch.autograd.Function):
    """grouped_linear, of which autograd sees the rows alone (parallel/pipeline/weight_gradients.py)."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, ends: Tensor, layer: GroupedLinear) -> Tensor:
        ctx.save_for_backward(rows, ends)
        ctx.layer = layer
        return grouped_linear(rows, local_shard(layer.weight, grad="sharded"), ends)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        rows, ends = ctx.saved_tensors
        layer: GroupedLinear = ctx.layer
        assert layer.weight_gradients is not None

        def compute() -> Iterator[tuple[str, Tensor]]:
            yield f"{layer.layer_name}.weight", weight_gradient(grad, rows, ends)

        layer.weight_gradients.add(compute)
        return input_gradient(grad, local_shard(layer.weight, grad="sharded"), ends), None, None


class _AddLoss(torch.autograd.Function):
    """y unchanged; its backward also starts one from `loss`, with the gradient `scale`.

    So a loss of a middle layer needs no way out of the model, on which pipeline stages and checkpointing would have to
    carry it.
    """

    @staticmethod
    def forward(ctx: Any, y: Tensor, loss: Tensor, scale: Tensor) -> Tensor:
        ctx.save_for_backward(scale)
        return y.clone() if torch.compiler.is_compiling() else y.view_as(y)  # as parallel.collectives.sum_of_gradients

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        (scale,) = ctx.saved_tensors
        return grad, scale, None
