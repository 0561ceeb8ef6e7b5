"""The way into the model and the way out of it."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.config import ModelConfig


class LMHead(nn.Module):
    """Logits from hidden states. With tied embeddings it has no parameter of its own: the table is handed to it.

    One parameter under one name is what makes tying safe: nothing that shards, copies or saves parameters can untie it.
    """

    weight: nn.Parameter | None  # [V, D]; None: tied

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        weight = None if config.tie_embeddings else nn.Parameter(torch.empty(config.vocab_size, config.hidden_size))
        self.register_parameter("weight", weight)

    def forward(self, hidden: Tensor, weight: Tensor) -> Tensor:
        """hidden [B, T, D] and weight [V, D] (this head's own or the embedding's) to logits [B, T, V]."""
        return F.linear(hidden, weight)
