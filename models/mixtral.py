"""Mixtral (2401.04088): Mistral with a mixture of experts in every layer."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from models.config import ModelConfig
from models.family import Family, HFConfig, HFWeight
from models.llama import common_fields, common_to_hf, common_weights
from models.moe_config import MoEConfig


def expert_weights(config: ModelConfig, *, router: str, expert: Callable[[str], str]) -> list[HFWeight]:
    """All tensors of a Llama-like model with experts.

    router: name of the router's matrix inside a layer; expert: that of gate, up or down of expert `{}`, with a place
    for the number.
    """
    dense = [weight for weight in common_weights(config) if not _replaced(weight.ours, config)]
    found = []
    for layer in filter(config.moe.in_layer, range(config.num_blocks)):
        ours, theirs = f"blocks.{layer}.mlp", f"model.layers.{layer}"
        found.append(HFWeight(f"{ours}.router.weight", f"{theirs}.{router}"))
        for name in ("gate", "up", "down"):
            found += [
                HFWeight(f"{ours}.experts.{name}.weight", f"{theirs}.{expert(name).format(number)}", stack=number)
                for number in range(config.moe.num_experts)
            ]
    return dense + found


def _replaced(ours: str, config: ModelConfig) -> bool:
    """Whether a parameter is of a feed-forward network that experts replace."""
    parts = ours.split(".")
    return parts[0] == "blocks" and parts[2] == "mlp" and config.moe.in_layer(int(parts[1]))


def from_hf(fields: Mapping[str, Any]) -> ModelConfig:
    """ModelConfig of a Mixtral config.json. Raises ValueError for what is not supported."""
    source = HFConfig({"num_key_value_heads": 8, "rope_theta": 1e6, "rms_norm_eps": 1e-5, **fields})
    common = common_fields(source, max_seq_len=4096 * 32)
    moe = MoEConfig(
        num_experts=source.take("num_local_experts", 8),
        top_k=source.take("num_experts_per_tok", 2),
        intermediate_size=common["intermediate_size"],
    )
    source.expect("router_jitter_noise", 0.0, "noise on the router's input is not supported")
    source.take("router_aux_loss_coef", 0.001)  # training, which model.routing decides
    source.take("output_router_logits", False)
    config = ModelConfig(family="mixtral", **common, sliding_window=source.take("sliding_window", None), moe=moe)
    source.finish()
    return config


def to_hf(config: ModelConfig) -> dict[str, Any]:
    """config.json of a resolved Mixtral."""
    return {
        **common_to_hf(config),
        "intermediate_size": config.moe.intermediate_size,
        "sliding_window": config.sliding_window,
        "num_local_experts": config.moe.num_experts,
        "num_experts_per_tok": config.moe.top_k,
    }


def weights(config: ModelConfig) -> list[HFWeight]:
    """Names of all tensors."""
    names = {"gate": "w1", "up": "w3", "down": "w2"}
    return expert_weights(
        config,
        router="block_sparse_moe.gate.weight",
        expert=lambda name: f"block_sparse_moe.experts.{{}}.{names[name]}.weight",
    )


MIXTRAL = Family(name="mixtral", architecture="MixtralForCausalLM", from_hf=from_hf, to_hf=to_hf, weights=weights)
