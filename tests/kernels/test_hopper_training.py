"""The optimizer's, the loss's and the experts' kernels compiled for Hopper in bf16; needs no GPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

SCALAR_KERNELS = ("_total", "_count", "_place")
"""What they read is small: single numbers are no loss."""


def bf16(*shape: int) -> Tensor:
    return torch.empty(*shape, dtype=torch.bfloat16)


def optimizer_launches() -> Iterator[tuple[str, Callable[[], Any]]]:
    from kernels.adamw import AdamWUpdate, ElementIndex, QuantizedMoment
    from kernels.global_norm import global_norm

    settings: dict[str, Any] = {"lr": 1e-4, "betas": (0.9, 0.95), "eps": 1e-8, "step": torch.ones(())}
    master, half, n = torch.empty(64, 128), bf16(64, 128), 64 * 128
    eight_bit = [[QuantizedMoment.zeros(n, signed=signed)] for signed in (True, False)]
    fp32 = AdamWUpdate([master], [master], [master], decay=[0.1], copies=[half])
    yield "adamw", lambda: fp32.update([master], **settings)
    small = AdamWUpdate([half], *eight_bit, decay=[0.1], rounding=[ElementIndex("w")])
    yield "adamw 8-bit, stochastic", lambda: small.update([half], **settings)
    cut = AdamWUpdate([half], [half], [half], decay=[0.1], rounding=[ElementIndex("w", 0, (1, 128), (256, 0))])
    yield "adamw stochastic, cut columns", lambda: cut.update([half], **settings)
    yield "global_norm", lambda: global_norm([half])


def loss_launches() -> Iterator[tuple[str, Callable[[], Any]]]:
    from kernels.cross_entropy import loss_and_gradient_, shard_gradient_, shard_statistics
    from kernels.cross_entropy.op import _cross_entropy

    logits, labels, scale = bf16(16, 131072), torch.zeros(16, dtype=torch.int64), torch.ones(())
    yield "cross_entropy", lambda: _cross_entropy(logits, labels, -100, 0.1, 1e-4)
    yield "cross_entropy in place", lambda: loss_and_gradient_(logits, labels, scale=scale)
    yield "shard statistics", lambda: shard_statistics(logits, labels, first=0)
    yield "shard gradient", lambda: shard_gradient_(logits, labels, torch.empty(16), first=16, scale=scale)


def expert_launches() -> Iterator[tuple[str, Callable[[], Any]]]:
    from kernels.grouped_linear import grouped_linear, input_gradient, weight_gradient
    from kernels.moe_permute.op import _permute, _sort_by_expert, _unpermute, _unpermute_backward

    order = [torch.zeros(128, dtype=torch.int32) for _ in range(2)]
    x, rows, weights = bf16(16, 2048), bf16(128, 2048), torch.empty(16, 8)
    yield "sort", lambda: _sort_by_expert(torch.zeros(128, dtype=torch.int64), 128, 8)
    yield "permute", lambda: _permute(x, *order, 8)
    yield "unpermute", lambda: _unpermute(rows, weights, *order)
    yield "unpermute backward", lambda: _unpermute_backward(x, rows, weights, *order)
    many, weight, ends = bf16(2048, 256), bf16(8, 512, 256), torch.zeros(8, dtype=torch.int32)
    grad = bf16(2048, 512)
    yield "grouped_linear", lambda: grouped_linear(many, weight, ends, implementation="triton")
    yield "grouped input gradient", lambda: input_gradient(grad, weight, ends, "triton")
    yield "grouped weight gradient", lambda: weight_gradient(grad, many, ends, "triton")


def main() -> None:
    """Prints what was compiled as JSON: names with their kernels."""
    from tests.kernels.hopper import Compiled, compiled

    result: dict[str, list[dict[str, Any]]] = {}
    for launches in (optimizer_launches, loss_launches, expert_launches):
        for name, launch in launches():
            found: list[Compiled] = []
            with compiled(found):
                launch()
            result[name] = [asdict(kernel) for kernel in found]
    print(json.dumps(result))


def test_kernels_compile_for_hopper_without_spills_and_with_wide_loads() -> None:
    """What the interpreter accepts and the compiler does not; registers spilled to memory; loads of single numbers;
    matrix products without the tensor cores."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "tests.kernels.test_hopper_training"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    for name, kernels in json.loads(done.stdout).items():
        assert kernels, name
        for kernel in kernels:
            assert kernel["stack_bytes"] == 0, (name, kernel)
            assert kernel["shared_bytes"] <= 227 << 10, (name, kernel)
            assert kernel["wide_loads"] or kernel["kernel"] in SCALAR_KERNELS, (name, kernel)
            assert kernel["wgmma"] or not name.startswith("grouped"), (name, kernel)


if __name__ == "__main__":
    main()
