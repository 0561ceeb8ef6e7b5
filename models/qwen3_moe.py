"""Qwen3-MoE (2505.09388): Qwen3 with many small experts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from models.config import ModelConfig
from models.family import Family, HFConfig, HFWeight
from models.llama import common_fields, common_to_hf
from models.mixtral import expert_weights
from models.moe_config import MoEConfig


def from_hf(fields: Mapping[str, Any]) -> ModelConfig:
    """ModelConfig of a Qwen3-MoE config.json. Raises ValueError for what is not supported."""
    source = HFConfig({"num_key_value_heads": 4, **fields})
    bias = source.take("attention_bias", False)
    source.take("router_aux_loss_coef", 0.001)  # training, which model.routing decides
    source.take("output_router_logits", False)
    use_window = source.take("use_sliding_window", False)
    window = source.take("sliding_window", 4096)
    source.take("max_window_layers", 28)  # in published files; transformers has one window for all layers
    experts = "num_local_experts" if "num_local_experts" in fields else "num_experts"
    config = ModelConfig(
        family="qwen3_moe",
        **common_fields(source, max_seq_len=32768),
        sliding_window=window if use_window else None,
        qk_norm=True,
        qkv_bias=bias,
        attention_bias=bias,
        moe=MoEConfig(
            num_experts=source.take(experts, 128),
            top_k=source.take("num_experts_per_tok", 8),
            intermediate_size=source.take("moe_intermediate_size", 768),
            every=source.take("decoder_sparse_step", 1),
            dense_layers=source.take("mlp_only_layers", None) or None,
            normalize=source.take("norm_topk_prob", False),
        ),
    )
    source.finish()
    return config


def to_hf(config: ModelConfig) -> dict[str, Any]:
    """config.json of a resolved Qwen3-MoE."""
    moe = config.moe
    return {
        **common_to_hf(config),
        "attention_bias": config.attention_bias,
        "use_sliding_window": config.sliding_window is not None,
        "sliding_window": config.sliding_window,
        "num_experts": moe.num_experts,
        "num_experts_per_tok": moe.top_k,
        "moe_intermediate_size": moe.intermediate_size,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [layer for layer in range(config.num_layers) if not moe.in_layer(layer)],
        "norm_topk_prob": moe.normalize,
    }


def weights(config: ModelConfig) -> list[HFWeight]:
    """Names of all tensors."""
    return expert_weights(config, router="mlp.gate.weight", expert=lambda name: f"mlp.experts.{{}}.{name}_proj.weight")


QWEN3_MOE = Family(name="qwen3_moe", architecture="Qwen3MoeForCausalLM", from_hf=from_hf, to_hf=to_hf, weights=weights)
