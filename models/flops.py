"""How large a model is and how much arithmetic a token costs."""

from __future__ import annotations

from math import prod

import torch

from models.config import ModelConfig
from models.decoder import Decoder
from models.speculator import Speculator


def num_parameters(config: ModelConfig) -> int:
    """Parameters of a resolved config; a tied table counts once."""
    return _sizes(config)[0]


def _sizes(config: ModelConfig) -> tuple[int, list[int]]:
    """Parameters of the model, and of each of its blocks."""
    if (key := repr(config)) not in _KNOWN:
        with torch.device("meta"):
            decoder = Decoder(config)
        blocks = [sum(prod(p.shape) for p in block.parameters()) for block in decoder.blocks]
        _KNOWN[key] = sum(prod(parameter.shape) for parameter in decoder.parameters()), blocks
    return _KNOWN[key]


_KNOWN: dict[str, tuple[int, list[int]]] = {}
"""By configuration: building even on meta takes a while, and a search of layouts asks often for one model."""


def flops_per_token(config: ModelConfig, seq_len: int, *, frozen: bool = False) -> int:
    """Floating-point operations of forward and backward per token, in sequences of seq_len: what MFU counts.

    6 N + 12 H K sum_l T_l (PaLM, 2204.02311, appendix B): N parameters that multiply a token (of experts, those it is
    sent to), each 2 operations forward and 4 backward, and the scores and sums of attention in layer l as if every
    token saw all T others, as is customary, or the sliding window of that layer; 2 K stands for a head's query and
    value features, where they differ. Tables that are looked up and not multiplied are left out of N: learned
    positions, and input embeddings that are not also the head. Multi-token prediction uses the head once more for each
    of its blocks. Where heads are trained for a model that stays as it is: its forward pass, and what heads take.
    frozen: adapters are trained beside it, so no weight gets a gradient, 4 N; adapters are not counted.
    """
    multiplied, attention = _flops(config, frozen)
    seen = sum(min(seq_len, config.window_of(layer) or seq_len) for layer in range(config.num_blocks))
    if config.speculator.kind != "none":
        return (multiplied + attention * seen) // 3 + _flops_of_heads(config, attention * seq_len)
    return multiplied + attention * seen


def causal_flops_per_token(config: ModelConfig, seq_len: int, *, frozen: bool = False) -> float:
    """`flops_per_token` with the other convention for attention: a token's own place and those before it that it sees,
    on average over the sequence; about half."""
    multiplied, attention = _flops(config, frozen)
    windows = (min(seq_len, config.window_of(layer) or seq_len) for layer in range(config.num_blocks))
    found = multiplied + attention * sum(w - w * (w - 1) / (2 * seq_len) for w in windows)
    if config.speculator.kind != "none":
        return found / 3 + _flops_of_heads(config, round(attention * (seq_len + 1) / 2))
    return found


def multiplications_of_layers(config: ModelConfig, seq_len: int) -> list[float]:
    """Of a token's forward pass in each of the config.num_layers blocks, on average over a causal sequence of seq_len:
    what pipeline stages are balanced by. Experts that a token is not sent to cost nothing."""
    assert config.head_dim is not None  # resolved
    assert config.value_dim is not None
    costs = [0.0] * config.num_layers
    sizes = _sizes(config)[1]
    for layer in range(config.num_layers):
        window = min(seq_len, config.window_of(layer) or seq_len)
        seen = window - window * (window - 1) / (2 * seq_len)
        multiplied = sizes[layer] - _idle(config, layer)
        costs[layer] = multiplied + config.num_heads * (config.head_dim + config.value_dim) * seen
    return costs


def _flops_of_heads(config: ModelConfig, attention: int) -> int:
    """Of model.speculator: 6 N, and for EAGLE attention in its block and the model's output layer, whose weight gets no
    gradient."""
    with torch.device("meta"):
        heads = Speculator(config.speculator, config)
    multiplied = 6 * sum(prod(parameter.shape) for parameter in heads.parameters() if parameter.ndim > 1)
    if config.speculator.kind == "medusa":
        return multiplied
    return multiplied + attention + 4 * config.vocab_size * config.hidden_size


def _idle(config: ModelConfig, layer: int) -> int:
    """Parameters of a layer's experts that a token is not sent to."""
    if not config.moe.in_layer(layer):
        return 0
    return (config.moe.num_experts - config.moe.top_k) * 3 * config.hidden_size * config.moe.intermediate_size


def _flops(config: ModelConfig, frozen: bool) -> tuple[int, int]:
    """Of a token in all matrix products but attention's, and of attention per place that it looks at in a layer."""
    assert config.head_dim is not None  # resolved
    assert config.value_dim is not None
    lookup = 0 if config.tie_embeddings else config.vocab_size * config.hidden_size
    if config.positions == "learned":
        lookup += config.max_seq_len * config.hidden_size
    idle = sum(_idle(config, layer) for layer in range(config.num_blocks))
    multiplied = num_parameters(config) - lookup - idle + config.mtp.depth * config.vocab_size * config.hidden_size
    return (4 if frozen else 6) * multiplied, 6 * config.num_heads * (config.head_dim + config.value_dim)
