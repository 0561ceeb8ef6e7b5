"""Multi-head latent attention: keys and values of all heads are made of one small latent per token.

B batch, T tokens, D hidden_size, H heads, R kv_rank, N nope_dim, P rope_dim, V value_dim.

Under tensor parallelism q_b (or q), kv_b and o are cut by heads, as in any attention. The projections down and their
norms are whole on every rank: what they make is narrow, and all heads need all of it. With sequence parallelism each
rank makes the latents of its own slice of the tokens, and the latents are gathered instead of x: in DeepSeek-V3
1536 + 512 + 64 features for 7168. Each rank's heads give a part of the gradient of the latents and of the shared key;
it is summed over tp on its way back, before the norms and projections down see it.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from kernels.grouped_linear import grouped_linear
from models.config import ModelConfig
from models.layers import rope
from models.layers.as_served import value_as_served
from models.layers.attention import Attention, Context, make_sinks
from models.layers.context_attention import ContextAttention
from models.layers.dropout import Dropout
from models.layers.linear import column_linear, replicated_linear, row_linear
from models.layers.norm import make_stream_norm
from parallel.collectives import Axis
from parallel.groups import NO_GROUPS, ModelParallel
from parallel.tensor import enter, local_shard, project, project_entered

LATENT_NORM_EPS = 1e-6  # DeepSeek's, whatever the eps of its other norms


class LatentAttention(Attention):
    """Causal attention whose cache is [T, R + P] per layer (DeepSeek-V2, 2405.04434, eq. 9 to 19). Keeps [B, T, D].

        c, k_rope = kv_a(x)                 the latent [R], normalised, and one key [P] with position for all heads
        k_nope, v = kv_b(norm(c))           [H, N] and [H, V]
        q_nope, q_rope = q(x)               or q_b(norm(q_a(x))) with q_rank
        score = (q_nope . k_nope + q_rope . k_rope) (N + P)^-1/2

    `queries`, `compress` and `expand` are apart so that inference can keep what lies between the last two.
    """

    batch_invariant = False  # models/invariant.py

    def __init__(self, config: ModelConfig, layer: int, seed: int, groups: ModelParallel = NO_GROUPS) -> None:
        nn.Module.__init__(self)  # not Attention's, whose projections this one does not have
        mla, H, D = config.mla, config.num_heads, config.hidden_size
        self.across = ContextAttention(groups) if groups.cp_size > 1 else None
        self.axis = None if groups.tp is None else Axis.of(groups.tp)
        self.sequence_parallel = groups.sequence_parallel
        self.num_heads = H
        self.first_head = 0 if self.axis is None else self.axis.rank * (H // self.axis.size)
        self.sinks = make_sinks(config, groups)
        self.mla, self.head_dim = mla, mla.nope_dim + mla.rope_dim
        self.layer, self.window = layer, config.window_of(layer)
        bias = config.attention_bias
        if mla.q_rank is None:
            self.q = column_linear(D, H * self.head_dim, bias=False, groups=groups)
        else:
            self.q_a = replicated_linear(D, mla.q_rank, bias=bias, groups=groups)
            self.q_a_norm = _latent_norm(mla.q_rank, groups)
            self.q_b = column_linear(mla.q_rank, H * self.head_dim, bias=False, groups=groups)
        self.kv_a = replicated_linear(D, mla.kv_rank + mla.rope_dim, bias=bias, groups=groups)
        self.kv_a_norm = _latent_norm(mla.kv_rank, groups)
        self.kv_b = column_linear(mla.kv_rank, H * (mla.nope_dim + mla.value_dim), bias=False, groups=groups)
        self.o = row_linear(H * mla.value_dim, D, bias=bias, groups=groups)
        self.query_scale = yarn_score_factor(config)
        self.dropout = Dropout(
            config.attention_dropout,
            seed=seed,
            site=f"blocks.{layer}.attention.probabilities",
            max_seq_len=config.max_seq_len,
        )

    def forward(self, x: Tensor, context: Context) -> Tensor:
        q = self.queries(x, context)
        if context.cache is not None:
            return self.o(self._attend_compressed(q, *self.compress(x, context), context).flatten(2))
        compressed = self.compress(x, context)
        if context.runs is not None:
            output = value_as_served(
                lambda: self._attend(q, *self.expand(*compressed), context),
                lambda: self._attend_compressed(q, *compressed, context),
            )
            return self.o(output.flatten(2))
        k, v = self.expand(*compressed)
        attend = self._attend if context.indices is None else self._attend_across
        return self.o(attend(q, k, v, context).flatten(2))

    def queries(self, x: Tensor, context: Context) -> Tensor:
        """x [B, T, D] to the queries [B, T, H, N + P] of this rank's heads, turned, times YaRN's factor on scores."""
        if self.mla.q_rank is None:
            (q,) = project(x, (self.q,))
        else:
            (q,) = project(self.q_a_norm(self.q_a(x)), (self.q_b,))
        heads = q.unflatten(-1, (-1, self.head_dim))
        q_nope, q_rope = heads.split([self.mla.nope_dim, self.mla.rope_dim], dim=-1)
        return torch.cat([q_nope, self._rotate(q_rope, context)], dim=-1) * self.query_scale

    def compress(self, x: Tensor, context: Context) -> tuple[Tensor, Tensor]:
        """x [B, T, D] to what a cache holds: the normalised latent [B, T, R] and the turned shared key [B, T, 1, P].

        With sequence parallelism x is this rank's slice, [B, T/tp, D]; latent and key are of all T tokens all the same.
        """
        sizes = [self.mla.kv_rank, self.mla.rope_dim]
        latent, k_rope = self.kv_a(x).split(sizes, dim=-1)
        latent = self.kv_a_norm(latent)
        if self.axis is not None:
            both = torch.cat([latent, k_rope], dim=-1)  # one collective
            latent, k_rope = enter(both, self.axis, sequence_parallel=self.sequence_parallel).split(sizes, dim=-1)
        return latent, self._rotate(k_rope[:, :, None], context)

    def expand(self, latent: Tensor, k_rope: Tensor) -> tuple[Tensor, Tensor]:
        """Keys [B, T, H, N + P] and values [B, T, H, V] of what `compress` returned: H are this rank's heads."""
        kv = project_entered(latent, self.kv_b).unflatten(-1, (-1, self.mla.nope_dim + self.mla.value_dim))
        k_nope, v = kv.split([self.mla.nope_dim, self.mla.value_dim], dim=-1)
        return torch.cat([k_nope, k_rope.expand(-1, -1, k_nope.shape[2], -1)], dim=-1), v

    def _attend_compressed(self, q: Tensor, latent: Tensor, k_rope: Tensor, context: Context) -> Tensor:
        """Attention of q [B, T, H, N + P] over cached latents, which are never expanded. Returns [B, T, H, V].

        With kv_b = [W_k; W_v] per head, q . W_k c = W_k^T q . c and sum p W_v c = W_v sum p c: a single key/value head
        of R + P features, whose first R are its value (2405.04434, section 2.1.2).
        """
        assert isinstance(self.kv_b.weight, Tensor)
        rows = local_shard(self.kv_b.weight, grad="sharded").unflatten(0, (-1, self.mla.nope_dim + self.mla.value_dim))
        w_k, w_v = rows.split([self.mla.nope_dim, self.mla.value_dim], dim=1)  # [H, N, R], [H, V, R]
        q_nope, q_rope = q.split([self.mla.nope_dim, self.mla.rope_dim], dim=-1)
        q = torch.cat([self._by_head(q_nope, w_k.transpose(1, 2)), q_rope], dim=-1)
        k = torch.cat([latent[:, :, None], k_rope], dim=-1)
        output = self._attend_cached(q, k, None, context, value_dim=self.mla.kv_rank)
        return self._by_head(output, w_v)

    def _by_head(self, x: Tensor, weight: Tensor) -> Tensor:
        """x [B, T, H, I] times weight [H, O, I], a matrix for each head: [B, T, H, O]."""
        if not self.batch_invariant:
            return torch.einsum("bthi,hoi->btho", x, weight)
        B, T, H, _ = x.shape
        ends = torch.arange(1, H + 1, dtype=torch.int32, device=x.device) * (B * T)
        rows = x.permute(2, 0, 1, 3).flatten(0, 2)  # of head 0, then of head 1, ...
        y = grouped_linear(rows, weight, ends, implementation="invariant")
        return y.view(H, B, T, -1).permute(1, 2, 0, 3)

    def _rotate(self, x: Tensor, context: Context) -> Tensor:
        """Turn x [B, T, heads, P]. Interleaved pairs come out as halves, in queries and keys alike: scores stay."""
        assert context.cos is not None
        assert context.sin is not None
        if self.mla.interleaved:
            x = torch.cat([x[..., 0::2], x[..., 1::2]], dim=-1)
        return rope.rotate(x, context.cos, context.sin)


def _latent_norm(size: int, groups: ModelParallel) -> nn.Module:
    return make_stream_norm(size, eps=LATENT_NORM_EPS, kind="rmsnorm", groups=groups)


def yarn_score_factor(config: ModelConfig) -> float:
    """What DeepSeek multiplies scores with under YaRN: (0.1 mscale_all_dim ln(factor) + 1)^2; 1 otherwise."""
    stretched = config.rope.scaling == "yarn" and config.rope.factor > 1
    if not stretched or not config.rope.mscale_all_dim:
        return 1.0
    return (0.1 * config.rope.mscale_all_dim * math.log(config.rope.factor) + 1.0) ** 2
