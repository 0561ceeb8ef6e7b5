"""Multi-head latent attention: keys and values of all heads are made of one small latent per token.

B batch, T tokens, D hidden_size, H heads, R kv_rank, N nope_dim, P rope_dim, V value_dim.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from models.config import ModelConfig
from models.layers import rope
from models.layers.attention import Attention, Context
from models.layers.dropout import Dropout

LATENT_NORM_EPS = 1e-6  # DeepSeek's, whatever the eps of its other norms


class LatentAttention(Attention):
    """Causal attention whose cache is [T, R + P] per layer (DeepSeek-V2, 2405.04434, eq. 9 to 19). Keeps [B, T, D].

        c, k_rope = kv_a(x)                 the latent [R], normalised, and one key [P] with position for all heads
        k_nope, v = kv_b(norm(c))           [H, N] and [H, V]
        q_nope, q_rope = q(x)               or q_b(norm(q_a(x))) with q_rank
        score = (q_nope . k_nope + q_rope . k_rope) (N + P)^-1/2

    `compress` and `expand` are apart so that inference can keep what lies between them.
    """

    def __init__(self, config: ModelConfig, layer: int, seed: int) -> None:
        nn.Module.__init__(self)  # not Attention's, whose projections this one does not have
        mla, H, D = config.mla, config.num_heads, config.hidden_size
        self.mla, self.head_dim, self.window = mla, mla.nope_dim + mla.rope_dim, config.window_of(layer)
        bias = config.attention_bias
        if mla.q_rank is None:
            self.q = nn.Linear(D, H * self.head_dim, bias=False)
        else:
            self.q_a = nn.Linear(D, mla.q_rank, bias=bias)
            self.q_a_norm = nn.RMSNorm(mla.q_rank, eps=LATENT_NORM_EPS)
            self.q_b = nn.Linear(mla.q_rank, H * self.head_dim, bias=False)
        self.kv_a = nn.Linear(D, mla.kv_rank + mla.rope_dim, bias=bias)
        self.kv_a_norm = nn.RMSNorm(mla.kv_rank, eps=LATENT_NORM_EPS)
        self.kv_b = nn.Linear(mla.kv_rank, H * (mla.nope_dim + mla.value_dim), bias=False)
        self.o = nn.Linear(H * mla.value_dim, D, bias=bias)
        self.query_scale = yarn_score_factor(config)
        self.dropout = Dropout(
            config.attention_dropout,
            seed=seed,
            site=f"blocks.{layer}.attention.probabilities",
            max_seq_len=config.max_seq_len,
        )

    def forward(self, x: Tensor, context: Context) -> Tensor:
        B, T, _ = x.shape
        q = self.q(x) if self.mla.q_rank is None else self.q_b(self.q_a_norm(self.q_a(x)))
        q_nope, q_rope = q.view(B, T, -1, self.head_dim).split([self.mla.nope_dim, self.mla.rope_dim], dim=-1)
        q = torch.cat([q_nope, self._rotate(q_rope, context)], dim=-1) * self.query_scale
        k, v = self.expand(*self.compress(x, context))
        return self.o(self._attend(q, k, v, context).reshape(B, T, -1))

    def compress(self, x: Tensor, context: Context) -> tuple[Tensor, Tensor]:
        """x [B, T, D] to what a cache holds: the normalised latent [B, T, R] and the turned shared key [B, T, 1, P]."""
        latent, k_rope = self.kv_a(x).split([self.mla.kv_rank, self.mla.rope_dim], dim=-1)
        return self.kv_a_norm(latent), self._rotate(k_rope[:, :, None], context)

    def expand(self, latent: Tensor, k_rope: Tensor) -> tuple[Tensor, Tensor]:
        """Keys [B, T, H, N + P] and values [B, T, H, V] of what `compress` returned."""
        kv = self.kv_b(latent).unflatten(-1, (-1, self.mla.nope_dim + self.mla.value_dim))
        k_nope, v = kv.split([self.mla.nope_dim, self.mla.value_dim], dim=-1)
        return torch.cat([k_nope, k_rope.expand(-1, -1, k_nope.shape[2], -1)], dim=-1), v

    def _rotate(self, x: Tensor, context: Context) -> Tensor:
        """Turn x [B, T, heads, P]. Interleaved pairs come out as halves, in queries and keys alike: scores stay."""
        assert context.cos is not None
        assert context.sin is not None
        if self.mla.interleaved:
            x = torch.cat([x[..., 0::2], x[..., 1::2]], dim=-1)
        return rope.rotate(x, context.cos, context.sin)


def yarn_score_factor(config: ModelConfig) -> float:
    """What DeepSeek multiplies scores with under YaRN: (0.1 mscale_all_dim ln(factor) + 1)^2; 1 otherwise."""
    stretched = config.rope.scaling == "yarn" and config.rope.factor > 1
    if not stretched or not config.rope.mscale_all_dim:
        return 1.0
    return (0.1 * config.rope.mscale_all_dim * math.log(config.rope.factor) + 1.0) ** 2
