"""Causal attention written out: the truth the fast versions are held against, and the one with dropout.

B batch, T tokens, H query heads, G key/value heads (H is a multiple of G), K head_dim.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor


def visible(
    seq_len: int, device: torch.device, *, window: int | None = None, documents: Tensor | None = None
) -> Tensor:
    """Which keys (last dim) each query (the one before) sees: bool [1 or B, 1, T, T].

    Itself and what precedes it; of these the last `window`; of these the ones in its document (documents [B, T]).
    """
    key = torch.arange(seq_len, device=device)
    query = key[:, None]
    mask = (key <= query)[None, None]
    if window is not None:
        mask = mask & (key > query - window)  # not query - key < window: T x T integers take 8 times the bytes
    if documents is not None:
        mask = mask & (documents[:, None, :, None] == documents[:, None, None, :])
    return mask


def alibi_bias(seq_len: int, slopes: Tensor) -> Tensor:
    """What ALiBi adds to the scores: fp32 [H, T, T], -slope times how far the key lies behind the query."""
    index = torch.arange(seq_len, device=slopes.device)
    return -slopes[:, None, None] * (index[:, None] - index[None, :]).abs()


def masked_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    seen: Tensor,
    *,
    scale: float | None = None,
    bias: Tensor | None = None,
    sinks: Tensor | None = None,
    dropout: Callable[[Tensor], Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention of q [B, T, H, K] over k [B, S, G, K], v [B, S, G, V] under the mask `seen`, bool, to [B, H, T, S].

    scale: of the scores, K^-1/2 unless given; bias is added to them. sinks [H]: logits that take part in the softmax
    and have no value (sinks.py); dropout maps the probabilities [B, H, T, S]. Returns the output [B, T, H, V] in q's
    dtype and the log-sum-exp of the scores (and the sink) [B, H, T], fp32 (fp64 for fp64). A query that sees nothing
    gets 0 and -inf (or its sink).
    """
    wide = torch.promote_types(q.dtype, torch.float32)
    q_, k_, v_ = (x.to(wide) for x in (q, k, v))
    k_, v_ = (x.repeat_interleave(q.shape[2] // x.shape[2], dim=2) for x in (k_, v_))
    scores = torch.einsum("bqhk,bshk->bhqs", q_, k_) * (q.shape[3] ** -0.5 if scale is None else scale)
    if bias is not None:
        scores = scores + bias
    empty = ~seen.any(dim=-1, keepdim=True)
    # A row of nothing but -inf would be NaN, forward and backward.
    lse = torch.logsumexp(scores.masked_fill(~seen, -math.inf).masked_fill(empty, 0.0), dim=-1)
    lse = lse.masked_fill(empty[..., 0], -math.inf)
    if sinks is not None:
        lse = torch.logaddexp(lse, sinks.to(wide)[:, None])
    finite = lse.masked_fill(lse == -math.inf, 0.0)
    probabilities = torch.exp(scores.masked_fill(~seen, -math.inf) - finite[..., None])
    if dropout is not None:
        probabilities = dropout(probabilities)
    return torch.einsum("bhqs,bshk->bqhk", probabilities, v_).to(q.dtype), lse


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    window: int | None = None,
    documents: Tensor | None = None,
    slopes: Tensor | None = None,
    dropout: Callable[[Tensor], Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """Causal self-attention of q [B, T, H, K] over k, v [B, T, G, K], scaled by K^-1/2; softmax in fp32.

    documents [B, T] confines it to documents, slopes [H] adds ALiBi, dropout maps the probabilities [B, H, T, T].
    Returns the output [B, T, H, K] in q's dtype and the log-sum-exp of the scores, fp32 [B, H, T].
    """
    seen = visible(q.shape[1], q.device, window=window, documents=documents)
    bias = None if slopes is None else alibi_bias(q.shape[1], slopes)
    return masked_attention(q, k, v, seen, bias=bias, dropout=dropout)
