"""PrecisionConfig: the dtypes of a run. Masters and reductions may be wider than what the model computes in."""

from __future__ import annotations

from dataclasses import dataclass

import torch

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass
class PrecisionConfig:
    """`precision`."""

    compute: str = "fp32"  # of parameters and activations in forward and backward: fp32, bf16, fp16
    # Of the weights the optimizer updates: fp32, or that of compute. bf16: there is no wider copy of them, and updates
    # are rounded stochastically, without which those below 1/256 of a weight would be lost.
    master: str = "fp32"
    reduce: str = "fp32"  # gradients are summed over micro-batches and ranks in this: fp32, or that of compute
    loss_scale: float = 65536.0  # fp16: first dynamic loss scale
    loss_scale_growth_interval: int = 2000  # fp16: good steps before the scale doubles

    @property
    def compute_dtype(self) -> torch.dtype:
        return DTYPES[self.compute]

    @property
    def master_dtype(self) -> torch.dtype:
        return DTYPES[self.master]

    @property
    def reduce_dtype(self) -> torch.dtype:
        return DTYPES[self.reduce]

    @property
    def scales_loss(self) -> bool:
        """fp16 gradients underflow without a loss scale; bf16 has the exponent range of fp32."""
        return self.compute == "fp16"


def problems(config: PrecisionConfig) -> list[str]:
    """Every reason why these dtypes cannot be used together, one line each."""
    found = []
    if config.compute == "fp8":
        found.append("precision.compute=fp8 is not available in this version; use bf16")
    elif config.compute not in DTYPES:
        found.append(f"precision.compute={config.compute} is not a precision; use {', '.join(DTYPES)}")
    for name in ("master", "reduce"):
        value = getattr(config, name)
        if value not in ("fp32", config.compute):
            found.append(f"precision.{name}={value} must be fp32 or that of precision.compute ({config.compute})")
    if config.compute == "fp16" and config.master == "fp16":
        found.append("precision.master=fp16 loses small updates (11 bits of mantissa); use fp32")
    if not 0 < config.loss_scale <= 2.0**24:
        found.append(
            f"precision.loss_scale={config.loss_scale} must be positive and at most 16777216 (2**24); 65536 is usual"
        )
    if config.loss_scale_growth_interval < 1:
        found.append(
            f"precision.loss_scale_growth_interval={config.loss_scale_growth_interval} must be at least 1; "
            "2000 is usual"
        )
    return found
