"""LayerNorm on the widths of models that have it."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.roofline.peers import liger
from benchmarks.roofline.problem import Problem, both_directions
from kernels.layer_norm import layer_norm

EPS = 1e-5
TABLES = ("kernels.rms_norm.kernel:FORWARD", "kernels.rms_norm.kernel:BACKWARD")


def _eager(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], weight, bias, EPS)


def problems(device: torch.device) -> Iterator[Problem]:
    """Made one after the other, so that the memory of one is free before the next."""
    for rows, width in ((32768, 4096), (32768, 1600), (8192, 12288)):
        make = partial(torch.randn, device=device, dtype=torch.bfloat16, requires_grad=True)
        x, weight, bias = make(rows, width), make(width), make(width)
        functions = {
            "lattice": partial(layer_norm, eps=EPS),
            "eager": _eager,
            "compile": torch.compile(_eager, dynamic=False),
            **liger("layer_norm:LigerLayerNormFunction", EPS),
        }
        size = x.numel() * x.element_size()
        yield from both_directions(
            "layer_norm", f"{rows}x{width}", functions, (x, weight, bias), bytes=(2 * size, 3 * size), tuned=TABLES
        )
