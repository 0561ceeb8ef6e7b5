"""DeepSeek-V3 (2412.19437): V2 with experts chosen by sigmoid and balanced by a bias instead of a loss.

The layers for multi-token prediction at the end of published files are left out, as transformers does.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from models.config import ModelConfig
from models.deepseek_v2 import deepseek_fields, deepseek_to_hf, weights
from models.family import Family, HFConfig


def from_hf(fields: Mapping[str, Any]) -> ModelConfig:
    """ModelConfig of a DeepSeek-V3 config.json. Raises ValueError for what is not supported."""
    defaults = {"n_group": 8, "topk_group": 4, "routed_scaling_factor": 2.5, "n_shared_experts": 1}
    source = HFConfig(defaults | dict(fields))
    source.expect("topk_method", "noaux_tc", "DeepSeek-V3 balances by a bias")
    source.expect("scoring_func", "sigmoid", "DeepSeek-V3 routes by sigmoid")
    for name in ("num_nextn_predict_layers", "num_mtp_layers"):
        source.take(name, 1)
    common = deepseek_fields(source, max_seq_len=4096, first_dense=3)
    common["mla"].interleaved = source.take("rope_interleave", True)
    common["moe"].router = "sigmoid"
    common["moe"].normalize = source.take("norm_topk_prob", True)
    config = ModelConfig(family="deepseek_v3", **common)
    source.finish()
    return config


def to_hf(config: ModelConfig) -> dict[str, Any]:
    """config.json of a resolved DeepSeek-V3."""
    own = {"rope_interleave": config.mla.interleaved, "norm_topk_prob": config.moe.normalize}
    return {**deepseek_to_hf(config), **own, "num_nextn_predict_layers": 0}


DEEPSEEK_V3 = Family(
    name="deepseek_v3",
    architecture="DeepseekV3ForCausalLM",
    from_hf=from_hf,
    to_hf=to_hf,
    weights=weights,
    ignored=r"model\.layers\.61\..*",
)
