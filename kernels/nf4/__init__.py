"""NF4, the 4-bit format of QLoRA (2305.14314), with double quantization, in bitsandbytes' layout."""

from kernels.nf4.op import dequantize_nf4, quantize_nf4
from kernels.nf4.reference import NF4

__all__ = ["NF4", "dequantize_nf4", "quantize_nf4"]
