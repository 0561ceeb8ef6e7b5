"""What a block of multi-token prediction begins with (DeepSeek-V3, 2412.19437, eq. 21)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from models.config import ModelConfig
from models.layers.linear import replicated_linear
from models.layers.norm import make_norm
from parallel.groups import ModelParallel


class LookAhead(nn.Module):
    """M [norm(e); norm(h)]: a hidden state and the embedding of a later token, back in the size of one of them.

    Embedding before hidden state, as in published weights (the paper writes them the other way round). M is whole on
    every rank of the tp axis; with sequence parallelism each maps its own tokens.
    """

    def __init__(self, config: ModelConfig, groups: ModelParallel) -> None:
        super().__init__()
        self.embedding_norm = make_norm(config, groups)
        self.hidden_norm = make_norm(config, groups)
        self.project = replicated_linear(2 * config.hidden_size, config.hidden_size, bias=False, groups=groups)

    def forward(self, hidden: Tensor, embedded: Tensor) -> Tensor:
        """Both [B, T, D] of the residual stream, to the same."""
        return self.project(torch.cat([self.embedding_norm(embedded), self.hidden_norm(hidden)], dim=-1))
