"""Products of matrices in fp8."""

from kernels.fp8.matmul.op import fp8_matmul

__all__ = ["fp8_matmul"]
