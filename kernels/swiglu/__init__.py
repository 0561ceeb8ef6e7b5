"""SwiGLU (2002.05202): silu(gate) * up, the gated activation of Llama's MLP."""

from kernels.swiglu.op import swiglu, swiglu_fused, swiglu_fused_backward
from kernels.swiglu.quantized import swiglu_backward_quantized, swiglu_quantized

__all__ = [
    "swiglu",
    "swiglu_backward_quantized",
    "swiglu_fused",
    "swiglu_fused_backward",
    "swiglu_quantized",
]
