"""Softmax over the last dim, however wide."""

from kernels.softmax.op import softmax

__all__ = ["softmax"]
