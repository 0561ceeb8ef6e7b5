"""Small models and inputs, without transformers: quick to import on a rank."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from models.config import ModelConfig
from models.decoder import Decoder
from models.registry import build_model, resolve_model

SEQ_LEN = 19


def sample_tokens(rows: int = 2, seq_len: int = SEQ_LEN, seed: int = 2) -> Tensor:
    """[rows, seq_len] token numbers below the vocabulary of the cases."""
    return torch.randint(0, 61, (rows, seq_len), generator=torch.Generator().manual_seed(seed))


def tiny(**changes: Any) -> ModelConfig:
    """A small resolved Llama for tests that need no oracle."""
    config = ModelConfig(
        vocab_size=61, hidden_size=24, intermediate_size=37, num_layers=2, num_heads=6, num_kv_heads=2, max_seq_len=32
    )
    return resolve_model(replace(config, **changes))


def random_decoder(config: ModelConfig, seed: int = 0) -> Decoder:
    """A decoder in eval mode, every parameter random."""
    model = build_model(config, seed)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    return model.eval()
