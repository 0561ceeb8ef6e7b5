"""Attention of Llama-3-8B and -1B: causal, with a window, with documents.

Every problem counts the products of the pairs of query and key that see each other, no others.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import flex_attention

from benchmarks.roofline.problem import Problem, both_directions
from kernels.attention import flex, fused

SHAPES = [(2, 8192, 32, 8, 128), (4, 4096, 32, 8, 64)]  # B, T, H, G, K
WINDOW = 1024
MEAN_DOCUMENT = 1024


def documents_of(batch: int, tokens: int) -> Tensor:
    """int32 [B, T]: documents whose lengths are exponential with a mean of MEAN_DOCUMENT."""
    starts = torch.rand(batch, tokens, generator=torch.Generator().manual_seed(0)) < 1 / MEAN_DOCUMENT
    return starts.cumsum(dim=1).int()


def pairs_seen(documents: Tensor, window: int | None) -> int:
    """Of query and key in all rows of documents [B, T], under a causal mask."""
    tokens = torch.arange(documents.shape[1])
    first = torch.searchsorted(documents, documents)
    if window is not None:
        first = torch.maximum(first, tokens - window + 1)
    return int((tokens - first + 1).sum())


def _sdpa(q: Tensor, k: Tensor, v: Tensor, *, backend: SDPBackend) -> Tensor:
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    with sdpa_kernel(backend):
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).transpose(1, 2)


def _flex(q: Tensor, k: Tensor, v: Tensor, *, compiled: Any, mask: Any) -> Tensor:
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return compiled(q, k, v, block_mask=mask, enable_gqa=True).transpose(1, 2)


def _lattice(q: Tensor, k: Tensor, v: Tensor, *, mask: Any) -> Tensor:
    return fused.attention(q, k, v, mask)[0]


def problems(device: torch.device) -> Iterator[Problem]:
    """Made one after the other, so that the memory of one is free before the next."""
    for B, T, H, G, K in SHAPES:
        for name, window, documents in [
            ("causal", None, None),
            (f"window {WINDOW}", WINDOW, None),
            ("documents", None, documents_of(B, T)),
        ]:
            pairs = pairs_seen(torch.zeros(B, T, dtype=torch.int32) if documents is None else documents, window)
            choice: dict[str, Any] = {
                "window": window,
                "documents": None if documents is None else documents.to(device),
            }
            # Static shapes: a second one would otherwise be compiled for any.
            compiled = torch.compile(flex_attention, dynamic=False)
            functions: dict[str, Callable[..., Tensor]] = {
                "lattice": partial(_lattice, mask=fused.build_mask(T, device, **choice)),
                "flex": partial(_flex, compiled=compiled, mask=flex.build_block_mask(T, device, **choice)),
            }
            if window is None and documents is None:
                functions["cudnn"] = partial(_sdpa, backend=SDPBackend.CUDNN_ATTENTION)
                functions["flash"] = partial(_sdpa, backend=SDPBackend.FLASH_ATTENTION)
            inputs = [
                torch.randn(B, T, heads, K, device=device, dtype=torch.bfloat16, requires_grad=True)
                for heads in (H, G, G)
            ]
            queries, keys = (x.numel() * x.element_size() for x in inputs[:2])
            yield from both_directions(
                "attention",
                f"{name} B{B} T{T} H{H}/{G} K{K}",
                functions,
                inputs,
                bytes=(2 * queries + 2 * keys, 4 * queries + 4 * keys),
                flops=(4 * H * K * pairs, 10 * H * K * pairs),
            )
