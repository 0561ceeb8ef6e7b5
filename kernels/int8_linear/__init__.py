"""Linear layer with a weight of 8-bit integers, for inference."""

from kernels.int8_linear.op import int8_linear
from kernels.int8_linear.reference import Int8Weight, dequantize_int8, quantize_int8

__all__ = ["Int8Weight", "dequantize_int8", "int8_linear", "quantize_int8"]
