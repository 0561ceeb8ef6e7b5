"""SwiGLU (2002.05202): silu(gate) * up, the gated activation of Llama's MLP."""

from kernels.swiglu.op import swiglu

__all__ = ["swiglu"]
