"""NF4 in plain PyTorch. The layout is bitsandbytes', byte for byte, so that its checkpoints are read and written.

Blocks of 64 values share their largest magnitude; each value divided by it becomes the nearest of 16 numbers, at which
a normal distribution has equal shares. The magnitudes, less their mean, are quantized in turn, 256 with one scale, to
8 bits (1511.04561). A value costs 4.127 bits.
"""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

BLOCK = 64  # values that share a magnitude
GROUP = 256  # magnitudes that share a scale
SMALLEST = 1e-38  # a block of zeros is divided by this
LEVELS = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
    -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
    0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip


class NF4(NamedTuple):
    """A quantized tensor of n values, in the order of its memory."""

    packed: Tensor  # uint8 [n/2]: value 2i in the high half of byte i, value 2i + 1 in the low one
    magnitudes: Tensor  # uint8 [n/64], numbers in magnitude_levels()
    scales: Tensor  # fp32 [n/64/256]
    offset: Tensor  # fp32 []; the magnitude of block b is levels[magnitudes[b]] * scales[b / 256] + offset


@cache
def levels(device: torch.device) -> Tensor:
    """The 16 numbers, fp32."""
    return torch.tensor(LEVELS, device=device)


@cache
def bounds(device: torch.device) -> Tensor:
    """[15]: a number belongs to the level above the last bound that it exceeds."""
    return _between(levels(device))


@cache
def magnitude_levels(device: torch.device) -> Tensor:
    """The 256 numbers of bitsandbytes' signed dynamic map, ascending: with e = 0 to 6 and 2^e numbers for each e,
    +-10^(e - 6) times the midpoints of 2^e equal parts of [0.1, 1]; and 0 and 1."""
    numbers = [0.0, 1.0]
    for exponent in range(7):
        ends = torch.linspace(0.1, 1.0, 2**exponent + 1, dtype=torch.float32)
        positive = (10 ** (exponent - 6) * ((ends[:-1] + ends[1:]) / 2)).tolist()
        numbers += positive + [-number for number in positive]
    return torch.tensor(sorted(numbers), dtype=torch.float32, device=device)


def _between(ascending: Tensor) -> Tensor:
    return (ascending[:-1] + ascending[1:]) / 2


def quantize_values_reference(x: Tensor) -> tuple[Tensor, Tensor]:
    """(packed [n/2], fp32 magnitudes [n/64]) of a tensor of n values; an odd last one is followed by 0."""
    flat = x.flatten().float()
    blocks = F.pad(flat, (0, -len(flat) % BLOCK)).view(-1, BLOCK)
    largest = blocks.abs().amax(dim=1)
    shares = (blocks * (1.0 / largest.clamp(min=SMALLEST))[:, None]).clamp(-1.0, 1.0)
    codes = torch.bucketize(shares, bounds(x.device), out_int32=True).to(torch.uint8)
    pairs = codes.flatten()[: len(flat) + len(flat) % 2].view(-1, 2)
    return (pairs[:, 0] << 4) | pairs[:, 1], largest


def quantize_magnitudes(largest: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(magnitudes uint8 [b], scales [b/256], offset []) of fp32 magnitudes [b]. Few numbers: no kernel of its own."""
    offset = largest.mean() if len(largest) else largest.new_zeros(())
    groups = F.pad(largest - offset, (0, -len(largest) % GROUP)).view(-1, GROUP)
    scales = groups.abs().amax(dim=1)
    shares = (groups * (1.0 / scales.clamp(min=SMALLEST))[:, None]).clamp(-1.0, 1.0)
    codes = torch.bucketize(shares, _between(magnitude_levels(largest.device)), out_int32=True).to(torch.uint8)
    return codes.flatten()[: len(largest)], scales, offset


def quantize_nf4_reference(x: Tensor) -> NF4:
    """A tensor [...], quantized."""
    packed, largest = quantize_values_reference(x)
    return NF4(packed, *quantize_magnitudes(largest))


def dequantize_nf4_reference(
    packed: Tensor, magnitudes: Tensor, scales: Tensor, offset: Tensor, num_values: int, dtype: torch.dtype
) -> Tensor:
    """[n] of dtype: product and sum of the magnitude and product of the value each rounded in fp32, then to dtype."""
    codes = torch.stack([packed >> 4, packed & 15], dim=1).flatten()[:num_values]
    largest = magnitude_levels(packed.device)[magnitudes.long()] * scales.repeat_interleave(GROUP)[: len(magnitudes)]
    largest = largest + offset
    return (levels(packed.device)[codes.long()] * largest.repeat_interleave(BLOCK)[:num_values]).to(dtype)
