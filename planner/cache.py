"""Bytes of keys and values in serving."""

from __future__ import annotations

from models.config import ModelConfig


def cache_bytes(model: ModelConfig, *, tokens: int, itemsize: int = 2) -> int:
    """Of the keys and values of so many tokens: of every layer 2 G K elements a token, or with latent attention the
    latent and the key's rotary part; a layer with a window keeps no more tokens than that. model: resolved."""
    assert model.head_dim is not None
    assert model.value_dim is not None
    assert model.num_kv_heads is not None
    latent = model.mla.kv_rank + model.mla.rope_dim
    features = latent if model.mla.kv_rank else model.num_kv_heads * (model.head_dim + model.value_dim)
    kept = sum(min(tokens, model.window_of(layer) or tokens) for layer in range(model.num_layers))
    return kept * features * itemsize
