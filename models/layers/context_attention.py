"""Attention over a sequence whose tokens are spread over the cp axis: which kernel runs under which method.

B batch, T tokens here, S tokens of the sequence, H query heads, G key/value heads, K head_dim.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from kernels.attention.blockwise import BlockAttention
from parallel.context import (
    chunks_of,
    gather_heads,
    gather_sequence,
    repeat_kv_heads,
    ring_attention,
    scatter_heads,
)

RUNS_ON: dict[str, tuple[str, ...]] = {
    "ring": ("reference",),
    "ulysses": ("sdpa", "reference"),
    "allgather": ("reference",),
}
"""Implementations that each method can run on, the one that model.attention=auto means first."""


def on_context(attention: str, method: str) -> str:
    """The implementation that model.attention means under a method. Raises ValueError where there is none."""
    if attention == "auto":
        return RUNS_ON[method][0]
    if attention not in RUNS_ON[method]:
        raise ValueError(
            f"model.attention={attention} does not work with parallel.cp_method={method}, which runs on "
            f"{' or '.join(RUNS_ON[method])}; use model.attention=auto"
        )
    return attention


class ContextAttention:
    """The attention of one layer across the ranks of the cp axis."""

    def __init__(self, mesh: DeviceMesh, method: str) -> None:
        self.method = method
        self.group = mesh.get_group()
        self.rank, self.size = mesh.get_local_rank(), mesh.size()

    def by_heads(self, q: Tensor, k: Tensor, v: Tensor, attend: Callable[..., Tensor]) -> Tensor:
        """Ulysses: q [B, T, H, K], k, v [B, T, G, K]; attend sees all tokens of H/n heads. Returns [B, T, H, K].

        attend(q [B, S, H/n, K], k, v, first_head=the number of its first head) returns [B, S, H/n, K].
        """
        k, v = (repeat_kv_heads(x, self.size) for x in (k, v))
        first_head = self.rank * q.shape[2] // self.size
        q, k, v = (scatter_heads(x, self.group) for x in (q, k, v))
        return gather_heads(attend(q, k, v, first_head=first_head), self.group)

    def by_tokens(self, q: Tensor, k: Tensor, v: Tensor, blocks: BlockAttention) -> Tensor:
        """Ring or all-gather: q [B, T, H, K], k, v [B, T, G, K], in zigzag order. Returns [B, T, H, K]."""
        if self.method == "ring":
            return ring_attention(q, k, v, group=self.group, blocks=blocks)
        k, v = gather_sequence(torch.stack((k, v), dim=2), self.group).unbind(2)
        length = q.shape[1] // 2
        outputs = []
        for queries, chunk in zip(q.chunk(2, dim=1), chunks_of(self.rank, self.size), strict=True):
            first_query = chunk * length
            first, last = blocks.keys_of(first_query, length)
            output, _ = blocks.forward(queries, k[:, first:last], v[:, first:last], first_query, first)
            outputs.append(output)
        return torch.cat(outputs, dim=1).to(q.dtype)
