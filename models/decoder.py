"""The decoder: one class for every family, a setting of ModelConfig each."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from models.config import ModelConfig
from models.initializers import Constant, Initializer, Normal
from models.layers import serving
from models.layers.attention import Attention, Context, build_context
from models.layers.dropout import Dropout
from models.layers.embedding import LearnedPositions, LMHead, ScoreHead, make_embedding
from models.layers.embedding_noise import EmbeddingNoise
from models.layers.mla import LatentAttention
from models.layers.mlp import MLP
from models.layers.moe import MoE
from models.layers.mtp import LookAhead
from models.layers.norm import make_norm
from models.layers.paged_cache import PagedCache
from parallel.cut import Cut
from parallel.groups import NO_GROUPS, ModelParallel
from parallel.pipeline.stages import Stage, make_stages

RESIDUAL_OUTPUTS = ("attention.o.weight", "mlp.down.weight", "mlp.experts.down.weight", "mlp.shared.down.weight")


class Block(nn.Module):
    """Attention and feed-forward network, each on a residual branch, normalised before (pre-norm) or after the sum."""

    def __init__(self, config: ModelConfig, layer: int, seed: int, groups: ModelParallel) -> None:
        super().__init__()
        self.norm_first = config.norm_first
        self.attention_norm = make_norm(config, groups)
        self.attention: Attention | LatentAttention
        if config.mla.kv_rank:
            self.attention = LatentAttention(config, layer, seed, groups)
        else:
            self.attention = Attention(config, layer, seed, groups)
        self.mlp_norm = make_norm(config, groups)
        self.mlp: MLP | MoE = MLP(config, groups)
        self.attention_dropout, self.mlp_dropout = (
            Dropout(config.dropout, seed=seed, site=f"blocks.{layer}.{branch}", max_seq_len=config.max_seq_len)
            for branch in ("attention", "mlp")
        )

    def forward(self, x: Tensor, *, context: Context) -> Tensor:
        """x [B, T, D] to [B, T, D]; context is the same for every block of a forward pass.

        With sequence parallelism x has this rank's slice of the T tokens.
        """
        keys = (context.samples, context.tokens)
        if self.norm_first:
            y, x = self.begin_branch(self.attention_norm, x)
            y = self.attention_dropout(self.attention(y, context), *keys)
            y, x = self.begin_branch(self.mlp_norm, x, y)
            return x + self.mlp_dropout(self.mlp(y), *keys)
        x = self.attention_norm(x + self.attention_dropout(self.attention(x, context), *keys))
        return self.mlp_norm(x + self.mlp_dropout(self.mlp(x), *keys))

    def begin_branch(self, norm: nn.Module, x: Tensor, branch: Tensor | None = None) -> tuple[Any, Tensor]:
        """Pre-norm: the input of a branch, the norm of the stream, and the stream: x, or where an earlier branch ends
        x + branch. fp8 replaces it (models/fp8_producers.py)."""
        x = x if branch is None else x + branch
        return norm(x), x


class MoEBlock(Block):
    """A pre-norm block with a mixture of experts. `routing` adds up what was reported in training.

    A hook takes the report from the output: hooks stay outside of what is recomputed in backward or compiled, so each
    forward pass counts once, and whoever calls the block sees a block.
    """

    routing: Tensor | None = None  # [E + len(REPORT)] fp32 (models/layers/router.py); reset by who reads it
    mlp: MoE

    def __init__(self, config: ModelConfig, layer: int, seed: int, groups: ModelParallel) -> None:
        super().__init__(config, layer, seed, groups)
        self.mlp = MoE(config, layer, seed, groups)
        self.register_forward_hook(_keep_report)

    def forward(self, x: Tensor, *, context: Context) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        """x [B, T, D] to [B, T, D] and the router's report; a call of the block returns the first alone."""
        keys = (context.samples, context.tokens)
        y, x = self.begin_branch(self.attention_norm, x)
        y = self.attention_dropout(self.attention(y, context), *keys)
        y, x = self.begin_branch(self.mlp_norm, x, y)
        y, report = self.mlp(y, samples=context.samples, indices=context.indices, aux_scale=context.aux_scale)
        return x + self.mlp_dropout(y, *keys), report


def _keep_report(block: MoEBlock, _args: tuple[Tensor, ...], output: tuple[Tensor, Tensor]) -> Tensor:
    x, report = output
    if block.training:
        block.routing = report if block.routing is None else block.routing + report
    return x


class MTPBlock(Block):
    """A block of multi-token prediction: from hidden states and the embeddings of later tokens to hidden states.

    Its own final norm is its last step: what goes into the head is also what the next of these blocks starts from.
    """

    def __init__(self, config: ModelConfig, layer: int, seed: int, groups: ModelParallel) -> None:
        super().__init__(config, layer, seed, groups)
        self.look_ahead = LookAhead(config, groups)
        self.output_norm = make_norm(config, groups)

    def forward(self, x: Tensor, embedded: Tensor, *, context: Context) -> Tensor:  # type: ignore[override]
        """x and embedded [B, T, D] of the residual stream to [B, T, D]."""
        return self.output_norm(super().forward(self.look_ahead(x, embedded), context=context))


