"""Quantization to fp8: tensorwise, rowwise, and in blocks of 1x128 and 128x128."""

from kernels.fp8.quantize.op import quantize_blocks, quantize_rowwise, quantize_tensorwise, transpose_quantized
from kernels.fp8.quantize.reference import dequantize

__all__ = ["dequantize", "quantize_blocks", "quantize_rowwise", "quantize_tensorwise", "transpose_quantized"]
