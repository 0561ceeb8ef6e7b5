"""Sampling in plain PyTorch. R rows, V vocabulary."""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.philox import uniform

STREAMS = ("inference.sampling", "inference.sampling.low")
"""Of the upper and lower 24 bits of a random number."""


def sample_reference(logits: Tensor, temperature: Tensor | None, index: Tensor | None) -> tuple[Tensor, Tensor]:
    """Arguments and result as in op.sample_tokens."""
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    tokens = wide.argmax(-1)
    if temperature is not None and index is not None:
        divisor = torch.where(temperature > 0, temperature, 1.0)[:, None].to(wide.dtype)
        tokens = torch.where(temperature > 0, draw((wide / divisor).softmax(-1), index), tokens)
    return tokens, wide.log_softmax(-1).gather(-1, tokens[:, None])[:, 0]


def draw(p: Tensor, index: Tensor, streams: tuple[str, str] = STREAMS) -> Tensor:
    """A token of each row of p [R, V] in proportion to it: the first up to which more than a uniform share lies.

    In the order of the vocabulary whatever was filtered, in fp64, by a random number of 48 bits: Philox of index [R].
    """
    cumulative = p.to(torch.float64).cumsum(-1)
    share = uniform_48(streams, index)[:, None] * cumulative[:, -1:]
    return torch.searchsorted(cumulative, share, right=True)[:, 0].clamp(max=p.shape[1] - 1)  # a row of NaN finds none


def uniform_48(streams: tuple[str, str], index: Tensor) -> Tensor:
    """fp64 in [0, 1) for each element of index (int64): 48 bits, the upper half of the first stream."""
    high, low = (uniform(0, stream, index).to(torch.float64) for stream in streams)
    return high + low * 2.0**-24
