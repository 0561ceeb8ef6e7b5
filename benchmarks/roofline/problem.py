"""One measured problem: an op in one shape and direction, and everybody who can compute it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Problem:
    """The floor is max(bytes / copy rate, flops / matrix rate)."""

    op: str  # as its folder in kernels/
    direction: str  # forward, backward, or both
    shape: str  # as people write it: 32768x4096
    dtype: str
    bytes: int  # that must move: each input read once, each output written once
    flops: int  # of matrix products; 0 where memory is the limit
    candidates: dict[
        str, Callable[[], Any]
    ]  # lattice, eager, compile, liger, cudnn, ...: made anew inputs stay outside
    matrix: str = "bf16"  # whose rate is the ceiling of flops: bf16 or fp8
