"""Measure the rates of a hardware file on the machine at hand.

Every rank calls `measure`; with one rank the rates of links are not measured. On a CPU the sizes are small, so that it
takes seconds; the numbers are then those of the CPU and of gloo.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from itertools import product
from statistics import median

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from models.layers.rope import rotate
from planner.eager import ROPE_BYTES

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
MIB = 2**20
BATCHES = 5
"""A rate is of the median of so many measurements."""
SUSTAINED_SECONDS = 2.0
"""Of products before the one that gives the rate of plans: a GPU is faster until it has reached the limit of its power
(an H200 722 TFLOP/s of bf16 after a tenth of a second, 665 in steps of training)."""


@dataclass(frozen=True)
class Sizes:
    """What is measured: the last of each list gives the rate that plans compute with."""

    products: Sequence[int]  # rows, columns and depth of a square one
    attention: tuple[int, int]  # heads, tokens of all sequences, as many as the longest has
    lengths: Sequence[int]  # of a sequence
    head_dims: Sequence[int]
    experts: tuple[int, int, int]  # number, rows of each, features in and out
    bytes: int  # that are copied
    parameters: int  # that are updated
    messages: Sequence[int]  # bytes of a collective
    layer_message: int  # of those, like the ones inside of layers

    @classmethod
    def of(cls, device: torch.device) -> Sizes:
        if device.type == "cuda":
            messages = [MIB, 8 * MIB, 32 * MIB, 128 * MIB, 512 * MIB]
            products = (1024, 2048, 4096, 8192)
            lengths, experts = (2048, 4096, 8192, 32768), (8, 4096, 4096)
            return cls(products, (16, 32768), lengths, (64, 128), experts, 2**30, 2**27, messages, 32 * MIB)
        messages = [MIB // 4, MIB]
        return cls((64, 256), (2, 256), (128, 256), (32, 64), (4, 64, 64), 8 * MIB, 2**18, messages, MIB // 4)


@dataclass
class Measured:
    """Rates as configs/hardware has them. None: could not be measured here, `why` says the reason."""

    rates: dict[str, float | dict[str, float] | list[list[float]] | None] = field(default_factory=dict)
    tables: dict[str, list[list[float]]] = field(default_factory=dict)  # rate by size
    why: dict[str, str] = field(default_factory=dict)


def measure(device: torch.device, *, local_world_size: int, sizes: Sizes | None = None) -> Measured:
    """All rates of this GPU and its links. The process group is there; all ranks measure at once."""
    sizes = sizes or Sizes.of(device)
    found = Measured()
    with torch.no_grad():
        _products(found, device, sizes)
        _memory(found, device, sizes)
        _to_host(found, device, sizes)
    _eager(found, device, sizes)
    _attention(found, device, sizes)
    _optimizer(found, device, sizes)
    _links(found, device, sizes, local_world_size)
    return found


def seconds_of(run: Callable[[], object], device: torch.device, *, repeats: int = 10) -> float:
    """Of one call, on the device's clock: the median of several batches of calls."""
    for _ in range(3):
        run()
    taken = []
    for _ in range(BATCHES):
        if device.type == "cuda":
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            for _ in range(repeats):
                run()
            end.record()
            end.synchronize()
            taken.append(start.elapsed_time(end) / 1e3 / repeats)
        else:
            before = time.perf_counter()
            for _ in range(repeats):
                run()
            taken.append((time.perf_counter() - before) / repeats)
    return max(median(taken), 1e-9)


def _sustain(run: Callable[[], object], device: torch.device) -> None:
    """Run it for SUSTAINED_SECONDS. A CPU has no such limit."""
    begin = time.monotonic()
    while device.type == "cuda" and time.monotonic() - begin < SUSTAINED_SECONDS:
        for _ in range(20):
            run()
        torch.cuda.synchronize(device)


# ---- of one GPU


