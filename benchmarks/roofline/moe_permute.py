"""Rows to experts and back, in a mixture of 128 experts with 8 choices per token."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

from benchmarks.roofline.problem import Problem
from kernels.moe_permute import permute, sort_by_expert, unpermute


def there_and_back(x: Tensor, weights: Tensor, experts: Tensor, num_experts: int) -> Tensor:
    """Ours."""
    order = sort_by_expert(experts, num_experts)
    return unpermute(permute(x, order), weights, order)


def eager(x: Tensor, weights: Tensor, experts: Tensor, num_experts: int) -> Tensor:
    """In plain PyTorch."""
    flat = experts.flatten()
    order = flat.argsort(stable=True)
    inverse = torch.empty_like(order).scatter_(0, order, torch.arange(flat.shape[0], device=x.device))
    rows = x[order // experts.shape[1]]
    return (rows[inverse].unflatten(0, experts.shape) * weights[..., None].to(x.dtype)).sum(1)


def backward(y: Tensor, inputs: list[Tensor], d_y: Tensor) -> tuple[Tensor, ...]:
    return torch.autograd.grad(y, inputs, d_y, retain_graph=True)


def problems(device: torch.device) -> Iterator[Problem]:
    """Made one after the other, so that the memory of one is free before the next."""
    num_experts, k = 128, 8
    for tokens, width in ((32768, 2048), (8192, 7168)):
        x = torch.randn(tokens, width, device=device, dtype=torch.bfloat16, requires_grad=True)
        weights = torch.rand(tokens, k, device=device, requires_grad=True)
        experts = torch.rand(tokens, num_experts, device=device).topk(k).indices
        shape = f"{tokens}x{width}, top {k} of {num_experts}"
        row, flat = tokens * width * 2, experts.numel() * 8
        functions = {
            "lattice": there_and_back,
            "eager": eager,
            "compile": torch.compile(eager, dynamic=False),
        }
        sorting = {
            "lattice": partial(sort_by_expert, experts, num_experts),
            "eager": partial(torch.argsort, experts.flatten(), stable=True),
        }
        yield Problem("moe_permute", "sort", shape, "int64", 2 * flat, sorting)
        forward = {
            name: partial(f, x.detach(), weights.detach(), experts, num_experts) for name, f in functions.items()
        }
        # x is read once where the cache holds it; rows are written and read; the result is written.
        yield Problem("moe_permute", "forward", shape, "bf16", (2 + 2 * k) * row + 2 * flat, forward)
        d_y = torch.randn_like(x)
        both = {
            name: partial(backward, f(x, weights, experts, num_experts), [x, weights], d_y)
            for name, f in functions.items()
        }
        # d_y and rows are read, d_rows written and read, d_x written.
        yield Problem("moe_permute", "backward", shape, "bf16", (2 + 3 * k) * row, both)
        del x, weights, experts, forward, both, d_y, sorting
