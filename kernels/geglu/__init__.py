"""GeGLU (2002.05202): gelu(gate) * up, the gated activation of Gemma's MLP. Its kernel is SwiGLU's."""

from kernels.geglu.op import geglu, geglu_fused

__all__ = ["geglu", "geglu_fused"]
