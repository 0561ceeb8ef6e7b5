"""PrecisionConfig: the dtypes of a run. Masters and reductions may be wider than what the model computes in."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from parallel.problem import Problem, values

# fp8: linear layers of blocks multiply in it; all else is as for bf16.
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "fp8": torch.bfloat16}
FP8_RECIPES = ("tensorwise_dynamic", "tensorwise_delayed", "rowwise", "block128")
FP8_FUSED_RECIPES = ("tensorwise_delayed", "rowwise")  # whose scales are known before what they scale is written
FP8_GATHERED_RECIPES = ("tensorwise_dynamic", "tensorwise_delayed")  # whose bytes forward and backward share
FP8_GRADIENTS = {"e5m2": torch.float8_e5m2, "e4m3": torch.float8_e4m3fn}


@dataclass
class PrecisionConfig:
    """`precision`."""

    compute: str = "fp32"  # of parameters and activations in forward and backward: fp32, bf16, fp16; fp8: see DTYPES
    # Of the weights the optimizer updates: fp32, or that of compute. bf16: there is no wider copy of them, and updates
    # are rounded stochastically, without which those below 1/256 of a weight would be lost.
    master: str = "fp32"
    reduce: str = "fp32"  # gradients are summed over micro-batches and ranks in this: fp32, or that of compute
    fp8_recipe: str = "tensorwise_dynamic"  # how scales are found, one of FP8_RECIPES (kernels/fp8/scaling.py)
    fp8_gradient: str = "e5m2"  # gradients of outputs: e5m2 reaches further, e4m3 rounds less
    fp8_amax_history: int = 16  # tensorwise_delayed: steps whose largest magnitude makes the scale
    fp8_skip: list[str] = field(default_factory=list)  # linear layers with one of these in their name stay in bf16
    # tensorwise_delayed, rowwise: norms, and under tensorwise_delayed SwiGLU, write fp8 (models/fp8_producers.py)
    fp8_fused: bool = False
    # Tensorwise recipes, parallel.zero_stage=3: ranks gather the weights of fp8 layers in fp8 (models/fp8_gather.py)
    fp8_all_gather: bool = False
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
    def fp8(self) -> bool:
        """Whether linear layers of blocks multiply in fp8."""
        return self.compute == "fp8"

    @property
    def scales_loss(self) -> bool:
        """fp16 gradients underflow without a loss scale; bf16 has the exponent range of fp32."""
        return self.compute == "fp16"


def problems(config: PrecisionConfig) -> list[str]:
    """Every reason why these dtypes cannot be used together, one line each."""
    found: list[str] = []
    if config.compute not in DTYPES:
        found.append(f"precision.compute={config.compute} is not a precision; use {', '.join(DTYPES)}")
    own = "bf16" if config.fp8 else config.compute
    for name in ("master", "reduce"):
        value = getattr(config, name)
        if value not in ("fp32", own):
            found.append(f"precision.{name}={value} must be fp32 or that of precision.compute ({own})")
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
    if config.fp8_recipe not in FP8_RECIPES:
        found.append(f"precision.fp8_recipe={config.fp8_recipe} is unknown; use {', '.join(FP8_RECIPES)}")
    if config.fp8_gradient not in FP8_GRADIENTS:
        found.append(f"precision.fp8_gradient={config.fp8_gradient} is unknown; use {' or '.join(FP8_GRADIENTS)}")
    if config.fp8_fused and config.fp8_recipe not in FP8_FUSED_RECIPES and config.fp8_recipe in FP8_RECIPES:
        found.append(
            Problem(
                f"precision.fp8_fused=true does not work with precision.fp8_recipe={config.fp8_recipe}, whose scales "
                "are found in what norms and SwiGLU have written",
                values("precision.fp8_recipe", FP8_FUSED_RECIPES),
                values("precision.fp8_fused", [False]),
            )
        )
    if config.fp8_all_gather and config.fp8_recipe in FP8_RECIPES and config.fp8_recipe not in FP8_GATHERED_RECIPES:
        found.append(
            Problem(
                f"precision.fp8_all_gather=true does not work with precision.fp8_recipe={config.fp8_recipe}, by which "
                "backward quantizes weights anew, by other scales than forward",
                values("precision.fp8_recipe", FP8_GATHERED_RECIPES),
                values("precision.fp8_all_gather", [False]),
            )
        )
    if not 1 <= config.fp8_amax_history <= 4096:
        nearest = min(max(config.fp8_amax_history, 1), 4096)
        found.append(
            f"precision.fp8_amax_history={config.fp8_amax_history} must be 1 to 4096; use {nearest}; 16 is usual"
        )
    return found
