"""Speed of a run: peak rates of the devices we know, tokens per second, model FLOPs utilisation (MFU)."""

from __future__ import annotations

import logging
import re
import time
from dataclasses import dataclass

import torch

logger = logging.getLogger(__name__)

DTYPES = ("fp32", "bf16", "fp16", "fp8")

# Dense peaks in TFLOP/s: vendors advertise twice these for the tensor cores, with 2:4 sparsity. fp32 is the rate
# outside the tensor cores (TF32 off), fp16 and fp8 that with fp32 accumulation, which training uses and which consumer
# cards run at half speed. First match wins; names are those of torch.cuda.get_device_name(). A consumer card's pattern
# ends the name, because "RTX 4090 D" and "RTX 4090 Laptop GPU" are slower chips.
_PEAK_TFLOPS: tuple[tuple[str, dict[str, float]], ...] = (
    # NVIDIA Blackwell datasheet: per GPU of GB200 NVL72 and of HGX B200.
    (r"\bGB200\b", {"fp32": 80, "bf16": 2500, "fp16": 2500, "fp8": 5000}),
    (r"\bB200\b", {"fp32": 75, "bf16": 2250, "fp16": 2250, "fp8": 4500}),
    # NVIDIA H100 datasheet: PCIe, NVL (per GPU, 2024 edition) and SXM; H200 and GH200 datasheets: as H100 SXM.
    (r"\bH100 PCIe\b", {"fp32": 51, "bf16": 756, "fp16": 756, "fp8": 1513}),
    (r"\bH100 NVL\b", {"fp32": 60, "bf16": 835, "fp16": 835, "fp8": 1671}),
    (r"\bH200 NVL\b", {"fp32": 60, "bf16": 835, "fp16": 835, "fp8": 1671}),
    (r"\b(H100|H200|GH200)\b", {"fp32": 67, "bf16": 989, "fp16": 989, "fp8": 1979}),
    # NVIDIA A100 and A10 datasheets.
    (r"\bA100\b", {"fp32": 19.5, "bf16": 312, "fp16": 312}),
    (r"\bA10\b", {"fp32": 31.2, "bf16": 125, "fp16": 125}),
    # NVIDIA L40S, L40 and L4 datasheets.
    (r"\bL40S\b", {"fp32": 91.6, "bf16": 362, "fp16": 362, "fp8": 733}),
    (r"\bL40\b", {"fp32": 90.5, "bf16": 181, "fp16": 181, "fp8": 362}),
    (r"\bL4\b", {"fp32": 30.3, "bf16": 121, "fp16": 121, "fp8": 242.5}),
    # NVIDIA RTX Blackwell (GB202), Ada (AD102) and Ampere (GA102) architecture whitepapers, appendix tables.
    (r"\bRTX 5090$", {"fp32": 104.8, "bf16": 209.5, "fp16": 209.5, "fp8": 419}),
    (r"\bRTX 4090$", {"fp32": 82.6, "bf16": 165.2, "fp16": 165.2, "fp8": 330.3}),
    (r"\bRTX 3090$", {"fp32": 35.6, "bf16": 71, "fp16": 71}),
)


def peak_flops(device_name: str, dtype: str) -> float | None:
    """Dense peak rate of one device in FLOP/s.

    device_name: of torch.cuda.get_device_name(), or "cpu". dtype: one of DTYPES.
    None where the table has no number: a CPU, an unknown device, a MIG slice, a dtype the chip has no units for.
    Raises ValueError on a dtype outside DTYPES.
    """
    if dtype not in DTYPES:
        raise ValueError(f"dtype={dtype!r} has no peak rate; use one of {', '.join(DTYPES)}")
    if "MIG" in device_name:  # a slice runs at a fraction that the name does not give exactly
        return None
    for pattern, peaks in _PEAK_TFLOPS:
        if re.search(pattern, device_name):
            return peaks[dtype] * 1e12 if dtype in peaks else None
    return None


def mfu_peak(device_name: str, peak_tflops: float | None) -> float | None:
    """FLOP/s that MFU is measured against: logging.peak_tflops if set, else the device's dense bf16 peak.

    The bf16 peak serves every compute dtype, so that MFU compares runs by time per token: going to fp8 raises MFU by as
    much as it saves time. None (MFU is null) on a CPU, and with one warning on an unknown GPU.
    Raises ValueError when peak_tflops is not positive.
    """
    if peak_tflops is not None:
        if not peak_tflops > 0:
            raise ValueError(
                f"logging.peak_tflops={peak_tflops} must be positive; leave it null to look it up by device"
            )
        return peak_tflops * 1e12
    peak = peak_flops(device_name, "bf16")
    if peak is None and device_name != "cpu":
        logger.warning("the bf16 peak of %r is not known, so mfu is null; set logging.peak_tflops", device_name)
    return peak


class StepClock:
    """Times steps from the end of one to the end of the next, where they run: on the GPU's clock, or the host's.

    The host enqueues work ahead of the GPU, so what it sees of a step's end depends on when it looks; events do not.
    What lies between two steps counts, waiting for data included; a validation or a checkpoint is left out by calling
    `start` after it.
    """

    def __init__(self, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"
        self.start()

    def start(self) -> None:
        """Time up to here belongs to no step."""
        self._last = self.mark()

    def mark(self) -> torch.cuda.Event | float:
        """The moment everything enqueued so far is done; call it when a step has been launched."""
        if not self._on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def seconds_to(self, end: torch.cuda.Event | float) -> float:
        """Seconds from the last step's end (or `start`) to this mark, which is then the last. Waits for the GPU."""
        last, self._last = self._last, end
        if isinstance(end, float):
            assert isinstance(last, float)
            return end - last
        end.synchronize()
        assert not isinstance(last, float)
        return last.elapsed_time(end) / 1e3


@dataclass(frozen=True)
class Throughput:
    """Speed of a step from its duration."""

    world_size: int
    flops_per_token: float  # forward and backward, recomputation not counted
    peak: float | None  # FLOP/s of one device

    def of_step(self, tokens: int, seconds: float) -> dict[str, float | None]:
        """The three fields of metrics.jsonl for `tokens` tokens of the global batch in `seconds`.

        MFU is model FLOPs over peak FLOPs (PaLM, 2204.02311, appendix B).
        """
        rate = tokens / seconds / self.world_size
        mfu = None if self.peak is None else self.flops_per_token * rate / self.peak
        return {"step_seconds": seconds, "tokens_per_second_per_gpu": rate, "mfu": mfu}
