"""Qwen3 (2505.09388): Qwen2 with RMSNorm over each query and key head instead of biases."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from models.config import ModelConfig
from models.family import Family, HFConfig
from models.llama import common_fields, common_to_hf, common_weights
from models.qwen2 import window_fields, window_to_hf


def from_hf(fields: Mapping[str, Any]) -> ModelConfig:
    """ModelConfig of a Qwen3 config.json. Raises ValueError for what is not supported."""
    source = HFConfig({"num_key_value_heads": 32, "head_dim": 128, **fields})
    common = common_fields(source, max_seq_len=32768)
    bias = source.take("attention_bias", False)
    config = ModelConfig(
        family="qwen3",
        **common,
        **window_fields(source, common["num_layers"]),
        qk_norm=True,
        qkv_bias=bias,
        attention_bias=bias,
    )
    source.finish()
    return config


def to_hf(config: ModelConfig) -> dict[str, Any]:
    """config.json of a resolved Qwen3."""
    return {**common_to_hf(config), **window_to_hf(config), "attention_bias": config.attention_bias}


QWEN3 = Family(name="qwen3", architecture="Qwen3ForCausalLM", from_hf=from_hf, to_hf=to_hf, weights=common_weights)
