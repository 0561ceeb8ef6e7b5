"""Tiny random models of transformers, the independent implementation the decoder is held against."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from models.config import ModelConfig
from models.decoder import Decoder
from models.hf import load_hf_weights
from models.registry import FAMILIES, build_model, resolve_model

# Odd sizes on purpose: nothing here is a multiple of 8 that need not be.
LLAMA: dict[str, Any] = {
    "vocab_size": 61,
    "hidden_size": 24,
    "intermediate_size": 37,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 24,
}
QWEN3_MOE: dict[str, Any] = {
    "head_dim": 6,
    "num_experts": 7,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 11,
}
DEEPSEEK: dict[str, Any] = {
    **LLAMA,
    "num_key_value_heads": 6,
    "moe_intermediate_size": 11,
    "n_routed_experts": 6,
    "num_experts_per_tok": 3,
    "n_shared_experts": 2,
    "first_k_dense_replace": 1,
    "kv_lora_rank": 10,
    "q_lora_rank": 9,
    "qk_nope_head_dim": 4,
    "qk_rope_head_dim": 6,
    "v_head_dim": 7,
}
GPT2: dict[str, Any] = {"vocab_size": 61, "n_embd": 21, "n_layer": 3, "n_head": 3, "n_positions": 24}
OPT: dict[str, Any] = {
    "vocab_size": 61,
    "hidden_size": 21,
    "ffn_dim": 37,
    "num_hidden_layers": 3,
    "num_attention_heads": 3,
    "max_position_embeddings": 24,
}


def _rope(kind: str, theta: float = 1000.0, **fields: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": theta, **fields}}


YARN_MSCALE = _rope(
    "yarn", factor=4.0, original_max_position_embeddings=6, beta_fast=2.0, mscale=0.7, mscale_all_dim=1.3
)

# Sequences are 19 tokens: longer than the windows, the trained lengths and (for dynamic) the length of the model.
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", LLAMA),
    "llama_mha": ("llama", {**LLAMA, "num_key_value_heads": 6, "tie_word_embeddings": True}),
    "llama_mqa": ("llama", {**LLAMA, "num_key_value_heads": 1}),
    "llama_bias": ("llama", {**LLAMA, "attention_bias": True, "mlp_bias": True}),
    "llama_head_dim": ("llama", {**LLAMA, "head_dim": 10}),
    "llama_linear": ("llama", {**LLAMA, **_rope("linear", factor=3.0)}),
    "llama_ntk": ("llama", {**LLAMA, "max_position_embeddings": 7, **_rope("dynamic", factor=2.5)}),
    "llama_ntk_short": ("llama", {**LLAMA, **_rope("dynamic", factor=2.5)}),
    "llama_yarn": (
        "llama",
        {**LLAMA, "head_dim": 16, **_rope("yarn", factor=4.0, original_max_position_embeddings=6, beta_fast=2.0)},
    ),
    "llama_yarn_mscale": (
        "llama",
        {
            **LLAMA,
            "head_dim": 16,
            **_rope(
                "yarn",
                factor=3.0,
                original_max_position_embeddings=8,
                mscale=0.7,
                mscale_all_dim=1.3,
                truncate=False,
                beta_fast=3.0,
                beta_slow=0.25,
            ),
        },
    ),
    "llama_yarn_factor": (
        "llama",
        {**LLAMA, **_rope("yarn", factor=2.0, original_max_position_embeddings=12, attention_factor=1.3)},
    ),
    "llama3": (
        "llama",
        {
            **LLAMA,
            "head_dim": 16,
            **_rope(
                "llama3", factor=8.0, original_max_position_embeddings=48, low_freq_factor=1.0, high_freq_factor=4.0
            ),
        },
    ),
    "mistral": ("mistral", {**LLAMA, "sliding_window": 5}),
    "mistral_full": ("mistral", {**LLAMA, "sliding_window": None, "tie_word_embeddings": True}),
    "qwen2": ("qwen2", LLAMA),
    "qwen2_windows": (
        "qwen2",
        {**LLAMA, "use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1, "tie_word_embeddings": True},
    ),
    "qwen3": ("qwen3", {**LLAMA, "head_dim": 8, "tie_word_embeddings": True}),
    "qwen3_windows": (
        "qwen3",
        {
            **LLAMA,
            "head_dim": 6,
            "num_key_value_heads": 3,
            "attention_bias": True,
            "use_sliding_window": True,
            "sliding_window": 3,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        },
    ),
    "gpt2": ("gpt2", GPT2),
    "gpt2_untied": ("gpt2", {**GPT2, "n_inner": 50, "activation_function": "relu", "tie_word_embeddings": False}),
    "opt": ("opt", OPT),
    "opt_post_norm": ("opt", {**OPT, "do_layer_norm_before": False}),
    "mixtral": ("mixtral", {**LLAMA, "num_local_experts": 5}),
    "mixtral_window": ("mixtral", {**LLAMA, "num_local_experts": 3, "sliding_window": 5}),
    "qwen3_moe": ("qwen3_moe", {**LLAMA, **QWEN3_MOE}),
    "qwen3_moe_layers": (
        "qwen3_moe",
        {**LLAMA, **QWEN3_MOE, "decoder_sparse_step": 2, "norm_topk_prob": True, "attention_bias": True},
    ),
    "qwen3_moe_tied": ("qwen3_moe", {**LLAMA, **QWEN3_MOE, "mlp_only_layers": [1], "tie_word_embeddings": True}),
    "deepseek_v2": ("deepseek_v2", {**DEEPSEEK, **YARN_MSCALE}),
    "deepseek_v2_lite": (
        "deepseek_v2",
        {
            **DEEPSEEK,
            "q_lora_rank": None,
            "topk_method": "group_limited_greedy",
            "n_group": 3,
            "topk_group": 2,
            "attention_bias": True,
            "routed_scaling_factor": 1.5,
        },
    ),
    "deepseek_v3": ("deepseek_v3", {**DEEPSEEK, **YARN_MSCALE, "n_group": 3, "topk_group": 2}),
    "deepseek_v3_halves": (
        "deepseek_v3",
        {
            **DEEPSEEK,
            "n_group": 1,
            "topk_group": 1,
            "rope_interleave": False,
            "norm_topk_prob": False,
            "tie_word_embeddings": True,
        },
    ),
    "opt_untied": ("opt", {**OPT, "enable_bias": False, "activation_function": "gelu", "tie_word_embeddings": False}),
}
CLASSES = {
    "llama": (transformers.LlamaConfig, transformers.LlamaForCausalLM),
    "mistral": (transformers.MistralConfig, transformers.MistralForCausalLM),
    "qwen2": (transformers.Qwen2Config, transformers.Qwen2ForCausalLM),
    "qwen3": (transformers.Qwen3Config, transformers.Qwen3ForCausalLM),
    "gpt2": (transformers.GPT2Config, transformers.GPT2LMHeadModel),
    "opt": (transformers.OPTConfig, transformers.OPTForCausalLM),
    "mixtral": (transformers.MixtralConfig, transformers.MixtralForCausalLM),
    "qwen3_moe": (transformers.Qwen3MoeConfig, transformers.Qwen3MoeForCausalLM),
    "deepseek_v2": (transformers.DeepseekV2Config, transformers.DeepseekV2ForCausalLM),
    "deepseek_v3": (transformers.DeepseekV3Config, transformers.DeepseekV3ForCausalLM),
}


def eager(family: str) -> dict[str, str]:
    """What makes transformers compute in plain PyTorch; its grouped products want sizes that are multiples of 8."""
    experts = (
        {"experts_implementation": "eager"}
        if "moe" in family or family in ("mixtral", "deepseek_v2", "deepseek_v3")
        else {}
    )
    return {"attn_implementation": "eager", **experts}


def theirs(case: str) -> nn.Module:
    """The transformers model of a case in eval mode, every parameter (norms and biases too) random."""
    family, fields = CASES[case]
    config_class, model_class = CLASSES[family]
    torch.manual_seed(0)
    model = model_class._from_config(config_class(**fields), **eager(family)).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            values = torch.randn(parameter.shape, generator=generator)
            is_norm = parameter.ndim == 1 and name.endswith("weight")
            parameter.copy_(1.0 + 0.3 * values if is_norm else 0.3 * values)
        for name, buffer in model.named_buffers():
            if name.endswith("e_score_correction_bias"):
                buffer.copy_(0.3 * torch.randn(buffer.shape, generator=generator))
    return model


def ours(folder: Path, **changes: Any) -> Decoder:
    """The decoder of a Hugging Face folder, with run-time fields changed."""
    model = build_model(resolve_model(ModelConfig(family="hf", path=str(folder), **changes)))
    load_hf_weights(folder, model.state_dict(), model.config)
    return model.eval()


def pair(case: str, folder: Path, **changes: Any) -> tuple[nn.Module, Decoder]:
    """Both models of a case with the same weights, which travel through `folder`."""
    reference = theirs(case)
    reference.save_pretrained(folder)
    return reference, ours(folder, **changes)


def gradients_by_our_name(reference: nn.Module, model: Decoder) -> dict[str, Tensor]:
    """Gradients of a transformers model, taken apart into our parameters."""
    grads = {name: parameter.grad for name, parameter in reference.named_parameters()}
    found = _expert_gradients(grads)
    for weight in FAMILIES[model.config.family].weights(model.config):
        if weight.ours in found or weight.ours.endswith("router.bias"):
            continue
        grad = grads[weight.theirs.replace("block_sparse_moe", "mlp")]
        grad = grad.t() if weight.transpose else grad
        found[weight.ours] = grad if weight.rows is None else grad[weight.rows[0] : weight.rows[1]]
    return found


def _expert_gradients(grads: dict[str, Tensor]) -> dict[str, Tensor]:
    """Those of the experts: in memory, transformers stacks them, gate and up in one tensor (files have one each)."""
    found = {}
    for name, grad in grads.items():
        ours = name.replace("model.layers", "blocks")
        if name.endswith("experts.gate_up_proj"):
            gate, up = grad.chunk(2, dim=1)
            found[ours.replace("gate_up_proj", "gate.weight")] = gate
            found[ours.replace("gate_up_proj", "up.weight")] = up
        elif name.endswith("experts.down_proj"):
            found[ours.replace("down_proj", "down.weight")] = grad
    return found
