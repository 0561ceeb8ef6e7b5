"""A product of small inner dimension, added in place: what an adapter adds to the result of its layer."""

from kernels.low_rank.op import add_low_rank_, has_low_rank_kernel

__all__ = ["add_low_rank_", "has_low_rank_kernel"]
