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
    """Attention of q [B, T, H, K] over k, v [B, T, G, K], scaled by K^-1/2; softmax in fp32.

    documents [B, T] confines it to documents, slopes [H] adds ALiBi, dropout maps the probabilities [B, H, T, T].
    Returns the output [B, T, H, K] in q's dtype and the log-sum-exp of the scores, fp32 [B, H, T].
    """
    T, K = q.shape[1], q.shape[3]
    groups = q.shape[2] // k.shape[2]
    k, v = (x.repeat_interleave(groups, dim=2) for x in (k, v))
    scores = torch.einsum("bqhk,bshk->bhqs", q.float(), k.float()) / math.sqrt(K)
    if slopes is not None:
        scores = scores + alibi_bias(T, slopes)
    scores = scores.masked_fill(~visible(T, q.device, window=window, documents=documents), -math.inf)
    lse = torch.logsumexp(scores, dim=-1)
    probabilities = torch.exp(scores - lse[..., None])
    if dropout is not None:
        probabilities = dropout(probabilities)
    output = torch.einsum("bhqs,bshk->bqhk", probabilities, v.float())
    return output.to(q.dtype), lse
