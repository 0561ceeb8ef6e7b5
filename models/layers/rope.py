"""Rotary position embedding (Su et al., 2104.09864) and its stretched variants."""

from __future__ import annotations

import math
from dataclasses import astuple

import torch
from torch import Tensor

from kernels.constants import from_host
from kernels.rows import each_row_off_gpu
from models.config import RopeConfig


def frequencies(rope: RopeConfig, head_dim: int, seq_len: int) -> tuple[Tensor, float]:
    """Angle per position of each pair of dimensions, fp32 [head_dim / 2] on the CPU, and the factor on cos and sin.

    Computed on the CPU on purpose: pow differs in the last bit between devices, and a position multiplies that error.
    seq_len matters to ntk only, which stretches as far as the sequence at hand needs.
    """
    theta = rope.theta
    if rope.scaling == "ntk":
        theta = _ntk_theta(rope, head_dim, seq_len)
    exponent = torch.arange(0, head_dim, 2, dtype=torch.float32, device="cpu") / head_dim
    inverse = 1.0 / theta**exponent
    if rope.scaling == "linear":
        return inverse / rope.factor, 1.0
    if rope.scaling == "llama3":
        return _llama3(rope, inverse), 1.0
    if rope.scaling == "yarn":
        return _yarn(rope, inverse, head_dim), _yarn_attention_factor(rope)
    return inverse, 1.0


def tables(
    rope: RopeConfig,
    head_dim: int,
    positions: Tensor,
    seq_len: int,
    known: tuple[Tensor, float] | None = None,
    *,
    batch_invariant: bool = False,
) -> tuple[Tensor, Tensor]:
    """cos and sin for positions [B or 1, T]: two fp32 tensors [B or 1, T, 1, head_dim / 2].

    known: `frequencies`, where somebody has kept them on the device. batch_invariant: a position's bits do not depend
    on the others (models/invariant.py).
    """
    inverse, factor = _on_device(rope, head_dim, seq_len, positions.device) if known is None else known
    angles = positions.to(torch.float32)[..., None, None] * inverse
    if batch_invariant:
        return each_row_off_gpu(torch.cos, angles) * factor, each_row_off_gpu(torch.sin, angles) * factor
    return angles.cos() * factor, angles.sin() * factor


def _on_device(rope: RopeConfig, head_dim: int, seq_len: int, device: torch.device) -> tuple[Tensor, float]:
    length = seq_len if rope.scaling == "ntk" else None
    key = ("rope", *astuple(rope), head_dim, length)
    inverse = from_host(key, lambda: frequencies(rope, head_dim, seq_len)[0], device)
    return inverse, _yarn_attention_factor(rope) if rope.scaling == "yarn" else 1.0


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x [B, T, H, K] with dimensions i and i + K/2 turned as a pair by the angles of `tables`, in fp32 (fp64 for fp64).

    Raises TypeError when the tables are not fp32: bf16 cannot tell positions above 256 apart.
    """
    if cos.dtype != torch.float32:
        raise TypeError(
            f"rope tables arrived as {cos.dtype}: something cast the inputs of the block; "
            "with FSDP use MixedPrecisionPolicy(cast_forward_inputs=False)"
        )
    first, second = (x if x.dtype == torch.float64 else x.float()).chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)


def _ntk_theta(rope: RopeConfig, head_dim: int, seq_len: int) -> float:
    """Dynamic NTK: the base that keeps the highest frequency and stretches the lowest to the length at hand."""
    length = max(seq_len, rope.original_max_seq_len)
    stretch = rope.factor * length / rope.original_max_seq_len - (rope.factor - 1.0)
    return rope.theta * stretch ** (head_dim / (head_dim - 2))


def _llama3(rope: RopeConfig, inverse: Tensor) -> Tensor:
    """Llama 3.1: waves longer than original / low_freq_factor are stretched, shorter than original / high_freq_factor
    are kept, and those between are blended by their number of turns over the original length."""
    turns = rope.original_max_seq_len * inverse / (2 * math.pi)
    blend = (turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
    kept = blend.clamp(0.0, 1.0)
    return (1.0 - kept) * inverse / rope.factor + kept * inverse


def _yarn(rope: RopeConfig, inverse: Tensor, head_dim: int) -> Tensor:
    """YaRN (Peng et al., 2309.00071, section 3.2): "NTK by parts", a ramp over dimensions from kept to stretched."""

    def dimension(turns: float) -> float:
        """Pair of dimensions that makes this many turns over the original length."""
        return head_dim * math.log(rope.original_max_seq_len / (turns * 2 * math.pi)) / (2 * math.log(rope.theta))

    low, high = dimension(rope.beta_fast), dimension(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    width = high - low if high != low else 0.001
    pairs = torch.arange(head_dim // 2, dtype=torch.float32, device="cpu")
    stretched = ((pairs - low) / width).clamp(0.0, 1.0)
    return stretched * inverse / rope.factor + (1.0 - stretched) * inverse


def _yarn_attention_factor(rope: RopeConfig) -> float:
    """Factor on cos and sin, so that logits grow by its square (2309.00071, eq. 22; mscale is DeepSeek's variant)."""
    if rope.attention_factor is not None:
        return rope.attention_factor

    def grow(scale: float) -> float:
        return 0.1 * scale * math.log(rope.factor) + 1.0 if rope.factor > 1 else 1.0

    if rope.mscale and rope.mscale_all_dim:
        return grow(rope.mscale) / grow(rope.mscale_all_dim)
    return grow(1.0)
