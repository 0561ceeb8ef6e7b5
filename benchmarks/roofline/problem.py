"""One measured problem: an op in one shape and direction, and everybody who can compute it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

NAMES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}


@dataclass(frozen=True)
class Problem:
    """The floor is max(bytes / copy rate, flops / matrix rate)."""

    op: str  # as its folder in kernels/
    direction: str  # forward, backward or both
    shape: str  # as people write it: 32768x4096
    dtype: str
    bytes: int  # that must move: each input read once, each output written once
    candidates: Mapping[str, Callable[[], Any]]  # lattice, eager, compile, liger, cudnn, ...
    flops: int = 0  # of matrix products; 0 where memory is the limit
    matrix: str = "bf16"  # whose rate is the ceiling of flops: bf16 or fp8


def both_directions(
    op: str,
    shape: str,
    functions: Mapping[str, Callable[..., Tensor]],
    inputs: Sequence[Tensor],
    *,
    bytes: tuple[int, int],
    flops: tuple[int, int] = (0, 0),
) -> Iterator[Problem]:
    """Forward and backward of functions of one output. bytes, flops: of forward, of backward."""
    outputs = {name: function(*inputs) for name, function in functions.items()}
    smooth = [x for x in inputs if x.requires_grad]
    d_y = torch.randn_like(next(iter(outputs.values())))
    plain = [x.detach() for x in inputs]
    dtype = NAMES[inputs[0].dtype]
    forward = {name: partial(function, *plain) for name, function in functions.items()}
    yield Problem(op, "forward", shape, dtype, bytes[0], forward, flops[0])
    backward = {name: partial(torch.autograd.grad, y, smooth, d_y, retain_graph=True) for name, y in outputs.items()}
    yield Problem(op, "backward", shape, dtype, bytes[1], backward, flops[1])
