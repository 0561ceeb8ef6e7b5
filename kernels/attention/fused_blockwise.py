"""`blockwise.BlockAttention` by the Triton kernels: what a ring or an all-gather runs on CUDA. Letters as there."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from kernels.attention import fused
from kernels.attention.blockwise import BlockAttention, Run, indices
from kernels.attention.mask import Mask, piece_mask, run_mask
from kernels.backend import runs_triton


class KeptMasks:
    """Masks between runs met so far in a forward pass: its layers and its backward meet the same ones again.

    Deliberately opaque, like parallel.cut.Cut: compiled graphs hand it on without looking inside.
    """

    def __init__(self) -> None:
        self.by_runs: dict[Hashable, Mask] = {}


@dataclass(frozen=True)
class FusedBlockAttention(BlockAttention):
    """Products in the type of q, everything that is summed over blocks in fp32. Without dropout.

    CPU tensors run what it inherits. Raises ValueError for dropout, whose probabilities the kernels never form.
    """

    masks: KeptMasks = field(default_factory=KeptMasks)  # of the same documents

    def __post_init__(self) -> None:
        if self.dropout is not None:
            raise ValueError("attention dropout needs probabilities, which the kernels never form; use the reference")

    @property
    def takes_many_runs(self) -> bool:
        return self.slopes is None  # distances between queries and keys are one number plus those of their places

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, queries: Sequence[Run], keys: Sequence[Run]
    ) -> tuple[Tensor, Tensor]:
        if not runs_triton(q):
            return super().forward(q, k, v, queries, keys)
        # A ring has a gradient of its own, and needs no op around the kernel, which costs the host as much again. So
        # selective checkpointing does not see it, and computes it again: what a ring merges in place cannot be kept.
        run = partial(fused.attention, wide=True) if torch.is_grad_enabled() else fused.partial_attention
        return run(q, k, v, self._mask(q, queries, keys), slopes=self.slopes)

    @staticmethod
    def merge_(output: Tensor, lse: Tensor, block_output: Tensor, block_lse: Tensor) -> None:
        run = fused.merge_ if runs_triton(output) else BlockAttention.merge_
        run(output, lse, block_output, block_lse)

    @staticmethod
    def delta(grad: Tensor, output: Tensor) -> Tensor:
        return fused.delta(grad, output) if runs_triton(grad) else BlockAttention.delta(grad, output)

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
        if not runs_triton(q):
            return super().backward(grad, q, k, v, lse=lse, delta=delta, queries=queries, keys=keys)
        mask = self._mask(q, queries, keys)
        return fused.partial_gradients(grad, q, k, v, mask, lse=lse, delta=delta, slopes=self.slopes)

    def _mask(self, q: Tensor, queries: Sequence[Run], keys: Sequence[Run]) -> Mask:
        found = (self.window, tuple(queries), tuple(keys))
        if found not in self.masks.by_runs:
            self.masks.by_runs[found] = self._new_mask(q, queries, keys)
        return self.masks.by_runs[found]

    def _new_mask(self, q: Tensor, queries: Sequence[Run], keys: Sequence[Run]) -> Mask:
        of_queries, of_keys = (self._documents(runs) for runs in (queries, keys))
        if len(queries) == len(keys) == 1:
            ((first_query, num_queries),), ((first_key, num_keys),) = queries, keys
            return run_mask(
                num_queries,
                num_keys,
                q.device,
                window=self.window,
                first_query=first_query,
                first_key=first_key,
                query_documents=of_queries,
                key_documents=of_keys,
            )
        if self.window is None and self.documents is None:  # the steps of a zigzag ring: no mask in memory
            if tuple(queries) == tuple(keys):
                return Mask(causal=True, offset=0)
            if sum(keys[-1]) <= queries[0][0]:
                return Mask(causal=False, offset=None)
        return piece_mask(
            indices(queries, q.device),
            indices(keys, q.device),
            window=self.window,
            query_documents=of_queries,
            key_documents=of_keys,
        )

    def _documents(self, runs: Sequence[Run]) -> Tensor | None:
        """[B, T] of these tokens."""
        if self.documents is None:
            return None
        first, length = runs[0]
        if len(runs) == 1:
            return self.documents[:, first : first + length]
        return self.documents[:, indices(runs, self.documents.device)]
