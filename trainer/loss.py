"""The one arithmetic of the loss, the same for every split of a batch into ranks and micro-batches.

A global batch has tokens i with losses l_i, of which N are valid (their label is not IGNORE_INDEX). Its loss and its
gradient

    L = (1/N) sum_i l_i          dL/dw = (1/N) sum_i dl_i/dw

are sums over tokens, divided once by a number that belongs to the whole batch. Cut the tokens into parts p, one for
each micro-batch of each rank: with S_p the sum of the losses in p and n_p the number of valid ones,

    N = sum_p n_p                L = sum_p S_p / N          dL/dw = sum_p d(S_p / N)/dw

for any cut, and a part without a valid token adds zero. So a step first adds up n_p over its micro-batches and ranks,
then runs backward from S_p / N for every p, and gradients are *summed*, over micro-batches and over ranks.

Averages do not compose like this. The mean over parts of S_p / n_p weights a token by 1 / n_p: a token in a part with
few valid ones counts more, and the loss depends on the layout unless all n_p are equal, which packing, masked prompts
and the ends of documents rule out.
"""

from __future__ import annotations

from torch import Tensor

from data.batch import IGNORE_INDEX
from kernels.linear_cross_entropy import (
    VocabularyShard,
    linear_cross_entropy,
    vocab_parallel_linear_cross_entropy,
)
from parallel.groups import ModelParallel
from parallel.tensor import chunk_bounds


def token_loss_sum(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    compile: bool = False,
    vocabulary: VocabularyShard | None = None,
) -> Tensor:
    """S_p: the sum of the losses of the valid tokens of a part, in nats. 0-d, fp32 (fp64 for fp64), differentiable.

    hidden [B, T, D] is the decoder's output after its last norm, weight [V, D] that of the output layer (a plain
    tensor), labels [B, T] int64 with IGNORE_INDEX where there is no loss. compile: fuse the softmax (torch.compile).
    vocabulary: where weight has only some of the words, which ones, and whose are the others.
    Errors are those of `linear_cross_entropy`.
    """
    if vocabulary is not None:
        return vocab_parallel_linear_cross_entropy(
            hidden, weight, labels, shard=vocabulary, ignore_index=IGNORE_INDEX, compile=compile
        )
    return linear_cross_entropy(hidden, weight, labels, ignore_index=IGNORE_INDEX, compile=compile)


def vocabulary_shard(vocab_size: int, groups: ModelParallel) -> VocabularyShard | None:
    """The words whose logits this rank computes; None: all."""
    if groups.tp is None:
        return None
    first, _ = chunk_bounds(vocab_size, groups.tp.size(), groups.tp.get_local_rank())
    return VocabularyShard(group=groups.tp.get_group(), first=first)


def count_valid(labels: Tensor) -> Tensor:
    """n_p: how many labels carry a loss. 0-d int64 on the device of labels, ready to be summed over parts and ranks."""
    return (labels != IGNORE_INDEX).sum()
