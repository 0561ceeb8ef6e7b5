"""Mistral (2310.06825): Llama with a sliding window in every layer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from models.config import ModelConfig
from models.family import Family, HFConfig
from models.llama import LLAMA, common_fields, common_to_hf, common_weights


def from_hf(fields: Mapping[str, Any]) -> ModelConfig:
    """ModelConfig of a Mistral config.json. Raises ValueError for what is not supported."""
    source = HFConfig({"num_key_value_heads": 8, **fields})
    window = source.take("sliding_window", 4096)
    config = ModelConfig(family="mistral", **common_fields(source, max_seq_len=4096 * 32), sliding_window=window)
    source.finish()
    return config


def to_hf(config: ModelConfig) -> dict[str, Any]:
    """config.json of a resolved Mistral."""
    return {**common_to_hf(config), "sliding_window": config.sliding_window}


MISTRAL = Family(
    name="mistral",
    architecture="MistralForCausalLM",
    from_hf=from_hf,
    to_hf=to_hf,
    weights=common_weights,
    ignored=LLAMA.ignored,
)
