"""AdamW over many tensors in one launch: clipping, working copies, 8-bit states and stochastic rounding in one pass."""

from kernels.adamw.op import AdamWUpdate
from kernels.adamw.placement import ElementIndex
from kernels.adamw.quantized import QuantizedMoment

__all__ = ["AdamWUpdate", "ElementIndex", "QuantizedMoment"]
