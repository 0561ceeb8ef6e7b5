"""Cross entropy of given logits, forward and backward together: what training needs of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.roofline.problem import Problem
from kernels.cross_entropy import cross_entropy, cross_entropy_in_place, loss_and_gradient_
from kernels.linear_cross_entropy import linear_cross_entropy


def eager(logits: Tensor, labels: Tensor) -> Tensor:
    """In fp32, as a trainer writes it."""
    return F.cross_entropy(logits.float(), labels, reduction="sum")


def liger() -> Callable[[Tensor, Tensor], Tensor] | None:
    """Writes the gradient over the logits as well."""
    try:
        from liger_kernel.ops.cross_entropy import LigerCrossEntropyFunction
    except ImportError:
        return None

    def function(logits: Tensor, labels: Tensor) -> Tensor:
        return LigerCrossEntropyFunction.apply(logits, labels, None, -100, 0.0, 0.0, "sum")[0]

    return function


def liger_linear() -> Callable[[Tensor, Tensor, Tensor], Tensor] | None:
    """Linear head and cross entropy, in chunks."""
    try:
        from liger_kernel.ops.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyFunction
    except ImportError:
        return None

    def function(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
        settings = (
            None,
            None,
            -100,
            0.0,
            0.0,
            "sum",
        )  # bias, class weights, ignore_index, z-loss, smoothing, reduction
        return LigerFusedLinearCrossEntropyFunction.apply(hidden, weight, labels, *settings)[0]

    return function


def both(function: Callable[..., Tensor], inputs: list[Tensor], *rest: Tensor) -> tuple[Tensor, ...]:
    """Loss and gradients."""
    loss = function(*inputs, *rest).sum()
    return loss.detach(), *torch.autograd.grad(loss, inputs)


def problems(device: torch.device) -> Iterator[Problem]:
    """Made one after the other, so that the memory of one is free before the next.

    Who writes over the logits reads its own gradient at the next call: the same traffic and arithmetic.
    """
    for rows, words in ((8192, 131072), (8192, 128256), (16384, 32768)):
        logits = torch.randn(rows, words, device=device, dtype=torch.bfloat16, requires_grad=True)
        labels = torch.randint(words, (rows,), device=device)
        size, shape = logits.numel() * 2, f"{rows}x{words}"
        functions: dict[str, Callable[..., Tensor] | None] = {
            "lattice": cross_entropy_in_place,
            "lattice keeping logits": cross_entropy,
            "eager": eager,
            "compile": torch.compile(eager, dynamic=False),
            "liger": liger(),
        }
        candidates = {name: partial(both, f, [logits], labels) for name, f in functions.items() if f is not None}
        yield Problem("cross_entropy", "both", shape, "bf16", 2 * size, candidates)
        scale = torch.ones((), device=device)
        forward: dict[str, Callable[[], Any]] = {
            "lattice": partial(cross_entropy, logits.detach(), labels),
            "eager": partial(eager, logits.detach(), labels),
        }
        yield Problem("cross_entropy", "forward", shape, "bf16", size, forward)
        chunk = {"lattice": partial(loss_and_gradient_, logits.detach(), labels, scale=scale)}
        yield Problem("cross_entropy", "chunk of a linear head", shape, "bf16", 2 * size, chunk)
        del logits, candidates, forward, chunk

    rows, hidden_size, words = 8192, 4096, 131072
    hidden, weight = (
        (torch.randn(n, hidden_size, device=device) / hidden_size**0.5).bfloat16().requires_grad_()
        for n in (rows, words)
    )
    labels = torch.randint(words, (rows,), device=device)
    functions = {
        "lattice": partial(linear_cross_entropy, triton=True),
        "compile": partial(linear_cross_entropy, compile=True),
        "liger": liger_linear(),
    }
    candidates = {name: partial(both, f, [hidden, weight], labels) for name, f in functions.items() if f is not None}
    size = 2 * (2 * hidden.numel() + 2 * weight.numel())
    flops = 6 * rows * hidden_size * words
    shape = f"{rows}x{hidden_size}x{words}"
    yield Problem("linear_cross_entropy", "both", shape, "bf16", size, candidates, flops)
