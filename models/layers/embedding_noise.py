"""NEFTune: noise on the embeddings of supervised fine-tuning, which depends on no layout."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from kernels.philox import four_uniforms

SITE = "neftune"
DRAWS = 4  # of one counter


class EmbeddingNoise(nn.Module):
    """Adds uniform noise in [-1, 1] x alpha / sqrt(L D) to embeddings in training (NEFTune, 2310.05914, algorithm 1).

    L is the number of tokens of the document that a token is in: of an example where a row has several, without the
    padding. So an example gets as much noise in every packing; transformers and TRL take the length of the padded row.
    Draws are a function of (seed, sample, token in the sequence, feature), as dropout's.
    """

    def __init__(self, alpha: float, *, seed: int) -> None:
        super().__init__()
        self.alpha = alpha
        self.seed = seed

    def forward(
        self, x: Tensor, *, samples: Tensor | None, documents: Tensor | None, tokens: Tensor | None = None
    ) -> Tensor:
        """x [B, T, D] with noise, in evaluation x itself. samples [B]: sample numbers. documents [B, S]: ascending.

        tokens [T] int64: index in the sequence of S of each of x's tokens; None: 0, 1, ... Raises ValueError where
        samples or documents are missing.
        """
        if not self.training:
            return x
        if samples is None or documents is None:
            raise ValueError("noise on embeddings needs the sample number of each row and the documents in it")
        lengths, D = lengths_of(documents), x.shape[2]
        if tokens is None:
            tokens = torch.arange(x.shape[1], device=x.device)
        rows = samples[:, None] * documents.shape[1] + tokens  # [B, T]: never the same for two places of the run
        counters = -(-D // DRAWS)
        index = rows[..., None] * counters + torch.arange(counters, device=x.device)
        drawn = four_uniforms(self.seed, SITE, index).flatten(-2)[..., :D]
        size = self.alpha * (lengths[:, tokens] * D).rsqrt()
        return (x + (2.0 * drawn - 1.0) * size[..., None]).to(x.dtype)


def lengths_of(documents: Tensor) -> Tensor:
    """[B, S] fp32: tokens of the document that each token of documents [B, S], ascending in a row, is in."""
    documents = documents.contiguous()
    ends = torch.searchsorted(documents, documents, right=True)
    return (ends - torch.searchsorted(documents, documents)).float()
