"""Dropout whose mask depends on what is dropped, not on where it is computed."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from kernels.attention.blockwise import Run, indices
from kernels.philox import uniform


class Dropout(nn.Module):
    """Dropout (Srivastava et al., 2014) with a mask that is a function of (seed, site, sample, token, feature).

    So an element is dropped or kept alike on every layout, in every micro-batch, and again when a checkpointed block
    recomputes it. A token is known by its index in the sequence, not in the document, or equal places of two documents
    in a row would share their mask.
    """

    def __init__(self, probability: float, *, seed: int, site: str, max_seq_len: int) -> None:
        super().__init__()
        self.probability = probability
        self.seed = seed
        self.site = site
        self.max_seq_len = max_seq_len

    @property
    def active(self) -> bool:
        """Whether a forward pass drops anything."""
        return self.training and self.probability > 0

    def forward(self, x: Tensor, samples: Tensor | None, tokens: Tensor | None = None) -> Tensor:
        """x [B, T, D], some elements zeroed, the rest scaled by 1 / (1 - probability). samples [B]: sample numbers.

        tokens [T] int64: index in the sequence of each of x's tokens; None: 0, 1, ...
        """
        if not self.active:
            return x
        rows = self._samples(samples, x.shape[1])[:, None] * self.max_seq_len
        if tokens is None:
            tokens = torch.arange(x.shape[1], device=x.device)
        rows = rows + tokens  # [B, T]: never the same for two places of the run
        features = torch.arange(x.shape[2], device=x.device)
        return self._drop(x, rows[..., None] * x.shape[2] + features)

    def on_probabilities(
        self,
        p: Tensor,
        samples: Tensor | None,
        *,
        queries: Sequence[Run] | None = None,
        keys: Sequence[Run] | None = None,
        first_head: int = 0,
        num_heads: int | None = None,
    ) -> Tensor:
        """The same for attention probabilities p [B, H, T, S], keyed by (sample, head, query, key).

        p is of these runs of queries and keys (None: of the first T or S tokens), and of heads first_head and on of
        num_heads (None: H).
        """
        if not self.active:
            return p
        _, H, T, S = p.shape
        queries, keys = queries or [(0, T)], keys or [(0, S)]
        heads = torch.arange(first_head, first_head + H, device=p.device)
        end = max(sum(queries[-1]), sum(keys[-1]))
        rows = self._samples(samples, end)[:, None] * (num_heads or H) + heads  # [B, H]
        rows = rows[..., None] * self.max_seq_len + indices(queries, p.device)  # [B, H, T]
        return self._drop(p, rows[..., None] * self.max_seq_len + indices(keys, p.device))

    def _samples(self, samples: Tensor | None, seq_len: int) -> Tensor:
        if samples is None:
            raise ValueError(f"dropout at {self.site} needs samples: pass the sample number of each row, [B] int64")
        if seq_len > self.max_seq_len:
            raise ValueError(
                f"dropout at {self.site} numbers its draws up to model.max_seq_len={self.max_seq_len}, but the "
                f"sequence has {seq_len} tokens; raise model.max_seq_len"
            )
        return samples

    def _drop(self, x: Tensor, index: Tensor) -> Tensor:
        keep = uniform(self.seed, self.site, index) >= self.probability
        return torch.where(keep, x / (1.0 - self.probability), torch.zeros((), dtype=x.dtype, device=x.device))
