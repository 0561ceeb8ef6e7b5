"""Causal attention by torch's scaled_dot_product_attention. Letters as in reference.py."""

from __future__ import annotations

import math
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from kernels.attention.reference import alibi_bias, visible

# Fastest first on Hopper and newer; the first that takes the dtype and shape is used. MATH, which stores all scores, is
# not among them: nothing would say so but time and memory. What only it could do, `obstacle` refuses.
CUDA_PRIORITY = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION]


def obstacle(device: torch.device, dtype: torch.dtype, head_dim: int, value_dim: int) -> str | None:
    """Why no fused kernel takes heads of these sizes; None: one does."""
    if device.type != "cuda":
        return None
    if dtype == torch.float64:
        return "has no CUDA kernel for fp64"
    multiple = 16 // dtype.itemsize  # rows of 16 bytes
    for size in (head_dim, value_dim):
        if size % multiple:
            return f"has no CUDA kernel for heads of {size} features in {dtype}, which must be a multiple of {multiple}"
    return None


def build_mask(
    seq_len: int,
    device: torch.device,
    dtype: torch.dtype,
    *,
    window: int | None = None,
    documents: Tensor | None = None,
    slopes: Tensor | None = None,
) -> Tensor | None:
    """The mask of `attention`, to be built once per forward pass; None when plain causal attention is all there is.

    Without slopes: bool [1 or B, 1, T, T]. With slopes [H] (ALiBi): added to the scores, `dtype` [1 or B, H, T, T].
    """
    if window is not None and window >= seq_len:
        window = None
    if window is None and documents is None and slopes is None:
        return None
    mask = visible(seq_len, device, window=window, documents=documents)
    if slopes is None:
        return mask
    return alibi_bias(seq_len, slopes)[None].masked_fill(~mask, -math.inf).to(dtype)


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """Attention of q [B, T, H, K] over k, v [B, T, G, K], scaled by K^-1/2. Returns [B, T, H, K].

    mask is what `build_mask` returned; None: plain causal attention.
    """
    q, k, v, how = _arguments(q, k, v, mask)
    with _priority(q):
        output = F.scaled_dot_product_attention(q, k, v, **how)
    return output.transpose(1, 2)


def backend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> str:
    """Which of torch's kernels `attention` of such tensors is, such as cudnn_attention."""
    q, k, v, how = _arguments(q, k, v, mask)
    with _priority(q):
        return SDPBackend(torch._fused_sdp_choice(q, k, v, **how)).name.lower()


def _priority(q: Tensor) -> AbstractContextManager[None]:
    return sdpa_kernel(CUDA_PRIORITY, set_priority=True) if q.is_cuda else nullcontext()


def _arguments(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor, dict[str, Any]]:
    """Of torch's function, with heads before tokens."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    grouped = q.shape[1] != k.shape[1]
    if grouped and q.is_cuda and (mask is not None or q.dtype == torch.float32):
        # Masks and fp32 are the memory-efficient kernel's, which wants a key head per query head: without them here,
        # torch would silently take the kernel that stores all T x T scores.
        k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
        grouped = False
    return q, k, v, {"attn_mask": mask, "is_causal": mask is None, "enable_gqa": grouped}
