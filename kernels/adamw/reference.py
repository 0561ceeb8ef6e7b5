"""AdamW in plain PyTorch, a tensor at a time."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.adamw.placement import ElementIndex
from kernels.adamw.quantized import QuantizedMoment
from kernels.philox import philox4x32

Moment = Tensor | QuantizedMoment


@dataclass(frozen=True)
class Rounding:
    """Stochastic rounding of one bf16 parameter. Filled by AdamWUpdate."""

    index: ElementIndex
    seed: int


def adamw_reference(
    parameter: Tensor,
    gradient: Tensor,
    exp_avg: Moment,
    exp_avg_sq: Moment,
    *,
    lr: float | Tensor,
    betas: tuple[float, float],
    eps: float,
    decay: float,
    step: Tensor,
    grad_scale: Tensor,
    rounding: Rounding | None = None,
) -> None:
    """One update in place (1711.05101, algorithm 2), computed in fp32, or in fp64 for an fp64 parameter.

    step: 0-d, the number of this update, from 1. grad_scale: 0-d, multiplies the gradient.
    """
    wide = torch.float64 if parameter.dtype == torch.float64 else torch.float32
    step, (beta1, beta2) = step.double(), betas
    g = gradient.to(wide) * grad_scale.to(wide)
    m, v = (x.values().view_as(g) if isinstance(x, QuantizedMoment) else x.to(wide) for x in (exp_avg, exp_avg_sq))
    m = torch.lerp(m, g, 1 - beta1)
    v = torch.lerp(v, g * g, 1 - beta2)
    for state, value in ((exp_avg, m), (exp_avg_sq, v)):
        if isinstance(state, QuantizedMoment):
            state.set(value.flatten())
        else:
            state.copy_(value)
    denominator = v.sqrt() / (1 - beta2**step).sqrt().to(wide) + eps
    p = parameter.to(wide) * (1 - lr * decay)
    p = p - (lr / (1 - beta1**step)).to(wide) * m / denominator
    if rounding is not None:
        p = stochastically_rounded(p, rounding, step)
    parameter.copy_(p)


def stochastically_rounded(x: Tensor, rounding: Rounding, step: Tensor) -> Tensor:
    """fp32 x to values that bf16 holds exactly, up or down with the probabilities that keep the expectation.

    Sixteen random bits are added to those that bf16 drops. Element e of the parameter takes bits 16 (e % 2) and on of
    word (e % 8) / 2 of Philox4x32 at counter (e / 8, step) under its key: the layout has no part in it.
    """
    index, size = rounding.index, x.numel()
    (n1, n2), (s0, s1) = index.sizes, index.strides
    i = torch.arange(size, device=x.device)
    e = index.first + i // (n1 * n2) * s0 + i // n2 % n1 * s1 + i % n2
    counter = e >> 3
    key = index.key(rounding.seed)
    zero = torch.zeros_like(counter)
    words = philox4x32(
        (counter & 0xFFFFFFFF, counter >> 32, zero + step.long(), zero), (key & 0xFFFFFFFF, (key >> 32) & 0xFFFFFFFF)
    )
    word = torch.stack(words).gather(0, (e % 8 // 2)[None])[0]
    random = (word >> (e % 2 * 16)) & 0xFFFF
    bits = x.contiguous().view(torch.int32).flatten().long()
    finite = bits & 0x7F800000 != 0x7F800000
    bits = (bits + torch.where(finite, random, 0)) & ~0xFFFF
    return bits.to(torch.int32).view(torch.float32).view_as(x)
