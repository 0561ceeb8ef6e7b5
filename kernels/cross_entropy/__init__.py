"""Cross entropy of given logits: one pass for the loss, the gradient in the same launch if the logits may be lost."""

from kernels.cross_entropy.op import (
    cross_entropy,
    cross_entropy_in_place,
    invariant_cross_entropy,
    loss_and_gradient_,
)
from kernels.cross_entropy.shards import combine_shards, shard_gradient_, shard_statistics

__all__ = [
    "combine_shards",
    "cross_entropy",
    "cross_entropy_in_place",
    "invariant_cross_entropy",
    "loss_and_gradient_",
    "shard_gradient_",
    "shard_statistics",
]
