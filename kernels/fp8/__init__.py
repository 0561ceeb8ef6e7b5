"""8-bit floating point: quantization, products of quantized matrices, and a linear layer of them with gradients."""

from kernels.fp8.formats import E4M3, E5M2, Quantized, scale_from_amax
from kernels.fp8.linear import fp8_linear
from kernels.fp8.matmul import fp8_matmul
from kernels.fp8.quantize import (
    dequantize,
    quantize_blocks,
    quantize_rowwise,
    quantize_tensorwise,
    transpose_quantized,
)
from kernels.fp8.scaling import GRADIENT, INPUT, WEIGHT, DelayedScaling, LayerScaling, ScalingRecipe

__all__ = [
    "E4M3",
    "E5M2",
    "GRADIENT",
    "INPUT",
    "WEIGHT",
    "DelayedScaling",
    "LayerScaling",
    "Quantized",
    "ScalingRecipe",
    "dequantize",
    "fp8_linear",
    "fp8_matmul",
    "quantize_blocks",
    "quantize_rowwise",
    "quantize_tensorwise",
    "scale_from_amax",
    "transpose_quantized",
]
