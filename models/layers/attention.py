"""Self-attention of a block, and what all blocks share of it in one forward pass.

B batch, T tokens, D hidden_size, H query heads, G key/value heads, K head_dim.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from kernels.attention import flex, reference, sdpa
from kernels.attention.alibi import slopes as alibi_slopes
from models.config import ModelConfig
from models.layers import rope
from models.layers.dropout import Dropout


class Context(NamedTuple):
    """What every block of one forward pass needs besides its input; a pytree. Filled by `build_context`."""

    implementation: str  # reference, sdpa or flex
    cos: Tensor | None  # [B or 1, T, 1, K/2] fp32; None: no rope
    sin: Tensor | None
    mask: Any  # of layers without a window: None, Tensor (sdpa) or BlockMask (flex)
    window_mask: Any  # of layers with the window
    slopes: Tensor | None  # [H] fp32; None: no ALiBi
    documents: Tensor | None  # [B, T]
    samples: Tensor | None  # [B], the key of dropout
    aux_scale: Tensor | None = None  # 0-d, gradient of the training loss by auxiliary losses; filled by Decoder.forward


def choose_attention(config: ModelConfig, device: torch.device, *, documents: bool = False) -> str:
    """The implementation that runs: what model.attention=auto means on `device`, with or without document masks.

    On CUDA, flex where a window or documents leave most of the square empty, else sdpa; elsewhere sdpa. Raises
    ValueError for flex where it does not run.
    """
    if config.attention == "flex":
        flex.require_cuda(device)
    if config.attention != "auto":
        return config.attention
    sparse = documents or config.sliding_window is not None
    return "flex" if device.type == "cuda" and sparse else "sdpa"


def build_context(
    config: ModelConfig,
    *,
    seq_len: int,
    device: torch.device,
    dtype: torch.dtype,
    positions: Tensor | None,
    documents: Tensor | None,
    samples: Tensor | None,
) -> Context:
    """Tables and masks of a forward pass over sequences of seq_len; positions None: 0, 1, ... dtype: of activations."""
    if positions is None:
        positions = torch.arange(seq_len, device=device)[None]
    implementation = choose_attention(config, device, documents=documents is not None)
    slopes = alibi_slopes(config.num_heads, device) if config.positions == "alibi" else None
    cos = sin = None
    if config.positions == "rope":
        assert config.rotary_dim is not None  # resolved
        cos, sin = rope.tables(config.rope, config.rotary_dim, positions, seq_len)

    def build(window: int | None) -> Any:
        if implementation == "sdpa":
            return sdpa.build_mask(seq_len, device, dtype, window=window, documents=documents, slopes=slopes)
        if implementation == "flex":
            return flex.build_block_mask(seq_len, device, window=window, documents=documents)
        return None  # the reference makes its own

    windows = {config.window_of(layer) for layer in range(config.num_layers)}
    return Context(
        implementation=implementation,
        cos=cos,
        sin=sin,
        mask=build(None) if None in windows else None,
        window_mask=build(config.sliding_window) if config.sliding_window in windows - {None} else None,
        slopes=slopes,
        documents=documents,
        samples=samples,
    )


class Attention(nn.Module):
    """Causal self-attention with grouped key/value heads (GQA, 2305.13245). [B, T, D] to [B, T, D]."""

    def __init__(self, config: ModelConfig, layer: int, seed: int) -> None:
        super().__init__()
        assert config.head_dim is not None  # resolved
        assert config.num_kv_heads is not None
        self.head_dim = config.head_dim
        self.window = config.window_of(layer)
        inner, inner_kv = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
        self.q = nn.Linear(config.hidden_size, inner, bias=config.qkv_bias)
        self.k = nn.Linear(config.hidden_size, inner_kv, bias=config.qkv_bias)
        self.v = nn.Linear(config.hidden_size, inner_kv, bias=config.qkv_bias)
        self.o = nn.Linear(inner, config.hidden_size, bias=config.attention_bias)
        self.q_norm = nn.RMSNorm(config.head_dim, eps=config.norm_eps) if config.qk_norm else None
        self.k_norm = nn.RMSNorm(config.head_dim, eps=config.norm_eps) if config.qk_norm else None
        self.dropout = Dropout(
            config.attention_dropout,
            seed=seed,
            site=f"blocks.{layer}.attention.probabilities",
            max_seq_len=config.max_seq_len,
        )

    def forward(self, x: Tensor, context: Context) -> Tensor:
        B, T, _ = x.shape
        q, k, v = (project(x).view(B, T, -1, self.head_dim) for project in (self.q, self.k, self.v))
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        if context.cos is not None and context.sin is not None:
            q, k = rope.rotate(q, context.cos, context.sin), rope.rotate(k, context.cos, context.sin)
        return self.o(self._attend(q, k, v, context).reshape(B, T, -1))

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, context: Context) -> Tensor:
        """q [B, T, H, K] over k, v [B, T, G, K] by the implementation of the context. Returns [B, T, H, K]."""
        mask = context.mask if self.window is None else context.window_mask
        if context.implementation == "sdpa":
            return sdpa.attention(q, k, v, mask)
        if context.implementation == "flex":
            return flex.attention(q, k, v, mask, context.slopes)
        dropout = partial(self.dropout.on_probabilities, samples=context.samples) if self.dropout.active else None
        output, _ = reference.attention(
            q, k, v, window=self.window, documents=context.documents, slopes=context.slopes, dropout=dropout
        )
        return output
