"""DeepSeek-V2 (2405.04434): latent attention, and experts chosen by softmax, some of them shared by all tokens."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from models.config import ModelConfig
from models.family import Family, HFConfig, HFWeight
from models.llama import common_fields, common_to_hf
from models.mixtral import expert_weights
from models.mla_config import MLAConfig
from models.moe_config import MoEConfig

TRAINING_FIELDS = ("aux_loss_alpha", "seq_aux", "ep_size", "output_router_logits", "router_aux_loss_coef")


def deepseek_fields(source: HFConfig, *, max_seq_len: int, first_dense: int) -> dict[str, Any]:
    """What the two versions say alike; the arguments are what transformers assumes."""
    for name in ("head_dim", "qk_head_dim", *TRAINING_FIELDS):
        source.take(name, None)  # derived, or decided by model.routing
    source.expect("moe_layer_freq", 1, "layers without experts in between are not supported")
    bias = source.take("attention_bias", False)
    common = common_fields(source, max_seq_len=max_seq_len)
    return common | {
        "head_dim": None,
        "attention_bias": bias,
        "mla": MLAConfig(
            kv_rank=source.take("kv_lora_rank", 512),
            q_rank=source.take("q_lora_rank", 1536),
            nope_dim=source.take("qk_nope_head_dim", 128),
            rope_dim=source.take("qk_rope_head_dim", 64),
            value_dim=source.take("v_head_dim", 128),
        ),
        "moe": MoEConfig(
            num_experts=source.require("n_routed_experts"),
            top_k=source.require("num_experts_per_tok"),
            intermediate_size=source.require("moe_intermediate_size"),
            num_shared=source.take("n_shared_experts", 0) or 0,
            first_dense=source.take("first_k_dense_replace", first_dense),
            scaling=source.take("routed_scaling_factor", 1.0),
            num_groups=source.take("n_group", 1) or 1,
            top_groups=source.take("topk_group", 1) or 1,
        ),
    }


def deepseek_to_hf(config: ModelConfig) -> dict[str, Any]:
    """The reverse of `deepseek_fields`."""
    mla, moe = config.mla, config.moe
    return common_to_hf(config) | {
        "head_dim": mla.rope_dim,  # transformers means the part that rope turns
        "attention_bias": config.attention_bias,
        "kv_lora_rank": mla.kv_rank,
        "q_lora_rank": mla.q_rank,
        "qk_nope_head_dim": mla.nope_dim,
        "qk_rope_head_dim": mla.rope_dim,
        "v_head_dim": mla.value_dim,
        "n_routed_experts": moe.num_experts,
        "num_experts_per_tok": moe.top_k,
        "moe_intermediate_size": moe.intermediate_size,
        "n_shared_experts": moe.num_shared,
        "first_k_dense_replace": moe.first_dense,
        "routed_scaling_factor": moe.scaling,
        "n_group": moe.num_groups,
        "topk_group": moe.top_groups,
    }


def weights(config: ModelConfig) -> list[HFWeight]:
    """Names of all tensors of either version."""
    found = expert_weights(config, router="mlp.gate.weight", expert=lambda name: f"mlp.experts.{{}}.{name}_proj.weight")
    found = [weight for weight in found if ".attention." not in weight.ours]
    for layer in range(config.num_blocks):
        found += _attention_weights(config, f"blocks.{layer}.attention", f"model.layers.{layer}.self_attn")
        if not config.moe.in_layer(layer):
            continue
        ours, theirs = f"blocks.{layer}.mlp", f"model.layers.{layer}.mlp"
        if config.moe.router == "sigmoid":
            found.append(HFWeight(f"{ours}.router.bias", f"{theirs}.gate.e_score_correction_bias"))
        for name in ("gate", "up", "down") if config.moe.num_shared else ():
            found.append(HFWeight(f"{ours}.shared.{name}.weight", f"{theirs}.shared_experts.{name}_proj.weight"))
    return found


def _attention_weights(config: ModelConfig, ours: str, theirs: str) -> list[HFWeight]:
    names = {"kv_a": "kv_a_proj_with_mqa", "kv_a_norm": "kv_a_layernorm", "kv_b": "kv_b_proj", "o": "o_proj"}
    if config.mla.q_rank is None:
        names["q"] = "q_proj"
    else:
        names |= {"q_a": "q_a_proj", "q_a_norm": "q_a_layernorm", "q_b": "q_b_proj"}
    found = [HFWeight(f"{ours}.{name}.weight", f"{theirs}.{their}.weight") for name, their in names.items()]
    if config.attention_bias:
        biased = [name for name in ("q_a", "kv_a", "o") if name in names]
        found += [HFWeight(f"{ours}.{name}.bias", f"{theirs}.{names[name]}.bias") for name in biased]
    return found


def from_hf(fields: Mapping[str, Any]) -> ModelConfig:
    """ModelConfig of a DeepSeek-V2 config.json. Raises ValueError for what is not supported."""
    source = HFConfig(fields)
    methods = {"greedy": "greedy", "group_limited_greedy": "group_limited_greedy"}
    method = source.translate("topk_method", "greedy", methods)
    source.expect("scoring_func", "softmax", "DeepSeek-V2 routes by softmax")
    source.expect("norm_topk_prob", False, "transformers does not normalise the weights of DeepSeek-V2")
    common = deepseek_fields(source, max_seq_len=2048, first_dense=0)
    moe: MoEConfig = common.pop("moe")
    moe.normalize = False
    if method == "greedy":
        moe.num_groups = moe.top_groups = 1
    config = ModelConfig(family="deepseek_v2", **common, mlp_bias=source.take("mlp_bias", False), moe=moe)
    source.finish()
    return config


def to_hf(config: ModelConfig) -> dict[str, Any]:
    """config.json of a resolved DeepSeek-V2."""
    grouped = config.moe.top_groups < config.moe.num_groups
    method = {"topk_method": "group_limited_greedy" if grouped else "greedy", "norm_topk_prob": False}
    return {**deepseek_to_hf(config), "mlp_bias": config.mlp_bias, **method}


DEEPSEEK_V2 = Family(
    name="deepseek_v2", architecture="DeepseekV2ForCausalLM", from_hf=from_hf, to_hf=to_hf, weights=weights
)