def _products(found: Measured, device: torch.device, sizes: Sizes) -> None:
    """TFLOP/s of square products of random numbers (of zeros they are faster: less power)."""
    rates: dict[str, float] = {}
    for name, dtype in DTYPES.items():
        table = []
        for n in sizes.products:
            a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
            multiply = partial(torch.matmul, a, b.T)
            if n == sizes.products[-1]:
                _sustain(multiply, device)
            table.append([float(n), 2 * n**3 / seconds_of(multiply, device) / 1e12])
        found.tables[f"matmul_{name}"] = table
        rates[name] = table[-1][1]
    try:
        found.tables["matmul_fp8"] = [
            [float(n), _fp8_product(n, device, last=n == sizes.products[-1])] for n in sizes.products
        ]
        rates["fp8"] = found.tables["matmul_fp8"][-1][1]
    except (
        RuntimeError,
        ValueError,
        NotImplementedError,
    ) as error:  # no fp8 on this device or in this torch: told in `why`
        rates["fp8"] = rates["bf16"]
        found.why["matmul_tflops"] = f"fp8 was not measured and has bf16's rate: {_line(error)}"
    found.rates["matmul_tflops"] = rates
    experts, rows, features = sizes.experts
    x = torch.randn(experts * rows, features, device=device).bfloat16()
    weights = torch.randn(experts, features, features, device=device).bfloat16()
    ends = torch.arange(1, experts + 1, device=device, dtype=torch.int32) * rows
    try:
        taken = seconds_of(lambda: torch._grouped_mm(x, weights, offs=ends), device)
        found.rates["grouped_tflops"] = 2 * experts * rows * features**2 / taken / 1e12
    except (RuntimeError, ValueError, NotImplementedError) as error:  # likewise no grouped product
        found.rates["grouped_tflops"] = rates["bf16"]
        found.why["grouped_tflops"] = f"not measured, and has bf16's rate: {_line(error)}"


def _fp8_product(n: int, device: torch.device, *, last: bool) -> float:
    one = torch.ones((), device=device)
    a, b = (torch.randn(n, n, device=device).to(torch.float8_e4m3fn) for _ in range(2))
    multiply = partial(torch._scaled_mm, a, b.T, one, one, out_dtype=torch.bfloat16)
    if last:
        _sustain(multiply, device)
    return 2 * n**3 / seconds_of(multiply, device) / 1e12


def _memory(found: Measured, device: torch.device, sizes: Sizes) -> None:
    """TB/s of a copy; of it, what a sum of two reaches; and the host's time for a tiny operation."""
    n = sizes.bytes // 4
    x, y, z = (torch.randn(n, device=device) for _ in range(3))
    copy = 2 * sizes.bytes / seconds_of(lambda: y.copy_(x), device) / 1e12
    added = 3 * sizes.bytes / seconds_of(lambda: torch.add(x, y, out=z), device) / 1e12
    found.rates["copy_tbps"] = copy
    found.rates["elementwise_share"] = min(1.0, added / copy)
    one = torch.ones(1, device=device)
    started = time.perf_counter()
    for _ in range(1000):
        one.add_(1)
    found.rates["host_us"] = (time.perf_counter() - started) * 1e3  # 1000 of them
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        found.rates["kernel_us"] = _seconds_of_tiny_kernel(device) * 1e6


def _to_host(found: Measured, device: torch.device, sizes: Sizes) -> None:
    """GB/s of a copy to page-locked host memory, as the first part of a checkpoint is."""
    found.rates["host_gbps"] = None
    if device.type != "cuda":
        found.why["host_gbps"] = "there is no GPU to copy from"
        return
    source = torch.zeros(sizes.bytes, device=device, dtype=torch.uint8)
    target = torch.empty(sizes.bytes, dtype=torch.uint8, pin_memory=True)
    taken = seconds_of(lambda: target.copy_(source, non_blocking=True), device)
    found.rates["host_gbps"] = sizes.bytes / taken / 1e9


QUEUED = 500
"""Kernels that fit into the queue to a GPU (1024)."""
WAIT_CYCLES = 100_000_000
"""Of the GPU, some 50 ms: longer than the host takes to queue those."""


def _seconds_of_tiny_kernel(device: torch.device) -> float:
    """Of a GPU that always has the next one: they are queued behind a wait."""
    one = torch.ones(1, device=device)
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda._sleep(WAIT_CYCLES)
    start.record()
    for _ in range(QUEUED):
        one.add_(1)
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3 / QUEUED


