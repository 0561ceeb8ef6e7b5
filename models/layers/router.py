"""Routers: which experts a token goes to, with which weights, and what keeps the experts equally busy.

Everything here is defined per sequence or per token, so that no layout and no micro-batch size changes it. Where a
sequence is split over ranks (cp), the number of choices of each expert is summed over them, and with a capacity the
choices of the whole sequence, a few bytes per token, are gathered. All else is a sum over tokens: each rank has its
summands, of losses and of their gradients.

B batch, T tokens here, S tokens of the sequence, D hidden_size, E experts, k experts per token.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import Replicate

from kernels.philox import uniform
from models.config import ModelConfig
from parallel.collectives import Axis, all_gather_alike, all_reduce
from parallel.groups import NO_GROUPS, ModelParallel
from parallel.tensor import empty_parameter, local_shard

NORMALIZE_EPS = 1e-20
"""Keeps the normalisation of weights finite where all chosen scores underflow."""


class Routing(NamedTuple):
    """Filled by Router.forward."""

    experts: Tensor  # [B, T, k] int64; E: this choice is not computed
    weights: Tensor  # [B, T, k] fp32
    loss: Tensor  # 0-d fp32, differentiable: weighted auxiliary losses of the tokens here, summed over sequences
    limit: int | None  # no expert is chosen by more of the tokens here than these; None: unknown to the host
    report: Tensor  # [E + 5] fp32, detached, sums over the tokens here: choices of each expert, then most of REPORT


REPORT = ("dropped", "choices", "entropy", "aux_loss", "z_loss", "left_over")
"""Choices not computed, all choices, nats of each token's distribution, unweighted losses of each sequence; and, filled
by MoE.forward, choices that found no room on their way to another rank."""


class Router(nn.Module):
    """Scores experts with a linear map in fp32 and chooses k of them per token.

        softmax  k largest probabilities (Mixtral, 2401.04088; DeepSeek-V2, 2405.04434, with groups)
        switch   the largest probability (Switch, 2101.03961)
        gshard   the two largest, normalised; in training the second is taken with probability 2 w2 (2006.16668)
        sigmoid  k largest of sigmoid(logit) + bias, weighted without the bias (DeepSeek-V3, 2412.19437, eq. 13 to 16)

    `bias` is no parameter: trainer/routing.py moves it against the load (eq. 16, "auxiliary-loss-free").
    """

    bias: Tensor | None  # [E] fp32

    def __init__(self, config: ModelConfig, layer: int, seed: int, groups: ModelParallel = NO_GROUPS) -> None:
        super().__init__()
        self.moe, self.options = config.moe, config.routing
        shape = (config.moe.num_experts, config.hidden_size)
        if groups.tp is None:
            self.weight = nn.Parameter(torch.empty(shape))
        else:
            self.weight = empty_parameter(*shape, mesh=groups.tp, placement=Replicate())
        self.cp = None if groups.cp is None else Axis.of(groups.cp)
        bias = torch.zeros(config.moe.num_experts, dtype=torch.float32) if config.moe.router == "sigmoid" else None
        self.register_buffer("bias", bias)
        # models/invariant.py replaces these
        self.product: Callable[[Tensor, Tensor], Tensor] = F.linear
        sigmoid = config.moe.router == "sigmoid"
        self.score: Callable[[Tensor], Tensor] = torch.sigmoid if sigmoid else partial(torch.softmax, dim=-1)
        self.seed, self.site = seed, f"blocks.{layer}.router"
        self.max_seq_len = config.max_seq_len

    def _apply(self, fn, recurse=True):  # type: ignore[no-untyped-def]
        super()._apply(fn, recurse)
        if self.bias is not None:
            self.bias = self.bias.float()  # model.to(bf16) would round away its steps of 0.001
        return self

    def forward(self, x: Tensor, samples: Tensor | None, indices: Tensor | None = None) -> Routing:
        """Route x [B, T, D]. samples [B]: sample numbers, needed by gshard in training.

        indices [T]: these tokens of each sequence are here, others on other ranks of cp; None: all of them. With tensor
        parallelism every rank routes all tokens alike and computes a summand of what becomes of them, so the gradient
        of the weight is one too.
        """
        cp = None if indices is None else self.cp
        seq_len = x.shape[1] * (1 if cp is None else cp.size)
        logits = self.product(x.float(), local_shard(self.weight, grad="partial").float())
        scores = self.score(logits)
        with torch.no_grad():
            experts = self._eligible(scores).topk(self.moe.top_k, dim=-1).indices
        weights = scores.gather(-1, experts)
        if self.moe.normalize:
            weights = weights / (weights.sum(-1, keepdim=True) + NORMALIZE_EPS)
        counts_BE = here_BE = _count(experts, self.moe.num_experts)
        if cp is not None:
            counts_BE = all_reduce(here_BE, cp)
        p = scores if self.moe.router != "sigmoid" else scores / scores.sum(-1, keepdim=True)
        aux_B = balance_loss(p, counts_BE, self.moe.top_k, seq_len)
        z_B = logits.logsumexp(-1).square().sum(1) / seq_len
        with torch.no_grad():
            kept = self._drop(experts, weights, samples, indices) if self.training else experts
            sums = [(kept == self.moe.num_experts).sum(), torch.full((), kept.numel(), device=x.device)]
            sums += [-torch.xlogy(p, p).sum(), aux_B.sum(), z_B.sum()]
            report = torch.cat([here_BE.sum(0), torch.stack([value.float() for value in sums])])
        loss = self.options.aux_weight * aux_B.sum() + self.options.z_weight * z_B.sum()
        limit = self._limit(x.shape[0], x.shape[1], indices)
        return Routing(kept, weights * self.moe.scaling, loss, limit, report)

    def _eligible(self, scores: Tensor) -> Tensor:
        """[B, T, E]: what the k largest are taken of; -inf outside the best `top_groups` groups of experts.

        A group is as good as its best expert with softmax (DeepSeek-V2), as its best two together with sigmoid (V3).
        """
        choice = scores if self.bias is None else scores + self.bias
        if self.moe.top_groups == self.moe.num_groups:
            return choice
        grouped = choice.unflatten(-1, (self.moe.num_groups, -1))
        best = grouped.topk(2 if self.moe.router == "sigmoid" else 1, dim=-1).values.sum(-1)
        chosen = torch.zeros_like(best, dtype=torch.bool).scatter(-1, best.topk(self.moe.top_groups).indices, True)
        return grouped.masked_fill(~chosen[..., None], -torch.inf).flatten(-2)

    def _limit(self, num_sequences: int, seq_len: int, indices: Tensor | None) -> int | None:
        """Routing.limit. Of a part of a sequence an expert may take all that it takes of the whole: no useful limit."""
        factor = self.options.capacity_factor
        if not self.training or factor == 0 or indices is not None:
            return None
        return num_sequences * min(seq_len, capacity_of(seq_len, self.moe.num_experts, self.moe.top_k, factor))

    def _drop(self, experts: Tensor, weights: Tensor, samples: Tensor | None, indices: Tensor | None) -> Tensor:
        """experts [B, T, k] with E in place of choices that training does not compute."""
        E, T = self.moe.num_experts, experts.shape[1]
        if self.moe.router == "gshard":
            if samples is None:
                raise ValueError(f"the second choice at {self.site} is drawn: pass the sample number of each row, [B]")
            tokens = torch.arange(T, device=experts.device) if indices is None else indices
            index = samples[:, None] * self.max_seq_len + tokens
            second = uniform(self.seed, self.site, index) < 2.0 * weights[..., 1]
            experts = torch.stack([experts[..., 0], torch.where(second, experts[..., 1], E)], dim=-1)
        if self.options.capacity_factor > 0:
            cp = None if indices is None else self.cp
            seq_len = T * (1 if cp is None else cp.size)
            capacity = capacity_of(seq_len, E, self.moe.top_k, self.options.capacity_factor)
            if cp is None or indices is None:
                position = queue_position(experts, E)
            else:
                position = _position_across(experts, E, indices, cp)
            experts = torch.where(position < capacity, experts, E)
        return experts


def _position_across(experts: Tensor, num_experts: int, indices: Tensor, cp: Axis) -> Tensor:
    """`queue_position` of this rank's tokens [B, T, k], at indices [T] of the whole sequence, in all of it."""
    numbered = torch.cat([experts, indices[:, None].expand(*experts.shape[:2], 1)], dim=2)
    parts = all_gather_alike(numbered[None], cp, dim=0)  # [R, B, T, k + 1]
    *choices, index = parts.transpose(0, 1).flatten(1, 2).unbind(2)  # k + 1 of [B, S]
    order = index[0].argsort()
    return queue_position(torch.stack(choices, dim=2)[:, order], num_experts)[:, indices]


