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

Multi-token prediction (DeepSeek-V3, 2412.19437, eq. 24 and 25) has a loss L_k of the same kind for each of its D
blocks, over the N_k tokens that have a label k places further on, and what is minimised is

    L + (w / D) sum_k L_k

(the paper divides a sequence's sum by its length, T; N_k is T - k for each without documents or ignored labels.)
"""

from __future__ import annotations

import torch
from torch import Tensor

from data.batch import IGNORE_INDEX, Batch
from kernels.linear_cross_entropy import (
    VocabularyShard,
    linear_cross_entropy,
    vocab_parallel_linear_cross_entropy,
)
from models.mtp_config import MTPConfig
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


def loss_weights(mtp: MTPConfig, device: torch.device) -> Tensor:
    """What the training loss multiplies L, L_1, ... L_D with: fp32 [1 + D]."""
    return torch.tensor([1.0] + [mtp.loss_weight / mtp.depth] * mtp.depth, device=device)


def count_all_valid(batch: Batch) -> Tensor:
    """n_p of L, L_1, ... L_D: [1 + D], as `count_valid`."""
    return torch.stack([count_valid(labels) for labels in (batch.labels, *(labels for _, labels in batch.ahead))])


def count_valid(labels: Tensor) -> Tensor:
    """n_p: how many labels carry a loss. 0-d int64 on the device of labels, ready to be summed over parts and ranks."""
    return (labels != IGNORE_INDEX).sum()
