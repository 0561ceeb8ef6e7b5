"""RMSNorm (1910.07467), with the residual addition before it and the cast to fp8 after it where they are wanted."""

from kernels.rms_norm.op import add_rms_norm, rms_norm, rms_norm_backward
from kernels.rms_norm.quantized import NormFp8, rms_norm_fp8

__all__ = ["NormFp8", "add_rms_norm", "rms_norm", "rms_norm_backward", "rms_norm_fp8"]
