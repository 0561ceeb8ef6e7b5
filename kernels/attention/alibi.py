"""ALiBi (Press et al., 2108.12409): no positions, a penalty on distance instead."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def slopes(num_heads: int, device: torch.device) -> Tensor:
    """Penalty per token of distance for each head, fp32 [num_heads].

    For a power of two n: 2^(-8/n), 2^(-16/n), ... Otherwise those of the next lower power of two, and then every other
    one of its double, as in the authors' code.
    """
    lower = 2 ** math.floor(math.log2(num_heads))
    values = [2.0 ** (-8.0 * (i + 1) / lower) for i in range(lower)]
    values += [2.0 ** (-8.0 * (2 * i + 1) / (2 * lower)) for i in range(num_heads - lower)]
    # A blocking copy would wait for the device's queue.
    return torch.tensor(values, dtype=torch.float32, device="cpu").to(device, non_blocking=True)
