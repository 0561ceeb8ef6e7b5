"""Causal attention by FlexAttention, which skips the blocks a window or document boundaries hide. CUDA only.

Letters as in reference.py.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import AuxRequest, BlockMask, create_block_mask, flex_attention

from kernels.attention.sinks import with_sinks


@cache
def _compiled() -> Any:
    # Eager flex_attention stores all scores. One compiled function serves every layer and survives between steps.
    return torch.compile(flex_attention)


MIN_HEAD_DIM = 16
"""Smallest size of a head that the compiled kernel multiplies."""


def obstacle(device: torch.device, head_dim: int, value_dim: int) -> str | None:
    """Why the compiled kernel, with its backward pass, cannot run; None: it can."""
    if device.type != "cuda":
        return f"does not run on {device.type}: FlexAttention has a backward pass on CUDA only"
    if min(head_dim, value_dim) < MIN_HEAD_DIM:
        return f"has no kernel for heads of {min(head_dim, value_dim)} features, fewer than {MIN_HEAD_DIM}"
    return None


def build_block_mask(
    seq_len: int, device: torch.device, *, window: int | None = None, documents: Tensor | None = None
) -> BlockMask:
    """The block mask of `attention`, to be built once per forward pass. documents: [B, T]."""

    def mask_mod(b: Tensor, h: Tensor, query: Tensor, key: Tensor) -> Tensor:
        mask = query >= key
        if window is not None:
            mask = mask & (key > query - window)  # see reference.visible
        if documents is not None:
            mask = mask & (documents[b, query] == documents[b, key])
        return mask

    batch = None if documents is None else documents.shape[0]
    return create_block_mask(mask_mod, batch, None, seq_len, seq_len, device=device)


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: BlockMask,
    slopes: Tensor | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """Attention of q [B, T, H, K] over k, v [B, T, G, K], scaled by K^-1/2; slopes [H] adds ALiBi, sinks [H] sinks.

    Returns [B, T, H, K].
    """
    if reason := obstacle(q.device, q.shape[-1], v.shape[-1]):
        raise ValueError(f"flex attention {reason}")

    def score_mod(score: Tensor, b: Tensor, h: Tensor, query: Tensor, key: Tensor) -> Tensor:
        assert slopes is not None  # the function is passed only then
        return score - slopes[h] * (query - key)

    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    options = {"score_mod": None if slopes is None else score_mod, "enable_gqa": q.shape[1] != k.shape[1]}
    if sinks is None:
        return _compiled()(q, k, v, block_mask=mask, **options).transpose(1, 2)
    output, aux = _compiled()(q, k, v, block_mask=mask, return_aux=AuxRequest(lse=True), **options)
    return with_sinks(output.transpose(1, 2), aux.lse, sinks)