def _eager(found: Measured, device: torch.device, sizes: Sizes) -> None:
    """Of copy_tbps, what torch's own operations reach: those of rope, by the bytes that planner/eager.py counts."""
    heads, tokens = sizes.attention
    width = sizes.head_dims[0]
    x = torch.randn(1, tokens, heads, width, device=device).bfloat16().requires_grad_()
    angles = torch.rand(1, tokens, 1, width // 2, device=device)
    cos, sin = angles.cos(), angles.sin()
    output = rotate(x, cos, sin)
    gradient = torch.randn_like(output)
    taken = seconds_of(lambda: rotate(x, cos, sin), device)
    taken += seconds_of(lambda: torch.autograd.grad(output, x, gradient, retain_graph=True), device)
    copy = found.rates["copy_tbps"]
    assert isinstance(copy, float)
    found.rates["eager_share"] = min(1.0, sum(ROPE_BYTES) * x.numel() / taken / 1e12 / copy)


KERNELS_OF_ATTENTION = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION]
"""The first that can, as in training (kernels/attention/sdpa.py); torch's own order may be another."""


def _attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal, of [B, T, H, K] each."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    with sdpa_kernel(KERNELS_OF_ATTENTION, set_priority=True) if q.is_cuda else nullcontext():
        return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)


def _attention(found: Measured, device: torch.device, sizes: Sizes) -> None:
    """TFLOP/s of causal attention by width and length, forward and backward, over the pairs that the mask leaves."""
    heads, tokens = sizes.attention
    rows = []
    for width, length in product(sizes.head_dims, sizes.lengths):
        shape = (max(1, tokens // length), length, heads, width)
        q, k, v = (torch.randn(shape, device=device).bfloat16().requires_grad_() for _ in range(3))
        flops = 4 * width * shape[0] * heads * length * (length + 1) / 2
        output = _attend(q, k, v)
        gradient = torch.randn_like(output)
        forward = seconds_of(partial(_attend, q, k, v), device)
        backward = seconds_of(partial(torch.autograd.grad, output, (q, k, v), gradient, retain_graph=True), device)
        rows.append([float(width), float(length), flops / forward / 1e12, 2.5 * flops / backward / 1e12])
    found.rates["attention_tflops"] = rows


def _optimizer(found: Measured, device: torch.device, sizes: Sizes) -> None:
    """TB/s of torch's fused AdamW in fp32: weight and both moments read and written, the gradient read."""
    weight = torch.randn(sizes.parameters, device=device, requires_grad=True)
    weight.grad = torch.randn_like(weight)
    optimizer = torch.optim.AdamW([weight], fused=True)
    found.rates["optimizer_tbps"] = 7 * 4 * sizes.parameters / seconds_of(optimizer.step, device) / 1e12


# ---- of links


def _links(found: Measured, device: torch.device, sizes: Sizes, local_world_size: int) -> None:
    """GB/s that a rank sends in an all-reduce (bus bandwidth), by size: in a node, and over all nodes."""
    names = ("node_gbps", "layer_gbps", "latency_us", "network_gbps")
    found.rates |= dict.fromkeys(names)
    if local_world_size > 1:
        node, _ = dist.new_subgroups(local_world_size)
        table = _all_reduces(device, sizes.messages, node)
        found.tables["all_reduce_node_gbps"] = table
        found.rates["node_gbps"] = table[-1][1]
        found.rates["layer_gbps"] = next(rate for size, rate in table if size == sizes.layer_message)
        tiny = torch.zeros(1, device=device)
        found.rates["latency_us"] = seconds_of(lambda: dist.all_reduce(tiny, group=node), device) * 1e6
    else:
        found.why |= dict.fromkeys(names[:3], "there is one process in the node")
    if dist.get_world_size() > local_world_size:
        table = _all_reduces(device, sizes.messages, None)
        found.tables["all_reduce_network_gbps"] = table
        found.rates["network_gbps"] = table[-1][1]
    else:
        found.why["network_gbps"] = "there is one node"


def _all_reduces(device: torch.device, messages: Sequence[int], group: dist.ProcessGroup | None) -> list[list[float]]:
    ranks = dist.get_world_size(group)
    table = []
    for size in messages:
        buffer = torch.zeros(size // 2, device=device, dtype=torch.bfloat16)
        taken = seconds_of(partial(dist.all_reduce, buffer, group=group), device)
        table.append([float(size), 2 * size * (ranks - 1) / ranks / taken / 1e9])
    return table


def _line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
