"""`blockwise.BlockAttention` by the Triton kernels: what a ring or an all-gather runs on CUDA. Letters as there."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from kernels.attention import fused
from kernels.attention.blockwise import BlockAttention
from kernels.attention.mask import Mask, run_mask
from kernels.backend import runs_triton


@dataclass(frozen=True)
class FusedBlockAttention(BlockAttention):
    """Products in the type of q, everything that is summed over blocks in fp32. Without dropout.

    CPU tensors run what it inherits. Raises ValueError for dropout, whose probabilities the kernels never form.
    """

    # Masks of the pairs of runs met so far, by first query and key and their numbers: backward meets the same.
    masks: dict[tuple[int, int, int, int], Mask] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.dropout is not None:
            raise ValueError("attention dropout needs probabilities, which the kernels never form; use the reference")

    def forward(self, q: Tensor, k: Tensor, v: Tensor, first_query: int, first_key: int) -> tuple[Tensor, Tensor]:
        if not runs_triton(q):
            return super().forward(q, k, v, first_query, first_key)
        mask = self._mask(q, k, first_query, first_key)
        return fused.attention(q, k, v, mask, slopes=self.slopes, wide=True)

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
        first_query: int,
        first_key: int,
    ) -> tuple[Tensor, Tensor, Tensor]:
        if not runs_triton(q):
            starts = {"first_query": first_query, "first_key": first_key}
            return super().backward(grad, q, k, v, lse=lse, delta=delta, **starts)
        mask = self._mask(q, k, first_query, first_key)
        return fused.partial_gradients(grad, q, k, v, mask, lse=lse, delta=delta, slopes=self.slopes)

    def _mask(self, q: Tensor, k: Tensor, first_query: int, first_key: int) -> Mask:
        key = (first_query, first_key, q.shape[1], k.shape[1])
        if key not in self.masks:
            self.masks[key] = run_mask(
                q.shape[1],
                k.shape[1],
                q.device,
                window=self.window,
                first_query=first_query,
                first_key=first_key,
                query_documents=self._documents(first_query, q.shape[1]),
                key_documents=self._documents(first_key, k.shape[1]),
            )
        return self.masks[key]

    def _documents(self, first: int, length: int) -> Tensor | None:
        return None if self.documents is None else self.documents[:, first : first + length]
