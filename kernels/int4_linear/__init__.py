"""Linear layer with a weight of 4-bit integers in groups, for inference."""

from kernels.int4_linear.op import int4_linear
from kernels.int4_linear.reference import Int4Weight, dequantize_int4, quantize_int4

__all__ = ["Int4Weight", "dequantize_int4", "int4_linear", "quantize_int4"]
