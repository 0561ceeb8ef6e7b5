"""DeepSeek-V3 (2412.19437): V2 with experts chosen by sigmoid and balanced by a bias instead of a loss.

Published files end with layers for multi-token prediction. `model.mtp.depth` says how many of them a run wants; by
default none, as in transformers.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from models.config import ModelConfig
from models.deepseek_v2 import deepseek_fields, deepseek_to_hf
from models.deepseek_v2 import weights as deepseek_weights
from models.family import Family, HFConfig, HFWeight
from models.mtp_config import MTPConfig


def from_hf(fields: Mapping[str, Any]) -> ModelConfig:
    """ModelConfig of a DeepSeek-V3 config.json. Raises ValueError for what is not supported."""
    defaults = {"n_group": 8, "topk_group": 4, "routed_scaling_factor": 2.5, "n_shared_experts": 1}
    source = HFConfig(defaults | dict(fields))
    source.expect("topk_method", "noaux_tc", "DeepSeek-V3 balances by a bias")
    source.expect("scoring_func", "sigmoid", "DeepSeek-V3 routes by sigmoid")
    source.take("num_mtp_layers", 1)
    depth = source.take("num_nextn_predict_layers", 0) or 0
    common = deepseek_fields(source, max_seq_len=4096, first_dense=3)
    common["mla"].interleaved = source.take("rope_interleave", True)
    common["moe"].router = "sigmoid"
    common["moe"].normalize = source.take("norm_topk_prob", True)
    config = ModelConfig(family="deepseek_v3", **common, mtp=MTPConfig(depth=depth))
    source.finish()
    return config


def to_hf(config: ModelConfig) -> dict[str, Any]:
    """config.json of a resolved DeepSeek-V3."""
    own = {"rope_interleave": config.mla.interleaved, "norm_topk_prob": config.moe.normalize}
    return {**deepseek_to_hf(config), **own, "num_nextn_predict_layers": config.mtp.depth}


def weights(config: ModelConfig) -> list[HFWeight]:
    """Names of all tensors."""
    found = deepseek_weights(config)
    for layer in range(config.num_layers, config.num_blocks):
        ours, theirs = f"blocks.{layer}", f"model.layers.{layer}"
        found += [
            HFWeight(f"{ours}.look_ahead.embedding_norm.weight", f"{theirs}.enorm.weight"),
            HFWeight(f"{ours}.look_ahead.hidden_norm.weight", f"{theirs}.hnorm.weight"),
            HFWeight(f"{ours}.look_ahead.project.weight", f"{theirs}.eh_proj.weight"),
            HFWeight(f"{ours}.output_norm.weight", f"{theirs}.shared_head.norm.weight"),
            HFWeight("embedding.weight", f"{theirs}.embed_tokens.weight", copy=True),
            HFWeight(
                "embedding.weight" if config.tie_embeddings else "head.weight",
                f"{theirs}.shared_head.head.weight",
                copy=True,
            ),
        ]
    return found


DEEPSEEK_V3 = Family(
    name="deepseek_v3",
    architecture="DeepseekV3ForCausalLM",
    from_hf=from_hf,
    to_hf=to_hf,
    weights=weights,
)
