"""Split backward: linear layers that put their weight gradient off (2401.10241, section 2).

A backward pass that only hands gradients on to the previous stage shortens the pipeline's critical path; the weight
gradients, half of the work, fill what would be idle time. In a deferring layer autograd computes the gradient of the
input alone, and (input, gradient of the output) are kept until `WeightGradients.run`. Norm weights and tables, whose
gradients cost next to nothing, are not put off. No graph is walked twice and nothing is recomputed.

The store is a side effect of backward, which torch.compile cannot see: blocks are not compiled with it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Key = tuple[int, int]
"""Stage and micro-batch."""

Deliver = Callable[[nn.Parameter, Tensor], None]
"""Takes a finished gradient [shape of the parameter], to be added to what the parameter has."""


class WeightGradients:
    """Weight gradients that are still to be computed, by stage and micro-batch."""

    def __init__(self) -> None:
        self._collecting: Key | None = None
        self._waiting: dict[Key, list[tuple[nn.Linear, Tensor, Tensor]]] = {}

    @contextmanager
    def collect(self, key: Key) -> Iterator[None]:
        """Deferring layers put their weight gradients off while this lasts; otherwise they do not."""
        self._collecting, self._waiting[key] = key, []
        try:
            yield
        finally:
            self._collecting = None

    @property
    def collecting(self) -> bool:
        return self._collecting is not None

    def add(self, layer: nn.Linear, inputs: Tensor, grad_output: Tensor) -> None:
        """inputs [..., in], grad_output [..., out]."""
        assert self._collecting is not None
        self._waiting[self._collecting].append((layer, inputs, grad_output))

    @torch.no_grad()
    def run(self, key: Key, deliver: Deliver) -> None:
        """Compute what was put off under this key."""
        for layer, inputs, grad_output in self._waiting.pop(key):
            flat = grad_output.flatten(0, -2)
            deliver(layer.weight, flat.T @ inputs.flatten(0, -2))  # type: ignore[arg-type]
            if layer.bias is not None:
                deliver(layer.bias, flat.sum(0))


class _DeferringLinear(torch.autograd.Function):
    """y = x W^T + b."""

    @staticmethod
    def forward(
        ctx: Any, inputs: Tensor, weight: Tensor, bias: Tensor | None, layer: nn.Linear, store: WeightGradients
    ) -> Tensor:
        ctx.save_for_backward(inputs, weight)
        ctx.layer, ctx.store = layer, store
        return F.linear(inputs, weight, bias)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        inputs, weight = ctx.saved_tensors
        grad_input = grad_output @ weight
        if ctx.store.collecting:
            ctx.store.add(ctx.layer, inputs, grad_output)
            return grad_input, None, None, None, None
        flat = grad_output.flatten(0, -2)
        grad_bias = flat.sum(0) if ctx.needs_input_grad[2] else None
        return grad_input, flat.T @ inputs.flatten(0, -2), grad_bias, None, None


def defer_weight_gradients(blocks: nn.Module) -> WeightGradients:
    """Make every nn.Linear in `blocks` able to put its weight gradient off, in place; the store they share."""
    store = WeightGradients()

    def forward(inputs: Tensor, *, layer: nn.Linear) -> Tensor:
        return _DeferringLinear.apply(inputs, layer.weight, layer.bias, layer, store)  # type: ignore[no-any-return]

    for module in blocks.modules():
        if type(module) is nn.Linear:
            module.forward = partial(forward, layer=module)  # type: ignore[method-assign]
    return store
