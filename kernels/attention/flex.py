"""Causal attention by FlexAttention, which skips the blocks a window or document boundaries hide. CUDA only.

Letters as in reference.py.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention


@cache
def _compiled() -> Any:
    # Eager flex_attention stores all scores. One compiled function serves every layer and survives between steps.
    return torch.compile(flex_attention)


def require_cuda(device: torch.device) -> None:
    """Raise ValueError unless `device` can run the compiled kernel with its backward pass."""
    if device.type != "cuda":
        raise ValueError(
            f"model.attention=flex does not run on {device.type}: FlexAttention has a backward pass on CUDA only; "
            "use model.attention=auto, sdpa or reference"
        )


def build_block_mask(
    seq_len: int, device: torch.device, *, window: int | None = None, documents: Tensor | None = None
) -> BlockMask:
    """The block mask of `attention`, to be built once per forward pass. documents: [B, T]."""
    require_cuda(device)

    def mask_mod(b: Tensor, h: Tensor, query: Tensor, key: Tensor) -> Tensor:
        mask = query >= key
        if window is not None:
            mask = mask & (key > query - window)  # see reference.visible
        if documents is not None:
            mask = mask & (documents[b, query] == documents[b, key])
        return mask

    batch = None if documents is None else documents.shape[0]
    return create_block_mask(mask_mod, batch, None, seq_len, seq_len, device=device)


def attention(q: Tensor, k: Tensor, v: Tensor, mask: BlockMask, slopes: Tensor | None = None) -> Tensor:
    """Attention of q [B, T, H, K] over k, v [B, T, G, K], scaled by K^-1/2; slopes [H] adds ALiBi.

    Returns [B, T, H, K].
    """
    require_cuda(q.device)

    def score_mod(score: Tensor, b: Tensor, h: Tensor, query: Tensor, key: Tensor) -> Tensor:
        assert slopes is not None  # the function is passed only then
        return score - slopes[h] * (query - key)

    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    output = _compiled()(
        q, k, v, block_mask=mask, score_mod=None if slopes is None else score_mod, enable_gqa=q.shape[1] != k.shape[1]
    )
    return output.transpose(1, 2)
