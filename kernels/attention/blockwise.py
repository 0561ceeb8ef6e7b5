"""Causal attention of some runs of queries over some runs of keys, forward and backward, in plain PyTorch.

The parts of a long sequence that live on different ranks meet here two at a time: each pair gives an output and the
log-sum-exp of its scores, and `merge_` makes the whole from them (the online softmax of Flash Attention, 2205.14135,
section 3.1).

B batch, T queries, S keys, H query heads, G key/value heads (H is a multiple of G), K features of a head's query and
key, V of its value.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

Run = tuple[int, int]
"""Neighbouring tokens of a sequence: index of the first in the sequence, and their number."""


def indices(runs: Sequence[Run], device: torch.device) -> Tensor:
    """int64 [T]: index in the sequence of each token of runs that lie one behind the other."""
    return torch.cat([torch.arange(first, first + length, device=device) for first, length in runs])


@dataclass(frozen=True)
class BlockAttention:
    """Attention between runs of one sequence, ascending. All are there in one tensor, one behind the other."""

    window: int | None = None  # a query sees this many last keys, itself included
    documents: Tensor | None = None  # [B, sequence]: of the whole sequence, whichever runs are looked at
    slopes: Tensor | None = None  # [H]: ALiBi
    dropout: Callable[..., Tensor] | None = None  # (P [B, H, T, S], queries=, keys=, runs of both) to the same shape

    @property
    def takes_many_runs(self) -> bool:
        """Whether queries and keys may be several runs; if not, pairs of runs are to be put together by `merge_`."""
        return True

    def sees(self, first_query: int, first_key: int, *, queries: int, keys: int) -> bool:
        """Whether some of so many queries may see some of so many keys. From indices alone, so known on the host."""
        if first_key > first_query + queries - 1:
            return False
        return self.window is None or first_key + keys - 1 > first_query - self.window

    def keys_of(self, first_query: int, length: int) -> tuple[int, int]:
        """Index of the first key and behind the last that `length` queries may see. Known on the host like `sees`."""
        first = 0 if self.window is None else max(0, first_query - self.window + 1)
        return first, first_query + length

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, queries: Sequence[Run], keys: Sequence[Run]
    ) -> tuple[Tensor, Tensor]:
        """Attention of q [B, T, H, K] over k [B, S, G, K], v [B, S, G, V], scaled by K^-1/2.

        Returns the output [B, T, H, V] and the log-sum-exp of the scores [B, H, T], both fp32 (fp64 for fp64). A query
        that sees none of the keys gets 0 and -inf.
        """
        scores = self._scores(q, k, queries, keys)
        lse = torch.logsumexp(scores, dim=-1)
        probabilities = self._drop(self._probabilities(scores, lse), queries, keys)
        return torch.einsum("bhqs,bshk->bqhk", probabilities, _heads(v, q.shape[2])), lse

    @staticmethod
    def merge_(output: Tensor, lse: Tensor, block_output: Tensor, block_lse: Tensor) -> None:
        """Attention over two sets of keys from the attention over each, in place of the first: output [B, T, H, V], lse
        [B, H, T].

        One of the two log-sum-exps of a query must be finite (it saw a key); a set with -inf then has no weight.
        """
        merged = torch.logaddexp(lse, block_lse)
        weight, block_weight = (torch.exp(x - merged).transpose(1, 2)[..., None] for x in (lse, block_lse))
        output.copy_(output * weight + block_output * block_weight)
        lse.copy_(merged)

    @staticmethod
    def delta(grad: Tensor, output: Tensor) -> Tensor:
        """[B, H, T], what `backward` takes: over V, the sum of the output's gradient times the output [B, T, H, V]."""
        return (_wide(grad) * output).sum(dim=-1).transpose(1, 2)

    def backward(
        self,
        grad: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        lse: Tensor,
        delta: Tensor,
        queries: Sequence[Run],
        keys: Sequence[Run],
    ) -> tuple[Tensor, Tensor, Tensor]:
        """This block's share of the gradients of q, k and v, fp32 (fp64 for fp64), scores computed anew.

        grad [B, T, H, V] is the gradient of the output over *all* keys, lse [B, H, T] the log-sum-exp over all keys and
        delta [B, H, T] the sum over V of grad times that output (2307.08691, algorithm 2). With P = exp(scores - lse)
        and dP = grad v^T: dv = P^T grad, dscores = P (dP - delta). Dropout D is linear: dv = D(P)^T grad, dP = D(grad
        v^T), and delta stays what it is, because it is also the sum over all keys of P dP.
        """
        grad, H = _wide(grad), q.shape[2]
        scores = self._scores(q, k, queries, keys)
        probabilities = self._probabilities(scores, lse)
        dropped = self._drop(probabilities, queries, keys)
        grad_v = torch.einsum("bhqs,bqhk->bshk", dropped, grad)
        grad_p = self._drop(torch.einsum("bqhk,bshk->bhqs", grad, _heads(v, H)), queries, keys)
        grad_scores = probabilities * (grad_p - delta[..., None]) / math.sqrt(q.shape[3])
        grad_q = torch.einsum("bhqs,bshk->bqhk", grad_scores, _heads(k, H))
        grad_k = torch.einsum("bhqs,bqhk->bshk", grad_scores, _wide(q))
        return grad_q, _sum_groups(grad_k, k.shape[2]), _sum_groups(grad_v, v.shape[2])

    def _scores(self, q: Tensor, k: Tensor, queries: Sequence[Run], keys: Sequence[Run]) -> Tensor:
        """[B, H, T, S]; -inf where the query does not see the key."""
        scores = torch.einsum("bqhk,bshk->bhqs", _wide(q), _heads(k, q.shape[2])) / math.sqrt(q.shape[3])
        query, key = indices(queries, q.device)[:, None], indices(keys, q.device)
        if self.slopes is not None:
            scores = scores - self.slopes[:, None, None] * (query - key)
        visible = (key <= query)[None, None]
        if self.window is not None:
            visible = visible & (key > query - self.window)
        if self.documents is not None:
            of_queries, of_keys = self.documents[:, query], self.documents[:, None, key]  # [B, T, 1], [B, 1, S]
            visible = visible & (of_queries == of_keys)[:, None]
        return scores.masked_fill(~visible, -math.inf)

    def _probabilities(self, scores: Tensor, lse: Tensor) -> Tensor:
        # A query that sees nothing has lse = -inf, and -inf - (-inf) is no number.
        return torch.exp(scores - lse.masked_fill(lse == -math.inf, 0.0)[..., None])

    def _drop(self, p: Tensor, queries: Sequence[Run], keys: Sequence[Run]) -> Tensor:
        return p if self.dropout is None else self.dropout(p, queries=queries, keys=keys)


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _heads(x: Tensor, num_heads: int) -> Tensor:
    """k or v [B, S, G, K] with one head per query head, [B, S, H, K], wide."""
    return _wide(x).repeat_interleave(num_heads // x.shape[2], dim=2)


def _sum_groups(grad: Tensor, num_kv_heads: int) -> Tensor:
    """The gradient of x [B, S, G, K] from that of `_heads(x)` [B, S, H, K]."""
    return grad.unflatten(2, (num_kv_heads, -1)).sum(dim=3)
