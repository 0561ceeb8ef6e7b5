"""Cross entropy of given logits, forward and backward together: what training needs of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.roofline.peers import liger
from benchmarks.roofline.problem import Problem
from kernels.cross_entropy import cross_entropy, cross_entropy_in_place, loss_and_gradient_
from kernels.linear_cross_entropy import linear_cross_entropy

TILES = "kernels.cross_entropy.kernel:TILES"


def eager(logits: Tensor, labels: Tensor) -> Tensor:
    """In fp32, as a trainer writes it."""
    return F.cross_entropy(logits.float(), labels, reduction="sum")


def both(function: Callable[..., Any], inputs: list[Tensor], *rest: Tensor) -> tuple[Tensor, ...]:
    """Loss, or the first of several outputs, and gradients."""
    output = function(*inputs, *rest)
    loss = (output[0] if isinstance(output, tuple) else output).sum()
    return loss.detach(), *torch.autograd.grad(loss, inputs)


def problems(device: torch.device) -> Iterator[Problem]:
    """Made one after the other, so that the memory of one is free before the next.

    Who writes over the logits has its own, and reads its gradient at the next call: the same traffic and arithmetic.
    """
    rest = (None, -100, 0.0, 0.0, "sum")  # class weights, ignore_index, z-loss, smoothing, reduction
    for rows, words in ((8192, 131072), (8192, 128256), (16384, 32768)):
        logits = torch.randn(rows, words, device=device, dtype=torch.bfloat16, requires_grad=True)
        labels = torch.randint(words, (rows,), device=device)
        size, shape = logits.numel() * 2, f"{rows}x{words}"
        kept = {"lattice keeping logits": cross_entropy, "eager": eager, "compile": torch.compile(eager, dynamic=False)}
        lost = {"lattice": cross_entropy_in_place} | liger("cross_entropy:LigerCrossEntropyFunction", *rest)
        candidates = {name: partial(both, f, [logits], labels) for name, f in kept.items()}
        for name, function in lost.items():
            own = logits.detach().clone().requires_grad_()
            candidates[name] = partial(both, function, [own], labels)
        yield Problem("cross_entropy", "both", shape, "bf16", 2 * size, candidates, tuned=TILES)
        plain = logits.detach()
        forward: dict[str, Callable[[], Any]] = {
            name: partial(function, plain, labels) for name, function in kept.items()
        }
        forward["lattice"] = forward.pop("lattice keeping logits")
        yield Problem("cross_entropy", "forward", shape, "bf16", size, forward, tuned=TILES)
        scale = torch.ones((), device=device)
        chunk = {"lattice": partial(loss_and_gradient_, plain.clone(), labels, scale=scale)}
        yield Problem("cross_entropy", "chunk of a linear head", shape, "bf16", 2 * size, chunk, tuned=TILES)
        del logits, plain, own, candidates, forward, chunk

    rows, hidden_size, words = 8192, 4096, 131072
    hidden, weight = (
        (torch.randn(n, hidden_size, device=device) / hidden_size**0.5).bfloat16().requires_grad_()
        for n in (rows, words)
    )
    labels = torch.randint(words, (rows,), device=device)

    functions: dict[str, Callable[..., Any]] = {
        "lattice": partial(linear_cross_entropy, triton=True),
        "compile": partial(linear_cross_entropy, compile=True),
        **liger("fused_linear_cross_entropy:LigerFusedLinearCrossEntropyFunction", None, *rest),
    }
    candidates = {name: partial(both, f, [hidden, weight], labels) for name, f in functions.items()}
    size = 2 * (2 * hidden.numel() + 2 * weight.numel())
    flops = 6 * rows * hidden_size * words
    shape = f"{rows}x{hidden_size}x{words}"
    yield Problem("linear_cross_entropy", "both", shape, "bf16", size, candidates, flops)
