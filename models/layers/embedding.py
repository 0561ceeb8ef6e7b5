"""The way into the model and the way out of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import Replicate, Shard

from models.config import ModelConfig
from parallel.collectives import Axis, all_gather_alike, all_reduce, maximum
from parallel.groups import ModelParallel
from parallel.tensor import SEQUENCE_DIM, VocabParallelEmbedding, chunk_bounds, empty_parameter, enter, local_shard


def make_embedding(config: ModelConfig, groups: ModelParallel) -> nn.Module:
    """The table of token embeddings [V, D]."""
    if groups.tp is None:
        return nn.Embedding(config.vocab_size, config.hidden_size)
    return VocabParallelEmbedding(config.vocab_size, config.hidden_size, groups=groups)


class LearnedPositions(nn.Module):
    """A table of positions [max_seq_len, D], whole on every rank of the tp axis."""

    def __init__(self, config: ModelConfig, groups: ModelParallel) -> None:
        super().__init__()
        shape = (config.max_seq_len, config.hidden_size)
        self.weight = (
            nn.Parameter(torch.empty(shape))
            if groups.tp is None
            else empty_parameter(*shape, mesh=groups.tp, placement=Replicate())
        )
        self.sequence_parallel = groups.sequence_parallel

    def forward(self, positions: Tensor | None, seq_len: int, tokens: Tensor | None) -> Tensor:
        """positions [B, T] int64 (None: 0, 1, ... seq_len - 1) to [B or 1, T, D]; of tokens only, where given."""
        weight = local_shard(self.weight, grad="partial" if self.sequence_parallel else "replicated")
        if positions is None:
            return weight[None, :seq_len] if tokens is None else weight[None, tokens]
        return F.embedding(positions if tokens is None else positions[:, tokens], weight)


class LMHead(nn.Module):
    """Logits from hidden states. With tied embeddings it has no parameter of its own: the table is handed to it.

    One parameter under one name is what makes tying safe: nothing that shards, copies or saves parameters can untie it.
    """

    weight: nn.Parameter | None  # [V, D]; None: tied

    def __init__(self, config: ModelConfig, groups: ModelParallel) -> None:
        super().__init__()
        shape = (config.vocab_size, config.hidden_size)
        weight = None
        if not config.tie_embeddings and groups.tp is None:
            weight = nn.Parameter(torch.empty(shape))
        elif not config.tie_embeddings and groups.tp is not None:
            weight = empty_parameter(*shape, mesh=groups.tp, placement=Shard(0))
        self.register_parameter("weight", weight)
        self.vocab_size = config.vocab_size
        self.sequence_parallel = groups.sequence_parallel
        self.axis = None if groups.tp is None else Axis.of(groups.tp)
        self.product: Callable[[Tensor, Tensor], Tensor] = F.linear  # models/invariant.py replaces it

    def inputs(self, hidden: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        """From the residual stream and the parameter [V, D] to what this rank multiplies: [B, T, D] and its words."""
        if self.axis is None:
            return hidden, weight
        return enter(hidden, self.axis, sequence_parallel=self.sequence_parallel), local_shard(weight, grad="sharded")

    def forward(self, hidden: Tensor, weight: Tensor) -> Tensor:
        """hidden [..., D] and weight [V, D] (this head's own or the embedding's), as `inputs` gave them, to logits
        [..., V] of all words."""
        logits = self.product(hidden, weight)
        if self.axis is None:
            return logits
        if not logits.numel():  # a step in serving that only brings prompts further
            return logits.new_empty(*logits.shape[:-1], self.vocab_size)
        # Equal slices travel: the last ranks may have fewer words.
        largest = -(-self.vocab_size // self.axis.size)
        padded = F.pad(logits, (0, largest - logits.shape[-1]))
        return all_gather_alike(padded, self.axis, dim=logits.ndim - 1)[..., : self.vocab_size]

    @torch.no_grad()
    def logprobs(self, hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        """Log-probabilities [N] of tokens targets [N] int64 after hidden [N, D], of words that lie over tp, in fp32 or
        above. No logits travel: three numbers a row do."""
        assert self.axis is not None
        logits = F.linear(hidden, weight)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        first, last = chunk_bounds(self.vocab_size, self.axis.size, self.axis.rank)
        mine = (targets >= first) & (targets < last)
        chosen = logits.gather(-1, torch.where(mine, targets - first, 0)[:, None])[:, 0]
        top = maximum(logits.amax(-1), self.axis)
        total, chosen = all_reduce(
            torch.stack([(logits - top[:, None]).exp().sum(-1), torch.where(mine, chosen - top, 0.0)]), self.axis
        )
        return chosen - total.log()


class ScoreHead(LMHead):
    """One number of each token in place of logits: what an answer that ends there is worth. Whole on every rank of tp.

    Its parameter [1, D] is `score.weight` of transformers' models for sequence classification with one label.
    """

    def __init__(self, config: ModelConfig, groups: ModelParallel) -> None:
        super().__init__(replace(config, tie_embeddings=True), groups)
        shape = (1, config.hidden_size)
        if groups.tp is None:
            self.weight = nn.Parameter(torch.empty(shape))
        else:
            self.weight = empty_parameter(*shape, mesh=groups.tp, placement=Replicate())

    def inputs(self, hidden: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        """From the residual stream and the parameter [1, D] to [B, T, D] and [1, D], the same on every rank of tp and
        used alike."""
        if self.axis is None:
            return hidden, weight
        if self.sequence_parallel:
            hidden = all_gather_alike(hidden, self.axis, dim=SEQUENCE_DIM)
        return hidden, local_shard(weight, grad="replicated")

    def forward(self, hidden: Tensor, weight: Tensor) -> Tensor:
        """hidden [..., D] and weight [1, D] to [..., 1]."""
        return self.product(hidden, weight)
