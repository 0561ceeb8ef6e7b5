"""Moments in 8 bits: a code per element and a scale per block of 256 elements (Dettmers et al., 2110.02861).

The code is a dynamic number: its leading one-bit is a decade, the bits after it divide the decade evenly. Code
q = 2^i + j, 0 <= j < 2^i, stands for

    10^(i - K) (0.1 + 0.9 (j + 1) / 2^i)        K = 6 with a sign (|q| <= 127), 7 without (q <= 255)

and 0 for 0, so that the largest code is exactly 1 and precision is best near it, yet seven decades are covered. An
element is its code's value times its block's largest magnitude. Against the map of the paper the ends of the intervals
are taken instead of their middles, which makes 1 and -1 exact, and the sign is symmetric.

A second moment that is not zero never gets code 0: its element would be divided by epsilon alone in the next step.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

BLOCK = 256
SMALLEST_SCALE = 1e-37
"""Blocks whose largest magnitude is below are 0: its reciprocal would overflow."""


@dataclass(frozen=True)
class QuantizedMoment:
    """A moment of n contiguous elements: codes [n] int8 (first) or uint8 (second), scales [n / 256] fp32."""

    codes: Tensor
    scales: Tensor

    @classmethod
    def zeros(cls, num_elements: int, *, signed: bool, device: torch.device | str = "cpu") -> QuantizedMoment:
        """A moment of 0, as it is before the first step."""
        codes = torch.zeros(num_elements, dtype=torch.int8 if signed else torch.uint8, device=device)
        return cls(codes, torch.zeros(-(-num_elements // BLOCK), dtype=torch.float32, device=device))

    def values(self) -> Tensor:
        """[n] fp32."""
        return dequantize(self.codes, self.scales)

    def set(self, values: Tensor) -> None:
        """Become the codes nearest to values [n]."""
        codes, scales = quantize(values, signed=self.codes.dtype == torch.int8)
        self.codes.copy_(codes)
        self.scales.copy_(scales)


@cache
def levels(*, signed: bool) -> Tensor:
    """[128] or [256] fp64, ascending: the value of each code without its sign."""
    largest = 6 if signed else 7
    codes = torch.arange(1, 2 ** (largest + 1), dtype=torch.float64)
    decade = codes.log2().floor()
    positive = 10.0 ** (decade - largest) * (0.9 * (codes + 1) / 2**decade - 0.8)
    return torch.cat([positive.new_zeros(1), positive])


def quantize(values: Tensor, *, signed: bool) -> tuple[Tensor, Tensor]:
    """(codes [n] int8 or uint8, scales [n / 256] fp32) nearest to values [n] (not signed: >= 0)."""
    n = values.numel()
    blocks = torch.nn.functional.pad(values.float(), (0, -n % BLOCK)).view(-1, BLOCK)
    scales = blocks.abs().amax(1)
    scales = torch.where(scales > SMALLEST_SCALE, scales, 0.0)
    relative = (blocks.abs() / torch.where(scales > 0, scales, torch.inf)[:, None]).flatten()[:n]
    table = levels(signed=signed).to(values.device)
    codes = torch.bucketize(relative.double(), (table[1:] + table[:-1]) / 2)
    if signed:
        return torch.where(values < 0, -codes, codes).to(torch.int8), scales
    return torch.where(relative > 0, codes.clamp(min=1), codes).to(torch.uint8), scales


def dequantize(codes: Tensor, scales: Tensor) -> Tensor:
    """[n] fp32 from codes [n] and scales [n / 256]."""
    signed = codes.dtype == torch.int8
    numbers = codes.to(torch.int64)
    values = levels(signed=signed).to(codes.device, torch.float32)[numbers.abs()] * numbers.sign()
    return values * scales.repeat_interleave(BLOCK)[: codes.numel()]
