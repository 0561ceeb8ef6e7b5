"""Hardware: rates of one GPU and of what connects several."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field


@dataclass
class Hardware:
    """Filled by configs/hardware/NAME.yaml, which says what was measured and what is assumed."""

    name: str = ""
    memory_gib: float = 0.0  # of one GPU, that a process can allocate
    gpus_per_node: int = 8
    peak_tflops: float = 0.0  # that MFU is against
    matmul_tflops: dict[str, float] = field(default_factory=dict)  # reached, by precision.compute
    attention_tflops: list[list[float]] = field(default_factory=list)  # [head's width, length, forward, backward]
    grouped_tflops: float = 0.0
    copy_tbps: float = 0.0  # TB/s
    elementwise_share: float = 0.9  # of copy_tbps, by compiled kernels
    eager_share: float = 0.65  # the same by others
    optimizer_tbps: float = 0.0
    node_gbps: float = 0.0  # GB/s
    layer_gbps: float = 0.0  # GB/s
    network_gbps: float = 0.0  # GB/s
    latency_us: float = 0.0
    overlap_cost: float = 0.0
    host_us: float = 0.0
    kernel_us: float = 0.0  # of a kernel with next to nothing to do
    dollars_per_gpu_hour: float = 0.0
    mtbf_gpu_hours: float = 0.0
    checkpoint_gbps: float = 0.0  # GB/s
    host_gbps: float = 25.0  # GB/s, of a GPU to page-locked host memory
    tables: dict[str, list[list[float]]] = field(default_factory=dict)  # [size, rate] of launch/calibrate.py

    def matmul(self, precision: str) -> float:
        """FLOP/s of large matrix products."""
        return self.matmul_tflops[precision] * 1e12

    def attention(self, head_dim: int, length: float) -> tuple[float, float]:
        """FLOP/s of attention forward and backward, of the widest heads measured that are no wider.

        length: tokens of a causal sequence. Between two lengths that were measured the time of a token is linear in its
        length: something for each pair, and something for each row of tiles; outside of them the rate is the nearest.
        """
        widths = {row[0] for row in self.attention_tflops}
        width = max((w for w in widths if w <= head_dim), default=min(widths))
        rows = sorted(row[1:] for row in self.attention_tflops if row[0] == width)
        length = min(max(length, rows[0][0]), rows[-1][0])
        after = next(row for row in rows if row[0] >= length)
        before = max((row for row in rows if row[0] <= length), default=after)
        if before is after or before == after:
            return after[1] * 1e12, after[2] * 1e12
        share = (1 / before[0] - 1 / length) / (1 / before[0] - 1 / after[0])
        forward, backward = (1e12 / ((1 - share) / before[way] + share / after[way]) for way in (1, 2))
        return forward, backward

    @property
    def elementwise(self) -> float:
        """Bytes/s of kernels that only move memory."""
        return self.copy_tbps * 1e12 * self.elementwise_share

    @property
    def eager(self) -> float:
        """The same of torch's own, which read strided halves and change dtypes one element at a time."""
        return self.copy_tbps * 1e12 * self.eager_share

    def link(self, *, in_node: bool, in_layers: bool = False) -> float:
        """Bytes/s of a collective, of which no group crosses nodes, or some do. in_layers: a smaller one."""
        if not in_node:
            return self.network_gbps * 1e9
        return (self.layer_gbps if in_layers else self.node_gbps) * 1e9


def world_problems(num_gpus: int, hardware: Hardware) -> list[str]:
    """What is wrong with a job of so many GPUs, one line: above one node they are whole nodes."""
    node = hardware.gpus_per_node
    if num_gpus <= node or num_gpus % node == 0:
        return []
    below = num_gpus // node * node
    return [
        f"{num_gpus} GPUs are no whole number of nodes, which have hardware.gpus_per_node={node}; "
        f"use {below} or {below + node}"
    ]


POSITIVE = (
    "memory_gib",
    "gpus_per_node",
    "peak_tflops",
    "grouped_tflops",
    "copy_tbps",
    "elementwise_share",
    "eager_share",
    "optimizer_tbps",
    "node_gbps",
    "layer_gbps",
    "network_gbps",
    "mtbf_gpu_hours",
    "checkpoint_gbps",
    "host_gbps",
)


def problems(hardware: Hardware) -> list[str]:
    """What is missing, one line each."""
    found = []
    for name in POSITIVE:
        if not getattr(hardware, name) > 0:
            found.append(f"hardware.{name}={getattr(hardware, name)} must be positive")
    missing = [name for name in ("fp32", "bf16", "fp16", "fp8") if not hardware.matmul_tflops.get(name, 0) > 0]
    found += [f"hardware.matmul_tflops has no positive rate for {name}; add one" for name in missing]
    return found + _attention_problems(hardware.attention_tflops)


def _attention_problems(rows: list[list[float]]) -> list[str]:
    form = "[width of a head, tokens of a sequence, forward, backward]; e.g. [[128, 8192, 566, 484]]"
    if not rows:
        return [f"hardware.attention_tflops=[] has no rate; list {form}"]
    found = []
    for row in rows:
        if len(row) == 3:
            found.append(f"hardware.attention_tflops has {row} without the length that it was measured at; list {form}")
        elif len(row) != 4 or not all(value > 0 for value in row):
            found.append(f"hardware.attention_tflops has {row}, which is not four positive numbers; list {form}")
    twice = [key for key, count in Counter(tuple(row[:2]) for row in rows).items() if count > 1]
    if not found and twice:
        width, length = twice[0]
        found.append(f"hardware.attention_tflops has two rows of width {width:g} and length {length:g}; keep one")
    return found
