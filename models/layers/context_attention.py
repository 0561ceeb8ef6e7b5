"""Attention over a sequence whose tokens are spread over the cp axis: which kernel runs under which method.

B batch, T tokens here, S tokens of the sequence, H query heads, G key/value heads, K features of a head's query and
key, V of its value; R ranks of cp_ring, U of cp_ulysses, S = R U T.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from kernels.attention.blockwise import BlockAttention
from kernels.attention.sinks import with_sinks
from parallel.context import (
    at_once,
    gather_heads,
    gather_sequence,
    repeat_kv_heads,
    ring_attention,
    scatter_heads,
)
from parallel.cut import Cut, zigzag
from parallel.groups import ModelParallel

RUNS_ON: dict[str, tuple[str, ...]] = {
    "ring": ("triton", "reference"),
    "ulysses": ("triton", "sdpa", "reference"),
    "allgather": ("triton", "reference"),
}
"""Implementations that each method can run on. Which of them model.attention=auto takes, `choose_attention` says."""
WITHOUT_SINKS = "sdpa"
"""The implementation that does not return the log-sum-exp, which attention sinks need."""


def runs_on_context(attention: str, method: str, *, sinks: bool = False) -> tuple[str, ...]:
    """Implementations that model.attention may mean under a method. Raises ValueError where there is none."""
    possible = tuple(name for name in RUNS_ON[method] if not (sinks and name == WITHOUT_SINKS))
    if attention == "auto":
        return possible
    if attention not in possible:
        raise ValueError(
            f"model.attention={attention} does not work with parallel.cp_method={method}, which runs on "
            f"{' or '.join(possible)}{' with model.attention_sinks=true' * sinks}; use model.attention=auto"
        )
    return (attention,)


class ContextAttention:
    """The attention of one layer across the ranks a sequence is split over."""

    def __init__(self, groups: ModelParallel) -> None:
        self.ring, self.ulysses, self.method = groups.cp_ring, groups.cp_ulysses, groups.cp_method

    @torch.compiler.disable(reason="messages between ranks")
    def by_heads(self, q: Tensor, k: Tensor, v: Tensor, attend: Callable[..., Tensor]) -> Tensor:
        """attend with all tokens of cp_ulysses and a share of the heads.

        q [B, T, H, K], k [B, T, G, K], v [B, T, G, V].
        attend(q [B, UT, H/U, K], k, v, first_head=the number of its first head) returns [B, UT, H/U, V]; its tokens are
        a part of the sequence over cp_ring, or all of it where there is none. Returns [B, T, H, V].

        All of this stays out of compiled graphs, which it parts in two: messages of a ring are started and waited for
        in an order that a graph does not promise, and one graph of all pairs of chunks would be compiled per rank.
        """
        if self.ulysses is None:
            return attend(q, k, v, first_head=0)
        group, size = self.ulysses.get_group(), self.ulysses.size()
        first_head = self.ulysses.get_local_rank() * q.shape[2] // size
        k, v = (repeat_kv_heads(x, size) for x in (k, v))
        q, k, v = (scatter_heads(x, group) for x in (q, k, v))
        return gather_heads(attend(q, k, v, first_head=first_head), group)

    def by_tokens(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        blocks: BlockAttention,
        sinks: Tensor | None = None,
        cut: Cut | None = None,
    ) -> Tensor:
        """Attention of q [B, S/R, H, K] over the k [B, S/R, G, K], v [B, S/R, G, V] of all ranks of cp_ring.

        sinks [H]: attention sinks of these heads. cut: which tokens each rank holds; None: zigzag. Returns
        [B, S/R, H, V].
        """
        assert self.ring is not None
        group = self.ring.get_group()
        cut = zigzag(q.shape[1] * group.size(), group.size()) if cut is None else cut
        if self.method == "ring":
            return ring_attention(q, k, v, group=group, cut=cut, blocks=blocks, sinks=sinks)
        features = (k.shape[3], v.shape[3])
        k, v = gather_sequence(torch.cat((k, v), dim=-1), group, cut).split(features, dim=-1)
        outputs, begin = [], 0
        for runs in at_once(cut.runs[self.ring.get_local_rank()], blocks):
            queries = q[:, begin : (begin := begin + sum(length for _, length in runs))]
            first = min(max(blocks.keys_of(*run)[0], cut.first_key(run)) for run in runs)
            last = blocks.keys_of(*runs[-1])[1]
            keys = [(first, last - first)]
            output, lse = blocks.forward(queries, k[:, first:last], v[:, first:last], runs, keys)
            outputs.append(output if sinks is None else with_sinks(output, lse, sinks))
        return torch.cat(outputs, dim=1).to(q.dtype)
