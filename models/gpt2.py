"""GPT-2 (Radford et al., 2019): learned positions, LayerNorm, GELU, biases.

Its files hold transposed, fused matrices.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from models.config import ModelConfig
from models.family import Family, HFConfig, HFWeight

ACTIVATIONS = {
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu": "gelu",
    "relu": "relu",
    "silu": "silu",
    "swish": "silu",
}
TO_HF_ACTIVATION = {"gelu_tanh": "gelu_new", "gelu": "gelu", "relu": "relu", "silu": "silu"}


def from_hf(fields: Mapping[str, Any]) -> ModelConfig:
    """ModelConfig of a GPT-2 config.json. Raises ValueError for what is not supported."""
    source = HFConfig(fields)
    source.expect("scale_attn_weights", True, "attention without the factor head_dim^-1/2")
    source.expect("scale_attn_by_inverse_layer_idx", False, "a factor on attention that differs by layer")
    source.expect("add_cross_attention", False, "an encoder to attend to")
    # Where set, transformers upcasts scores to fp32; the attention here always keeps them so.
    source.take("reorder_and_upcast_attn", False)
    hidden_size = source.require("n_embd")
    config = ModelConfig(
        family="gpt2",
        vocab_size=source.require("vocab_size"),
        hidden_size=hidden_size,
        intermediate_size=source.take("n_inner", None) or 4 * hidden_size,
        num_layers=source.require("n_layer"),
        num_heads=source.require("n_head"),
        max_seq_len=source.take("n_positions", 1024),
        norm="layernorm",
        norm_eps=source.take("layer_norm_epsilon", 1e-5),
        activation=source.translate("activation_function", "gelu_new", ACTIVATIONS),
        gated_mlp=False,
        positions="learned",
        qkv_bias=True,
        attention_bias=True,
        mlp_bias=True,
        tie_embeddings=source.take("tie_word_embeddings", True),
        init_std=source.take("initializer_range", 0.02),
    )
    source.finish()
    return config


def to_hf(config: ModelConfig) -> dict[str, Any]:
    """config.json of a resolved GPT-2."""
    return {
        "vocab_size": config.vocab_size,
        "n_embd": config.hidden_size,
        "n_inner": config.intermediate_size,
        "n_layer": config.num_layers,
        "n_head": config.num_heads,
        "n_positions": config.max_seq_len,
        "layer_norm_epsilon": config.norm_eps,
        "activation_function": TO_HF_ACTIVATION[config.activation],
        "tie_word_embeddings": config.tie_embeddings,
        "initializer_range": config.init_std,
        "resid_pdrop": config.dropout,
        "embd_pdrop": config.dropout,
        "attn_pdrop": config.attention_dropout,
    }


def weights(config: ModelConfig) -> list[HFWeight]:
    """Names of all tensors. Matrices are stored [in, out], and q, k, v as one of 3 * hidden_size outputs."""
    D = config.hidden_size
    found = [
        HFWeight("embedding.weight", "transformer.wte.weight"),
        HFWeight("positions.weight", "transformer.wpe.weight"),
    ]
    for layer in range(config.num_layers):
        ours, theirs = f"blocks.{layer}", f"transformer.h.{layer}"
        for w in ("weight", "bias"):
            matrix = w == "weight"
            found.append(HFWeight(f"{ours}.attention_norm.{w}", f"{theirs}.ln_1.{w}"))
            found += [
                HFWeight(
                    f"{ours}.attention.{name}.{w}",
                    f"{theirs}.attn.c_attn.{w}",
                    transpose=matrix,
                    rows=(i * D, (i + 1) * D),
                )
                for i, name in enumerate("qkv")
            ]
            found.append(HFWeight(f"{ours}.attention.o.{w}", f"{theirs}.attn.c_proj.{w}", transpose=matrix))
            found.append(HFWeight(f"{ours}.mlp_norm.{w}", f"{theirs}.ln_2.{w}"))
            found.append(HFWeight(f"{ours}.mlp.up.{w}", f"{theirs}.mlp.c_fc.{w}", transpose=matrix))
            found.append(HFWeight(f"{ours}.mlp.down.{w}", f"{theirs}.mlp.c_proj.{w}", transpose=matrix))
    found += [HFWeight(f"final_norm.{w}", f"transformer.ln_f.{w}") for w in ("weight", "bias")]
    if not config.tie_embeddings:
        found.append(HFWeight("head.weight", "lm_head.weight"))
    return found


GPT2 = Family(
    name="gpt2",
    architecture="GPT2LMHeadModel",
    from_hf=from_hf,
    to_hf=to_hf,
    weights=weights,
    optional_prefix="transformer.",
    ignored=r"(transformer\.)?h\.\d+\.attn\.(bias|masked_bias)",
)
