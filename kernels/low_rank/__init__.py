"""A product of small inner dimension, added in place: what an adapter adds to the result of its layer."""

from kernels.low_rank.op import MAX_RANK, add_low_rank_

__all__ = ["MAX_RANK", "add_low_rank_"]
