"""Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC'11) in plain PyTorch.

A counter-based generator has no state: it encrypts a counter under a key. Here the key is the seed (64 bits) and the
counter is (index, stream), 64 bits each, so every (seed, stream, index) has its own 128 random bits, and any slice of a
stream can be had without what comes before it. That is what makes weights and dropout independent of the layout.

All functions are elementwise and allocate no state; they run eagerly and under `torch.compile(fullgraph=True)`.
"""

from __future__ import annotations

import hashlib
import math
from typing import cast

import torch
from torch import Tensor

Word = int | Tensor
"""32 bits, held in a Python int or in an int64 tensor with values in [0, 2^32)."""

ROUNDS = 10
MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
KEY_INCREMENTS = (0x9E3779B9, 0xBB67AE85)  # golden ratio and sqrt(3) - 1, as 32-bit fractions
MASK_16 = 0xFFFF
MASK_32 = 0xFFFFFFFF

# ln m = 2 atanh(s) = 2 s (1 + s^2/3 + s^4/5 + ...) with |s| < 0.172, and the Maclaurin series of cos on [-pi, pi]:
# cut where the rest is below 1e-10, which is 600 times finer than the fp32 that the result is rounded to.
LOG_SERIES = tuple(2.0 / (2 * k + 1) for k in range(8))
COS_SERIES = tuple((-1) ** k / math.factorial(2 * k) for k in range(13))


def philox4x32(counter: tuple[Word, Word, Word, Word], key: tuple[Word, Word]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Four random 32-bit words for each counter: ten rounds of Philox-4x32 (SC'11, section 3.4).

    Counter and key words broadcast against each other; at least one counter word is a tensor. The words returned are
    int64 tensors of the broadcast shape with values in [0, 2^32), the same on every device.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(ROUNDS):
        high0, low0 = _multiply(c0, MULTIPLIERS[0])
        high1, low1 = _multiply(c2, MULTIPLIERS[1])
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0 = (k0 + KEY_INCREMENTS[0]) & MASK_32
        k1 = (k1 + KEY_INCREMENTS[1]) & MASK_32
    return cast(tuple[Tensor, Tensor, Tensor, Tensor], (c0, c1, c2, c3))


def _multiply(word: Word, multiplier: int) -> tuple[Word, Word]:
    """(high, low) 32 bits of word * multiplier.

    The multiplier goes in by halves of 16 bits. The whole product would need 64 unsigned bits, and overflow of int64
    is undefined in the C++ that torch.compile emits: its compiler may drop the mask of the high word.
    """
    low = word * (multiplier & MASK_16)  # < 2^48
    high = word * (multiplier >> 16) + (low >> 16)  # < 2^49
    return high >> 16, ((high & MASK_16) << 16) | (low & MASK_16)


@torch.compiler.assume_constant_result  # a hash cannot be traced, and its argument is a guarded constant
def stream_id(stream: str | int) -> int:
    """64-bit number of a stream: an int is its own, a string has the first 8 bytes of its SHA-256, everywhere."""
    if isinstance(stream, str):
        return int.from_bytes(hashlib.sha256(stream.encode()).digest()[:8], "little")
    if not 0 <= stream < 2**64:
        raise ValueError(f"stream={stream} is not an unsigned 64-bit number; use 0 <= stream < 2**64, or a string")
    return stream


def _words(seed: int, stream: str | int, index: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The 128 random bits of (seed, stream, index) as four words of index's shape."""
    if index.dtype != torch.int64:
        raise TypeError(f"index has dtype {index.dtype}; random numbers are indexed by torch.int64")
    if not 0 <= seed < 2**64:
        raise ValueError(f"seed={seed} is not an unsigned 64-bit number; use 0 <= seed < 2**64")
    number = stream_id(stream)
    # The shift of a negative index extends its sign: the mask makes the high word unsigned again.
    counter = (index & MASK_32, (index >> 32) & MASK_32, number & MASK_32, number >> 32)
    return philox4x32(counter, (seed & MASK_32, seed >> 32))


def uniform(seed: int, stream: str | int, index: Tensor) -> Tensor:
    """fp32 in [0, 1), a multiple of 2^-24, for each element of index (int64, any value: 64 bits count).

    A pure function of (seed, stream, index), bit for bit the same on every device. Raises ValueError for a seed or
    stream outside 64 bits and TypeError for another dtype of index.
    """
    word = _words(seed, stream, index)[0]
    return (word >> 8).to(torch.float32) * 2.0**-24


def four_uniforms(seed: int, stream: str | int, index: Tensor) -> Tensor:
    """Four numbers as of `uniform` for each element of index, in a last dim, of which the first is `uniform`'s own.

    For a quarter of the time and memory, where as many are wanted.
    """
    words = _words(seed, stream, index)
    return torch.stack([(word >> 8).to(torch.float32) * 2.0**-24 for word in words], dim=-1)


def normal(seed: int, stream: str | int, index: Tensor) -> Tensor:
    """Standard normal in fp32 for each element of index (int64, any value); same arguments and errors as `uniform`.

    Box and Muller (1958): sqrt(-2 ln u) cos(2 pi v), u in (0, 1] and v in [-1/2, 1/2) of 32 bits each, so |z| < 6.67.
    A library's log and cos differ between devices, and between the vector body and the scalar tail of one loop, which
    would make a value depend on how the work was cut. Here they are series of additions, products and one division in
    fp64, which IEEE 754 rounds the same everywhere: eager results are bit for bit the same on every device.
    """
    first, second, _, _ = _words(seed, stream, index)
    minus_log = -_log((first + 1).to(torch.float64) * 2.0**-32)
    angle = (second - 2**31).to(torch.float64) * (math.pi * 2.0**-31)  # [-pi, pi)
    return (torch.sqrt(minus_log + minus_log) * _series(COS_SERIES, angle * angle)).to(torch.float32)


def _log(x: Tensor) -> Tensor:
    """Natural logarithm of fp64 x in (0, 1], to 1e-10 relative, from correctly rounded operations only."""
    # x = mantissa 2^exponent from the bits of the number: torch.frexp does not compile for CPU (torch 2.13).
    bits = x.view(torch.int64)
    mantissa = ((bits & (2**52 - 1)) | (1023 << 52)).view(torch.float64)  # [1, 2)
    large = mantissa > math.sqrt(2.0)
    mantissa = torch.where(large, mantissa * 0.5, mantissa)  # [sqrt(1/2), sqrt(2)]
    exponent = ((bits >> 52) - 1023).to(torch.float64)
    exponent = torch.where(large, exponent + 1.0, exponent)
    s = (mantissa - 1.0) / (mantissa + 1.0)
    return exponent * math.log(2.0) + s * _series(LOG_SERIES, s * s)


def _series(coefficients: tuple[float, ...], x: Tensor) -> Tensor:
    """sum_k coefficients[k] x^k by Horner's rule; product and sum are two operations, so that no device fuses them."""
    result = torch.full_like(x, coefficients[-1])
    for coefficient in reversed(coefficients[:-1]):
        result = result * x + coefficient
    return result
