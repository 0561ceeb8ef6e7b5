"""Hardware: rates of one GPU and of what connects several."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass
class Hardware:
    """Filled by configs/hardware/NAME.yaml, which says what was measured and what is assumed."""

    name: str = ""
    memory_gib: float = 0.0  # of one GPU, that a process can allocate
    gpus_per_node: int = 8
    peak_tflops: float = 0.0  # that MFU is against
    matmul_tflops: dict[str, float] = field(default_factory=dict)  # reached, by precision.compute
    attention_tflops: list[list[float]] = field(default_factory=list)  # [width of a head, forward, backward], ascending
    grouped_tflops: float = 0.0
    copy_tbps: float = 0.0  # TB/s
    elementwise_share: float = 0.9
    optimizer_tbps: float = 0.0
    node_gbps: float = 0.0  # GB/s
    layer_gbps: float = 0.0  # GB/s
    network_gbps: float = 0.0  # GB/s
    latency_us: float = 0.0
    overlap_cost: float = 0.0
    host_us: float = 0.0
    dollars_per_gpu_hour: float = 0.0
    mtbf_gpu_hours: float = 0.0
    checkpoint_gbps: float = 0.0  # GB/s
    tables: dict[str, list[list[float]]] = field(default_factory=dict)  # [size, rate] of launch/calibrate.py

    def matmul(self, precision: str) -> float:
        """FLOP/s of large matrix products."""
        return self.matmul_tflops[precision] * 1e12

    def attention(self, head_dim: int) -> tuple[float, float]:
        """FLOP/s of attention forward and backward, of the widest heads measured that are no wider."""
        fitting = [row for row in self.attention_tflops if row[0] <= head_dim] or self.attention_tflops[:1]
        return fitting[-1][1] * 1e12, fitting[-1][2] * 1e12

    @property
    def elementwise(self) -> float:
        """Bytes/s of kernels that only move memory."""
        return self.copy_tbps * 1e12 * self.elementwise_share

    def link(self, first_to_last: int, *, in_layers: bool = False) -> float:
        """Bytes/s of a collective whose ranks span so many neighbouring GPUs. in_layers: a smaller one, of a layer."""
        if first_to_last > self.gpus_per_node:
            return self.network_gbps * 1e9
        return (self.layer_gbps if in_layers else self.node_gbps) * 1e9


POSITIVE = (
    "memory_gib",
    "gpus_per_node",
    "peak_tflops",
    "grouped_tflops",
    "copy_tbps",
    "elementwise_share",
    "optimizer_tbps",
    "node_gbps",
    "layer_gbps",
    "network_gbps",
    "mtbf_gpu_hours",
    "checkpoint_gbps",
)


def problems(hardware: Hardware) -> list[str]:
    """What is missing, one line each."""
    found = []
    for name in POSITIVE:
        if not getattr(hardware, name) > 0:
            found.append(f"hardware.{name}={getattr(hardware, name)} must be positive")
    missing = [name for name in ("fp32", "bf16", "fp16", "fp8") if not hardware.matmul_tflops.get(name, 0) > 0]
    found += [f"hardware.matmul_tflops has no positive rate for {name}; add one" for name in missing]
    if not hardware.attention_tflops or any(len(row) != 3 or min(row) <= 0 for row in hardware.attention_tflops):
        found.append("hardware.attention_tflops must list [width of a head, forward, backward]; e.g. [[128, 566, 484]]")
    return found
