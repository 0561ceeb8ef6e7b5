"""OPT (2205.01068): learned positions, LayerNorm before or after each branch, ReLU, biases."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from models.config import ModelConfig
from models.family import Family, HFConfig, HFWeight
from models.llama import ACTIVATIONS, TO_HF_ACTIVATION

UNUSED_POSITIONS = 2
"""Rows in front of the position table that no token in use reads: the table is indexed from there."""


def from_hf(fields: Mapping[str, Any]) -> ModelConfig:
    """ModelConfig of an OPT config.json. Raises ValueError for what is not supported."""
    source = HFConfig(fields)
    hidden_size = source.require("hidden_size")
    if source.take("word_embed_proj_dim", hidden_size) not in (None, hidden_size):
        raise ValueError(
            f"config.json has word_embed_proj_dim={fields['word_embed_proj_dim']} and hidden_size={hidden_size}: the "
            "projections between embeddings and blocks of another width (OPT-350m) are not supported"
        )
    source.expect("layer_norm_elementwise_affine", True, "a norm without weights")
    source.expect("layerdrop", 0.0, "skipping whole layers at random in training")
    norm_first = source.take("do_layer_norm_before", True)
    bias = source.take("enable_bias", True)
    config = ModelConfig(
        family="opt",
        vocab_size=source.require("vocab_size"),
        hidden_size=hidden_size,
        intermediate_size=source.require("ffn_dim"),
        num_layers=source.require("num_hidden_layers"),
        num_heads=source.require("num_attention_heads"),
        max_seq_len=source.take("max_position_embeddings", 2048),
        norm="layernorm",
        norm_eps=1e-5,
        activation=source.translate("activation_function", "relu", ACTIVATIONS),
        gated_mlp=False,
        positions="learned",
        qkv_bias=bias,
        attention_bias=bias,
        mlp_bias=bias,
        tie_embeddings=source.take("tie_word_embeddings", True),
        norm_first=norm_first,
        final_norm=norm_first and not source.take("_remove_final_layer_norm", False),
        init_std=source.take("init_std", 0.02),
    )
    source.finish()
    return config


def to_hf(config: ModelConfig) -> dict[str, Any]:
    """config.json of a resolved OPT."""
    return {
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "word_embed_proj_dim": config.hidden_size,
        "ffn_dim": config.intermediate_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "max_position_embeddings": config.max_seq_len,
        "activation_function": TO_HF_ACTIVATION[config.activation],
        "enable_bias": config.mlp_bias,
        "do_layer_norm_before": config.norm_first,
        "_remove_final_layer_norm": config.norm_first and not config.final_norm,
        "tie_word_embeddings": config.tie_embeddings,
        "init_std": config.init_std,
        "dropout": config.dropout,
        "attention_dropout": config.attention_dropout,
    }


def weights(config: ModelConfig) -> list[HFWeight]:
    """Names of all tensors."""
    positions = (UNUSED_POSITIONS, UNUSED_POSITIONS + config.max_seq_len)
    found = [
        HFWeight("embedding.weight", "model.decoder.embed_tokens.weight"),
        HFWeight("positions.weight", "model.decoder.embed_positions.weight", rows=positions),
    ]
    linear = ("weight", "bias") if config.mlp_bias else ("weight",)
    projections = {
        "attention.q": "self_attn.q_proj",
        "attention.k": "self_attn.k_proj",
        "attention.v": "self_attn.v_proj",
        "attention.o": "self_attn.out_proj",
        "mlp.up": "fc1",
        "mlp.down": "fc2",
    }
    norms = {"attention_norm": "self_attn_layer_norm", "mlp_norm": "final_layer_norm"}
    for layer in range(config.num_layers):
        ours, theirs = f"blocks.{layer}", f"model.decoder.layers.{layer}"
        found += [HFWeight(f"{ours}.{a}.{w}", f"{theirs}.{b}.{w}") for a, b in projections.items() for w in linear]
        found += [
            HFWeight(f"{ours}.{a}.{w}", f"{theirs}.{b}.{w}") for a, b in norms.items() for w in ("weight", "bias")
        ]
    if config.final_norm:
        found += [HFWeight(f"final_norm.{w}", f"model.decoder.final_layer_norm.{w}") for w in ("weight", "bias")]
    if not config.tie_embeddings:
        found.append(HFWeight("head.weight", "lm_head.weight"))
    return found


OPT = Family(
    name="opt",
    architecture="OPTForCausalLM",
    from_hf=from_hf,
    to_hf=to_hf,
    weights=weights,
    optional_prefix="model.",
)