def capacity_of(seq_len: int, num_experts: int, top_k: int, factor: float) -> int:
    """Tokens of one sequence that an expert takes: factor times its share under perfect balance, rounded up."""
    return -int(-factor * top_k * seq_len // num_experts)


def balance_loss(p: Tensor, counts_BE: Tensor, top_k: int, seq_len: int) -> Tensor:
    """[B]: E sum_e f_e P_e of each sequence, 1 under perfect balance (DeepSeek-V3, 2412.19437, eq. 17 to 20).

    f_e is the share of the sequence's choices that fell on expert e, P_e the mean of p over its seq_len tokens. With
    one choice per token it is the loss of Switch (2101.03961, eq. 4), of a sequence instead of a rank's batch.

    counts_BE: choices in the whole sequence. f_e has no gradient, so the loss is a sum over tokens: of p [B, T, E] of
    some of them comes their summand.
    """
    E = p.shape[2]
    return E * (counts_BE / (top_k * seq_len) * (p.sum(1) / seq_len)).sum(-1)


def queue_position(experts: Tensor, num_experts: int) -> Tensor:
    """[B, T, k]: how many choices of the same sequence and expert come before; first choices first, then by token.

    An entry of num_experts is no choice and waits in a queue of its own.
    """
    B, T, k = experts.shape
    flat = experts.transpose(1, 2).reshape(B, k * T)  # all first choices, then all second ones
    order = flat.argsort(dim=1, stable=True)
    counts = _count(flat[..., None], num_experts + 1).to(torch.int64)
    first = counts.cumsum(1) - counts
    in_order = torch.arange(k * T, device=experts.device) - first.gather(1, flat.gather(1, order))
    return torch.empty_like(flat).scatter_(1, order, in_order).view(B, k, T).transpose(1, 2)


def _count(experts: Tensor, bins: int) -> Tensor:
    """[B, bins] fp32: how often each number occurs in each of experts [B, T, k]; exact, in any order of addition."""
    flat = experts.flatten(1)
    ones = torch.ones_like(flat, dtype=torch.float32)
    return torch.zeros(flat.shape[0], bins, dtype=torch.float32, device=flat.device).scatter_add_(1, flat, ones)
