"""One measured problem: an op in one shape and direction, and everybody who can compute it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
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
    tuned: str | None = None  # "module:NAME" of the kernels.backend.Tuned that lattice chooses its configuration from


def both_directions(
    op: str,
    shape: str,
    functions: Mapping[str, Callable[..., Any]],
    inputs: Sequence[Tensor],
    *,
    bytes: tuple[int, int],
    flops: tuple[int, int] = (0, 0),
    tuned: tuple[str | None, str | None] = (None, None),
) -> Iterator[Problem]:
    """Forward and backward of functions of one output or several. bytes, flops, tuned: of forward, of backward.

    Every candidate has inputs and gradients of its own, with the same numbers, because some overwrite theirs, and makes
    them at its first call, so that one that fails does not take the others with it.
    """
    dtype = NAMES[inputs[0].dtype]
    for number, (direction, kind) in enumerate((("forward", Forward), ("backward", Backward))):
        candidates = {name: kind(function, inputs) for name, function in functions.items()}
        yield Problem(op, direction, shape, dtype, bytes[number], candidates, flops[number], tuned=tuned[number])


def forward_only(
    op: str,
    shape: str,
    functions: Mapping[str, Callable[..., Any]],
    inputs: Sequence[Tensor],
    *,
    bytes: int,
    flops: int = 0,
    matrix: str = "bf16",
    tuned: str | None = None,
) -> Problem:
    """Of functions without a gradient."""
    candidates = {name: Forward(function, inputs) for name, function in functions.items()}
    return Problem(op, "forward", shape, NAMES[inputs[0].dtype], bytes, candidates, flops, matrix, tuned)


class Forward:
    """Calls a function without a gradient on its own copy of the inputs."""

    def __init__(self, function: Callable[..., Any], inputs: Sequence[Tensor]) -> None:
        self._function, self._inputs, self._copies = function, inputs, False

    def __call__(self) -> Any:
        if not self._copies:
            self._inputs, self._copies = [x.detach().clone() for x in self._inputs], True
        with torch.no_grad():
            return self._function(*self._inputs)


class Backward:
    """Calls the backward of a function; its forward runs at the first call."""

    def __init__(self, function: Callable[..., Any], inputs: Sequence[Tensor]) -> None:
        self._function, self._inputs = function, inputs
        self._graph: tuple[list[Tensor], list[Tensor], list[Tensor]] | None = None

    def __call__(self) -> tuple[Tensor, ...]:
        if self._graph is None:
            self._graph = self._forward()
        outputs, leaves, grads = self._graph
        return torch.autograd.grad(outputs, leaves, grads, retain_graph=True)

    def _forward(self) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        own = [x.detach().clone().requires_grad_(x.requires_grad) for x in self._inputs]
        # A view of a leaf, not the leaf: some functions overwrite their inputs, which autograd forbids for leaves.
        result = self._function(*(x.view_as(x) for x in own))
        outputs = [y for y in (result if isinstance(result, tuple) else (result,)) if y.requires_grad]
        generator = torch.Generator(own[0].device).manual_seed(0)
        grads = [torch.randn(y.shape, generator=generator, device=y.device).to(y.dtype) for y in outputs]
        return outputs, [x for x in own if x.requires_grad], grads
