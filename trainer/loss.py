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

from collections.abc import Sequence
from functools import partial
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from data.batch import IGNORE_INDEX, Batch
from kernels.linear_cross_entropy import (
    VocabularyShard,
    linear_cross_entropy,
    linear_token_losses,
    linear_token_losses_and_entropies,
    vocab_parallel_linear_cross_entropy,
)
from models.decoder import Head
from models.mtp_config import MTPConfig
from parallel.groups import ModelParallel
from parallel.tensor import chunk_bounds
from trainer.config import TrainConfig


class Objective(Protocol):
    """What a step minimises: sums over a micro-batch, each divided by its count in the global batch, and weighted.

    A recipe's loss is one of these. Sums and counts of the micro-batches of all ranks with different tokens are added
    up, so a token, a sequence or a pair of them has to be counted on one of these ranks alone, or in shares.
    """

    names: Sequence[str]  # of the sums after the first, which is `loss`, in metrics
    weights: Tensor  # fp32 [1 + D], on the device: of each in what is minimised; 0 where it is only reported

    def counts(self, batch: Batch) -> Tensor:
        """What each sum is divided by, of this micro-batch: [1 + D] int64 on the device."""
        ...

    def head(self, batch: Batch) -> Head:
        """Given to Decoder.forward, on the last stage of a pipeline: the sums, fp32, [1 + D] or, with `ahead`, 0-d."""
        ...

    def ahead(self, batch: Batch) -> list[tuple[Tensor, Head]]:
        """Given to Decoder.forward with the head: of multi-token prediction."""
        ...


class NextToken:
    """The objective of pretraining, L + (w / D) sum_k L_k above: every label of a batch, each by its number."""

    def __init__(
        self,
        *,
        weights: Tensor,
        names: Sequence[str] = (),
        kernel: str = "torch",
        vocabulary: VocabularyShard | None = None,
        batch_invariant: bool = False,
    ) -> None:
        """weights, names: see Objective. The others: see `token_loss_sum`."""
        self.weights = weights
        self.names = names
        self._loss = partial(token_loss_sum, kernel=kernel, vocabulary=vocabulary, batch_invariant=batch_invariant)

    def counts(self, batch: Batch) -> Tensor:
        return torch.stack([count_valid(labels) for labels in (batch.labels, *(labels for _, labels in batch.ahead))])

    def head(self, batch: Batch) -> Head:
        return partial(self._loss, labels=batch.labels)

    def ahead(self, batch: Batch) -> list[tuple[Tensor, Head]]:
        return [(tokens, partial(self._loss, labels=labels)) for tokens, labels in batch.ahead]


FROZEN_CHUNK = 2048
"""Tokens whose logits are in memory at a time, where the output layer has no gradient."""


def choose_loss_kernel(config: TrainConfig, device_type: str) -> str:
    """What `token_loss_sum` takes between the products for train.loss_kernel: compiled, triton or torch.

    auto is triton on CUDA: with it a step of llama3_1b takes 0.8% less time and 1 GiB less than with the compiled loss
    (H200, bf16, 16,384 tokens), and torch's operations, one by one, take 9 bytes per logit of a chunk for its 2. Of a
    vocabulary that is split over tp nothing was timed: compiled where blocks are, else torch, as off the GPU.
    """
    train = config.train
    whole = config.parallel.tp == 1 and not train.batch_invariant
    if train.loss_kernel == "triton" or (train.loss_kernel == "auto" and device_type == "cuda" and whole):
        return "triton"
    return "compiled" if train.compiles_loss else "torch"


def token_loss_sum(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    kernel: str = "torch",
    vocabulary: VocabularyShard | None = None,
    batch_invariant: bool = False,
) -> Tensor:
    """S_p: the sum of the losses of the valid tokens of a part, in nats. 0-d, fp32 (fp64 for fp64), differentiable.

    hidden [B, T, D] is the decoder's output after its last norm, weight [V, D] that of the output layer (a plain
    tensor), labels [B, T] int64 with IGNORE_INDEX where there is no loss. kernel: `choose_loss_kernel`'s. vocabulary:
    where weight has only some of the words, which ones, and whose are the others. batch_invariant: of a model that is
    (models/invariant.py); each token's loss is then a function of its own row of hidden, to the bit. Errors are those
    of `linear_cross_entropy`.
    """
    how: dict[str, Any] = {"compile": kernel == "compiled", "triton": kernel == "triton"}
    how["ignore_index"] = IGNORE_INDEX
    if not weight.requires_grad:  # of a frozen head (adapters) a chunk costs no pass over d_weight: less memory
        how["chunk_tokens"] = FROZEN_CHUNK
    if vocabulary is not None:
        return vocab_parallel_linear_cross_entropy(hidden, weight, labels, shard=vocabulary, **how)
    return linear_cross_entropy(hidden, weight, labels, batch_invariant=batch_invariant, **how)


def token_losses(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    vocabulary: VocabularyShard | None = None,
    temperature: float = 1.0,
    batch_invariant: bool = False,
) -> Tensor:
    """What `token_loss_sum` adds up: minus the log-probabilities of labels, [B, T] fp32 (fp64 for fp64), 0 where there
    is none; each has its own gradient. temperature divides the logits. Errors are those of `linear_token_losses`."""
    return linear_token_losses(
        hidden,
        weight,
        labels,
        shard=vocabulary,
        temperature=temperature,
        ignore_index=IGNORE_INDEX,
        batch_invariant=batch_invariant,
    )


def token_losses_and_entropies(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    vocabulary: VocabularyShard | None = None,
    temperature: float = 1.0,
    batch_invariant: bool = False,
) -> tuple[Tensor, Tensor]:
    """`token_losses`, and the entropy of the distribution over words before each label, alike and with a gradient."""
    return linear_token_losses_and_entropies(
        hidden,
        weight,
        labels,
        shard=vocabulary,
        temperature=temperature,
        ignore_index=IGNORE_INDEX,
        batch_invariant=batch_invariant,
    )


def token_scores(hidden: Tensor, weight: Tensor) -> Tensor:
    """What a reward model's head says of every token: [B, T] of hidden [B, T, D] and weight [1, D], differentiable.

    In fp32 (fp64 for fp64): two answers of nearly the same worth would be equal in bf16.
    """
    dtype = torch.promote_types(hidden.dtype, torch.float32)
    return F.linear(hidden.to(dtype), weight.to(dtype))[..., 0]


def vocabulary_shard(vocab_size: int, groups: ModelParallel) -> VocabularyShard | None:
    """The words whose logits this rank computes; None: all."""
    if groups.tp is None:
        return None
    first, _ = chunk_bounds(vocab_size, groups.tp.size(), groups.tp.get_local_rank())
    return VocabularyShard(group=groups.tp.get_group(), first=first)


def next_token(
    mtp: MTPConfig,
    *,
    device: torch.device,
    kernel: str = "torch",
    vocabulary: VocabularyShard | None = None,
    batch_invariant: bool = False,
) -> NextToken:
    """The objective of a model with D = mtp.depth blocks of multi-token prediction."""
    return NextToken(
        weights=torch.tensor([1.0] + [mtp.loss_weight / max(mtp.depth, 1)] * mtp.depth, device=device),
        names=[f"mtp_loss_{k}" for k in range(1, mtp.depth + 1)],
        kernel=kernel,
        vocabulary=vocabulary,
        batch_invariant=batch_invariant,
    )


def count_valid(labels: Tensor) -> Tensor:
    """n_p: how many labels carry a loss. 0-d int64 on the device of labels, ready to be summed over parts and ranks."""
    return (labels != IGNORE_INDEX).sum()
