"""Llama 2 and 3 (2307.09288, 2407.21783), and what Mistral and Qwen share with them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from models.config import ModelConfig
from models.family import Family, HFConfig, HFWeight
from models.hf_rope import rope_from_hf, rope_to_hf

ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
}
TO_HF_ACTIVATION = {"silu": "silu", "gelu": "gelu", "gelu_tanh": "gelu_pytorch_tanh", "relu": "relu"}


def common_fields(source: HFConfig, *, max_seq_len: int) -> dict[str, Any]:
    """Fields of ModelConfig that the Llama-like families say alike. max_seq_len: what transformers assumes."""
    max_seq_len = source.take("max_position_embeddings", max_seq_len)
    return {
        "vocab_size": source.require("vocab_size"),
        "hidden_size": source.require("hidden_size"),
        "intermediate_size": source.require("intermediate_size"),
        "num_layers": source.require("num_hidden_layers"),
        "num_heads": source.require("num_attention_heads"),
        "num_kv_heads": source.take("num_key_value_heads", None),
        "head_dim": source.take("head_dim", None),
        "max_seq_len": max_seq_len,
        "norm_eps": source.take("rms_norm_eps", 1e-6),
        "activation": source.translate("hidden_act", "silu", ACTIVATIONS),
        "rope": rope_from_hf(source, max_seq_len),
        "tie_embeddings": source.take("tie_word_embeddings", False),
        "init_std": source.take("initializer_range", 0.02),
    }


def common_to_hf(config: ModelConfig) -> dict[str, Any]:
    """The reverse of `common_fields`."""
    return {
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "max_position_embeddings": config.max_seq_len,
        "rms_norm_eps": config.norm_eps,
        "hidden_act": TO_HF_ACTIVATION[config.activation],
        **rope_to_hf(config.rope, config.max_seq_len),
        "tie_word_embeddings": config.tie_embeddings,
        "initializer_range": config.init_std,
        "attention_dropout": config.attention_dropout,
    }


def common_weights(config: ModelConfig) -> list[HFWeight]:
    """Names of all tensors of the Llama-like families."""
    found = [HFWeight("embedding.weight", "model.embed_tokens.weight")]
    qkv = ["weight", "bias"] if config.qkv_bias else ["weight"]
    o = ["weight", "bias"] if config.attention_bias else ["weight"]
    mlp = ["weight", "bias"] if config.mlp_bias else ["weight"]
    for layer in range(config.num_blocks):
        ours, theirs = f"blocks.{layer}", f"model.layers.{layer}"
        found.append(HFWeight(f"{ours}.attention_norm.weight", f"{theirs}.input_layernorm.weight"))
        for name in "qkv":
            found += [HFWeight(f"{ours}.attention.{name}.{w}", f"{theirs}.self_attn.{name}_proj.{w}") for w in qkv]
        found += [HFWeight(f"{ours}.attention.o.{w}", f"{theirs}.self_attn.o_proj.{w}") for w in o]
        for name in ("q_norm", "k_norm") if config.qk_norm else ():
            found.append(HFWeight(f"{ours}.attention.{name}.weight", f"{theirs}.self_attn.{name}.weight"))
        found.append(HFWeight(f"{ours}.mlp_norm.weight", f"{theirs}.post_attention_layernorm.weight"))
        for name in ("gate", "up", "down"):
            found += [HFWeight(f"{ours}.mlp.{name}.{w}", f"{theirs}.mlp.{name}_proj.{w}") for w in mlp]
    found.append(HFWeight("final_norm.weight", "model.norm.weight"))
    if not config.tie_embeddings:
        found.append(HFWeight("head.weight", "lm_head.weight"))
    return found


def from_hf(fields: Mapping[str, Any]) -> ModelConfig:
    """ModelConfig of a Llama config.json. Raises ValueError for what is not supported."""
    source = HFConfig(fields)
    bias = source.take("attention_bias", False)
    config = ModelConfig(
        family="llama",
        **common_fields(source, max_seq_len=2048),
        qkv_bias=bias,
        attention_bias=bias,
        mlp_bias=source.take("mlp_bias", False),
    )
    source.finish()
    return config


def to_hf(config: ModelConfig) -> dict[str, Any]:
    """config.json of a resolved Llama."""
    return {**common_to_hf(config), "attention_bias": config.attention_bias, "mlp_bias": config.mlp_bias}


LLAMA = Family(
    name="llama",
    architecture="LlamaForCausalLM",
    from_hf=from_hf,
    to_hf=to_hf,
    weights=common_weights,
    ignored=r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq",
)
