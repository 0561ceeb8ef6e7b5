"""Normalisation layers."""

from __future__ import annotations

from torch import nn

from models.config import ModelConfig


def make_norm(config: ModelConfig) -> nn.Module:
    """The norm of [..., hidden_size] that `config` names: RMSNorm (1910.07467) or LayerNorm (1607.06450).

    Both compute in fp32 inside, whatever the dtype of their input.
    """
    if config.norm == "rmsnorm":
        return nn.RMSNorm(config.hidden_size, eps=config.norm_eps)
    return nn.LayerNorm(config.hidden_size, eps=config.norm_eps)
