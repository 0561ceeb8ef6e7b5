"""How large a model is and how much arithmetic a token costs."""

from __future__ import annotations

from math import prod

import torch

from models.config import ModelConfig
from models.decoder import Decoder


def num_parameters(config: ModelConfig) -> int:
    """Parameters of a resolved config; a tied table counts once."""
    with torch.device("meta"):
        return sum(prod(parameter.shape) for parameter in Decoder(config).parameters())


def flops_per_token(config: ModelConfig, seq_len: int) -> int:
    """Floating-point operations of forward and backward per token, in sequences of seq_len: what MFU counts.

    6 N + 12 H K sum_l T_l (PaLM, 2204.02311, appendix B): N parameters that multiply, each 2 operations forward and 4
    backward, and the scores and sums of attention in layer l as if every token saw all T others, as is customary, or
    the sliding window of that layer. Tables that are looked up and not multiplied are left out of N: learned positions,
    and input embeddings that are not also the head.
    """
    assert config.head_dim is not None  # resolved
    lookup = 0 if config.tie_embeddings else config.vocab_size * config.hidden_size
    if config.positions == "learned":
        lookup += config.max_seq_len * config.hidden_size
    multiplied = num_parameters(config) - lookup
    seen = sum(min(seq_len, config.window_of(layer) or seq_len) for layer in range(config.num_layers))
    return 6 * multiplied + 12 * config.num_heads * config.head_dim * seen
