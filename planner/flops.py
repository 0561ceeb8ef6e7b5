"""FLOPs of a token by operator. Their sum is models.flops.flops_per_token, what the trainer logs and MFU counts."""

from __future__ import annotations

from models.config import ModelConfig
from planner.shapes import Parameter, parameters_of

OPERATORS = {
    "q": "attention projections", "k": "attention projections", "v": "attention projections",
    "qkv": "attention projections", "o": "attention projections", "q_a": "attention projections",
    "q_b": "attention projections", "kv_a": "attention projections", "kv_b": "attention projections",
    "gate": "mlp", "up": "mlp", "gate_up": "mlp", "down": "mlp",
    "router": "router", "head": "head", "project": "multi-token prediction",
}  # fmt: skip
"""By name of the layer; experts apart, all else is norms and biases."""


def flops_by_operator(model: ModelConfig, seq_len: int) -> dict[str, float]:
    """Of forward and backward of a token, by the conventions of models/flops.py: 6 for each weight that multiplies it,
    attention as if a token saw all others."""
    assert model.head_dim is not None  # resolved
    assert model.value_dim is not None
    found: dict[str, float] = {}
    for parameter, count in parameters_of(model, None, tp=1).items():
        if (operator := operator_of(parameter, model)) is not None:
            found[operator] = found.get(operator, 0) + 6 * count * used_elements(parameter, model)
    if model.tie_embeddings:
        found["head"] = 6.0 * model.vocab_size * model.hidden_size
    if model.mtp.depth:
        found["head"] += 6.0 * model.mtp.depth * model.vocab_size * model.hidden_size
    seen = sum(min(seq_len, model.window_of(layer) or seq_len) for layer in range(model.num_blocks))
    found["attention"] = 6.0 * model.num_heads * (model.head_dim + model.value_dim) * seen
    return found


def operator_of(parameter: Parameter, model: ModelConfig) -> str | None:
    """What a parameter is multiplied in; None for tables that are looked up."""
    if parameter.name.startswith(("embedding.", "positions.")):
        return None
    if parameter.is_expert:
        return "experts"
    layer, kind = parameter.name.split(".")[-2:]
    return OPERATORS.get(layer, "norms and biases") if kind == "weight" else "norms and biases"


def used_elements(parameter: Parameter, model: ModelConfig) -> int:
    """Elements of a parameter that work on a token: of experts, those it is sent to."""
    if not parameter.is_expert:
        return parameter.shape.numel()
    return parameter.shape.numel() // model.moe.num_experts * model.moe.top_k