class MTPMoEBlock(MoEBlock):
    """`MTPBlock` with a mixture of experts."""

    def __init__(self, config: ModelConfig, layer: int, seed: int, groups: ModelParallel) -> None:
        super().__init__(config, layer, seed, groups)
        self.look_ahead = LookAhead(config, groups)
        self.output_norm = make_norm(config, groups)

    def forward(  # type: ignore[override]
        self, x: Tensor, embedded: Tensor, *, context: Context
    ) -> tuple[Tensor, Tensor]:
        x, report = super().forward(self.look_ahead(x, embedded), context=context)
        return self.output_norm(x), report


Head = Callable[[Tensor, Tensor], Tensor]
"""What is made of hidden states [B, T, D] and the weight of the output layer [V, D]."""


class Decoder(nn.Module):
    """A causal language model. Filling its parameters, and buffers (biases of routers), after `to_empty` completes it.

    `config` is resolved (models.registry.resolve_model); `seed` keys the dropout masks; `groups` are the process groups
    inside the layers. Names and whole shapes of the tensors in its state dict do not depend on them; among its
    parameters, projections of one input are fused (parallel/fused.py). `stages`: those of a pipeline
    that this rank holds (None: the whole model); parameters of others do not exist here, names are the same.
    """

    batch_invariant = False  # models.invariant.make_batch_invariant sets it
    served: Any = None  # models.served_adapters.ServedAdapters, where tokens have adapters of their own
    adapted = False  # layers multiply with more than their weights; models/lora.py, models/served_adapters.py

    def __init__(
        self,
        config: ModelConfig,
        seed: int = 0,
        groups: ModelParallel = NO_GROUPS,
        *,
        stages: Sequence[Stage] | None = None,
    ) -> None:
        super().__init__()
        self.config = config
        self.groups = groups
        stages = make_stages([config.num_layers]) if stages is None else stages
        first, last = any(s.is_first for s in stages), any(s.is_last for s in stages)
        embeds = first or (last and config.embeds_last)
        self.embedding = make_embedding(config, groups) if embeds else None
        self.embedding_noise: EmbeddingNoise | None = None  # trainer/build.py sets it, with recipe.neftune_alpha
        learned = config.positions == "learned" and first
        self.positions = LearnedPositions(config, groups) if learned else None
        self.dropout = Dropout(config.dropout, seed=seed, site="embedding", max_seq_len=config.max_seq_len)
        self.blocks = nn.ModuleList()  # named by layer, as in the whole model
        for layer in sorted(layer for stage in stages for layer in range(stage.start, stage.stop)):
            kind = MoEBlock if config.moe.in_layer(layer) else Block
            self.blocks.add_module(str(layer), kind(config, layer, seed, groups))
        for layer in range(config.num_layers, config.num_blocks) if last else ():
            kind = MTPMoEBlock if config.moe.in_layer(layer) else MTPBlock
            self.blocks.add_module(str(layer), kind(config, layer, seed, groups))
        self.final_norm = (make_norm(config, groups) if config.final_norm else nn.Identity()) if last else None
        self.head = (ScoreHead if config.score else LMHead)(config, groups) if last else None

    def forward(
        self,
        tokens: Tensor,
        *,
        positions: Tensor | None = None,
        documents: Tensor | None = None,
        samples: Tensor | None = None,
        indices: Tensor | None = None,
        cut: Cut | None = None,
        aux_scale: Tensor | None = None,
        head: Head | None = None,
        ahead: Sequence[tuple[Tensor, Head]] = (),
        stage: Stage | None = None,
        hidden: Tensor | None = None,
        cache: PagedCache | None = None,
    ) -> Tensor:
        """Logits [B, T, V] of tokens [B, T] int64, or head(hidden [B, T, D], weight [V, D]) where a head is given.

        positions [B, T] int64 (None: 0, 1, ...), documents [B, T] int32 (None: attention crosses documents), samples
        [B] int64 (needed by dropout in training). indices [T] int64 says that these are only some tokens of sequences
        of S, the others being on other ranks of groups as `cut` says; documents are then [B, S]. None: all are here,
        and nothing is asked of other ranks, whatever groups there are. aux_scale 0-d is the gradient of the loss by
        routers' auxiliary losses (None: they have none). A fused loss comes in as `head`, so that it runs inside the
        forward of the root module, where FSDP has gathered the weight. With tensor parallelism a head gets all tokens
        and this rank's words of the weight, [V/R, D]; without one the logits are of all words. ahead: run the blocks of
        multi-token prediction, k from 1 on with the tokens [B, T] that lie k places later, and a head; the result is
        then a stack of all heads' results, the first that of `head`. stage: run only this one, from `hidden`
        [B, T, D] unless it is the first, to hidden states unless it is the last; None: all layers. cache: tokens [1, T]
        are of several sequences, whose keys and values are kept there (models/layers/paged_cache.py); positions are
        then needed. Raises ValueError for a sequence longer than the table of learned positions.
        """
        seq_len = tokens.shape[1] if cache is None else cache.max_seq_len
        if indices is not None:
            seq_len *= self.groups.cp_size  # of the whole sequence
            positions = indices[None] if positions is None else positions
        x = self._embed(tokens) if hidden is None else hidden
        context = build_context(
            self.config,
            seq_len=seq_len,
            device=x.device,
            dtype=x.dtype,
            positions=positions,
            documents=documents,
            samples=samples,
            indices=indices,
            cut=cut,
            cache=cache,
            groups=self.groups,
            batch_invariant_rows=len(x) if self.batch_invariant else None,
        )._replace(aux_scale=aux_scale)
        if hidden is None:
            if self.embedding_noise is not None:
                x = self.embedding_noise(x, samples=samples, documents=documents, tokens=context.tokens)
            if self.positions is not None:
                x = x + self._learned_positions(positions, seq_len, context.tokens)
            x = self.dropout(x, samples, context.tokens)
        x = self._through_blocks(x, context, stage=stage, cache=cache)
        if stage is not None and not stage.is_last:
            return x
        return self._results(x, context, head=head, ahead=ahead)

    def _through_blocks(self, x: Tensor, context: Context, *, stage: Stage | None, cache: PagedCache | None) -> Tensor:
        """[B, T, D] behind the blocks of a stage, and on the last behind the final norm."""
        fused = cache is not None and cache.fused and not self.adapted
        if fused and serving.obstacle(self.config, self.groups) is None:
            blocks = (self.blocks.get_submodule(str(layer)) for layer in range(self.config.num_layers))
            return serving.serve(blocks, self.final_norm, x, context)
        for layer, block in self.blocks.named_children():
            if int(layer) < self.config.num_layers and (stage is None or stage.start <= int(layer) < stage.stop):
                x = block(x, context=context)
        if stage is not None and not stage.is_last:
            return x
        assert self.final_norm is not None
        return self.final_norm(x)

    def _results(
        self, x: Tensor, context: Context, *, head: Head | None, ahead: Sequence[tuple[Tensor, Head]]
    ) -> Tensor:
        """What the heads make of x [B, T, D] and of the blocks of multi-token prediction behind it."""
        assert self.head is not None
        table = self.output_weight()
        results = [(head or self.head)(*self.head.inputs(x, table))]
        for number, (later, its_head) in enumerate(ahead, start=self.config.num_layers):
            x = self.blocks.get_submodule(str(number))(x, self._embed(later), context=context)
            results.append(its_head(*self.head.inputs(x, table)))
        return torch.stack(results) if ahead else results[0]

    def _embed(self, tokens: Tensor) -> Tensor:
        """[B, T] to [B, T, D] of the residual stream."""
        assert self.embedding is not None
        return self.embedding(tokens)

    def output_weight(self) -> Tensor:
        """The parameter of the output layer, [V, D]."""
        assert self.head is not None
        return self._table() if self.head.weight is None else self.head.weight

    def _table(self) -> Tensor:
        """The embedding's weight [V, D], which a tied head shares."""
        assert self.embedding is not None
        assert isinstance(self.embedding.weight, Tensor)
        return self.embedding.weight

    def _learned_positions(self, positions: Tensor | None, seq_len: int, tokens: Tensor | None) -> Tensor:
        """[B or 1, T, D], of the tokens of the residual stream: with sequence parallelism this rank's slice."""
        assert self.positions is not None
        if seq_len > self.config.max_seq_len:
            raise ValueError(
                f"a sequence of {seq_len} tokens is longer than model.max_seq_len={self.config.max_seq_len}, "
                "the rows of the learned position table"
            )
        if positions is None:
            return self.positions(None, seq_len, tokens)
        if self.groups.tp is not None and self.groups.sequence_parallel:
            positions = positions.chunk(self.groups.tp.size(), dim=1)[self.groups.tp.get_local_rank()]
        return self.positions(positions, seq_len, None)

    def initializers(self) -> dict[str, Initializer]:
        """How each parameter starts, by name: normal(init_std), biases and sinks 0, norm weights 1.

        The output projections of the 2 * num_layers residual branches get init_std / sqrt(2 * num_layers), so that the
        variance of the residual stream does not grow with depth (GPT-2, section 2.3).
        """
        std = self.config.init_std
        residual_std = std / math.sqrt(2 * self.config.num_layers)

        def of(name: str) -> Initializer:
            if name.endswith((".bias", "attention.sinks")):
                return Constant(0.0)
            if name.endswith("norm.weight"):
                return Constant(1.0)
            return Normal(residual_std if name.endswith(RESIDUAL_OUTPUTS) else std)

        return {name: of(name) for name in self.state_dict()}
