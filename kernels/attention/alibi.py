"""ALiBi (Press et al., 2108.12409): no positions, a penalty on distance instead."""

from __future__ import annotations

import math
from functools import partial

import torch
from torch import Tensor

from kernels.constants import from_host


def slopes(num_heads: int, device: torch.device) -> Tensor:
    """Penalty per token of distance for each head, fp32 [num_heads].

    For a power of two n: 2^(-8/n), 2^(-16/n), ... Otherwise those of the next lower power of two, and then every other
    one of its double, as in the authors' code.
    """
    lower = 2 ** math.floor(math.log2(num_heads))
    values = [2.0 ** (-8.0 * (i + 1) / lower) for i in range(lower)]
    values += [2.0 ** (-8.0 * (2 * i + 1) / (2 * lower)) for i in range(num_heads - lower)]
    make = partial(torch.tensor, values, dtype=torch.float32, device="cpu")
    return from_host(("alibi", num_heads), make, device)
