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

Deliver = Callable[[Tensor, Tensor], None]
"""Takes a parameter and a finished gradient of its shape, to be added to what the parameter has."""


class WeightGradients:
    """Weight gradients of deferring layers: computed at once, or kept by stage and micro-batch until `run`."""

    def __init__(self) -> None:
        self.deliver: Deliver | None = None  # filled by trainer/pipelined.py
        self._collecting: Key | None = None
        self._waiting: dict[Key, list[tuple[nn.Linear, Tensor, Tensor]]] = {}

    @contextmanager
    def collect(self, key: Key) -> Iterator[None]:
        """Backward passes put weight gradients off while this lasts; otherwise they compute them."""
        self._collecting, self._waiting[key] = key, []
        try:
            yield
        finally:
            self._collecting = None

    def add(self, layer: nn.Linear, inputs: Tensor, grad_output: Tensor) -> None:
        """inputs [..., in], grad_output [..., out]."""
        if self._collecting is None:
            self._compute(layer, inputs, grad_output)
        else:
            self._waiting[self._collecting].append((layer, inputs, grad_output))

    def run(self, key: Key) -> None:
        """Compute what was put off under this key, and free what it needed."""
        for layer, inputs, grad_output in self._waiting.pop(key):
            self._compute(layer, inputs, grad_output)

    @torch.no_grad()
    def _compute(self, layer: nn.Linear, inputs: Tensor, grad_output: Tensor) -> None:
        assert self.deliver is not None
        flat = grad_output.flatten(0, -2)
        for parameter, compute in (
            (layer.weight, lambda: flat.T @ inputs.flatten(0, -2)),
            (layer.bias, lambda: flat.sum(0)),
        ):
            if parameter is not None and parameter.requires_grad:
                self.deliver(parameter, compute())


class _DeferringLinear(torch.autograd.Function):
    """y = x W^T + b, of which autograd sees x alone: weight and bias get their gradients from the store."""

    @staticmethod
    def forward(ctx: Any, inputs: Tensor, layer: nn.Linear, store: WeightGradients) -> Tensor:
        ctx.save_for_backward(inputs)
        ctx.layer, ctx.store = layer, store
        return F.linear(inputs, layer.weight, layer.bias)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        (inputs,) = ctx.saved_tensors
        ctx.store.add(ctx.layer, inputs, grad_output)
        return grad_output @ ctx.layer.weight, None, None


def defer_weight_gradients(blocks: nn.Module) -> WeightGradients:
    """Make every nn.Linear in `blocks` put its weight gradient off on demand, in place; the store they share.

    Their inputs must need a gradient, as those inside a block do. Raises TypeError for a weight matrix in another kind
    of layer, which would be computed in the input pass and make the schedule's plan wrong.
    """
    store = WeightGradients()

    def forward(inputs: Tensor, *, layer: nn.Linear) -> Tensor:
        return _DeferringLinear.apply(inputs, layer, store)

    for name, module in blocks.named_modules():
        if type(module) is nn.Linear:
            module.forward = partial(forward, layer=module)  # type: ignore[method-assign]
        elif any(parameter.ndim > 1 for parameter in module.parameters(recurse=False)):
            raise TypeError(f"blocks.{name} ({type(module).__name__}) has weights whose gradient cannot be put off")
    return store
