"""SwiGLU (2002.05202): silu(gate) * up, the gated activation of Llama's MLP."""

from kernels.swiglu.op import GluFp8, swiglu, swiglu_fp8, swiglu_fused, swiglu_fused_backward
from kernels.swiglu.quantized import swiglu_backward_quantized, swiglu_quantized

__all__ = [
    "GluFp8",
    "swiglu",
    "swiglu_backward_quantized",
    "swiglu_fp8",
    "swiglu_fused",
    "swiglu_fused_backward",
    "swiglu_quantized",
]
