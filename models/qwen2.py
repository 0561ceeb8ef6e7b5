"""Qwen2 and Qwen2.5 (2407.10671): Llama with biases on q, k, v and, in some layers, a sliding window."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from models.config import ModelConfig
from models.family import Family, HFConfig
from models.llama import common_fields, common_to_hf, common_weights

FULL, SLIDING = "full_attention", "sliding_attention"


def window_fields(source: HFConfig, num_layers: int) -> dict[str, Any]:
    """sliding_window and sliding_window_layers of a Qwen: by `layer_types`, or from `max_window_layers` on."""
    use = source.take("use_sliding_window", False)
    window = source.take("sliding_window", 4096) if use else None
    source.take("sliding_window", None)
    first = source.take("max_window_layers", 28)
    types = source.take("layer_types", None)
    if types is None:
        types = [SLIDING if window is not None and layer >= first else FULL for layer in range(num_layers)]
    if len(types) != num_layers or not set(types) <= {FULL, SLIDING}:
        raise ValueError(f"config.json has layer_types={types}; use {num_layers} times {FULL!r} or {SLIDING!r}")
    layers = [layer for layer, kind in enumerate(types) if kind == SLIDING]
    if layers and window is None:
        raise ValueError(f"config.json has {SLIDING!r} layers without use_sliding_window=true and a sliding_window")
    return {"sliding_window": window, "sliding_window_layers": layers if window is not None else None}


def window_to_hf(config: ModelConfig) -> dict[str, Any]:
    """The reverse of `window_fields`."""
    kinds = [FULL if config.window_of(layer) is None else SLIDING for layer in range(config.num_layers)]
    return {
        "use_sliding_window": config.sliding_window is not None,
        "sliding_window": config.sliding_window,
        "max_window_layers": config.num_layers if SLIDING not in kinds else kinds.index(SLIDING),
        "layer_types": kinds,
    }


def from_hf(fields: Mapping[str, Any]) -> ModelConfig:
    """ModelConfig of a Qwen2 config.json. Raises ValueError for what is not supported."""
    source = HFConfig({"num_key_value_heads": 32, **fields})
    common = common_fields(source, max_seq_len=32768)
    config = ModelConfig(family="qwen2", **common, **window_fields(source, common["num_layers"]), qkv_bias=True)
    source.finish()
    return config


def to_hf(config: ModelConfig) -> dict[str, Any]:
    """config.json of a resolved Qwen2."""
    return {**common_to_hf(config), **window_to_hf(config)}


QWEN2 = Family(name="qwen2", architecture="Qwen2ForCausalLM", from_hf=from_hf, to_hf=to_hf, weights=common_weights)
