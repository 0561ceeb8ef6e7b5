"""The decoder: one class for every family, a setting of ModelConfig each."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from torch import Tensor, nn

from models.config import ModelConfig
from models.initializers import Constant, Initializer, Normal
from models.layers.attention import Attention, Context, build_context
from models.layers.dropout import Dropout
from models.layers.embedding import LMHead
from models.layers.mlp import MLP
from models.layers.norm import make_norm
from parallel.pipeline.stages import Stage, make_stages

RESIDUAL_OUTPUTS = ("attention.o.weight", "mlp.down.weight")


class Block(nn.Module):
    """Attention and feed-forward network, each on a residual branch, normalised before (pre-norm) or after the sum."""

    def __init__(self, config: ModelConfig, layer: int, seed: int) -> None:
        super().__init__()
        self.norm_first = config.norm_first
        self.attention_norm = make_norm(config)
        self.attention = Attention(config, layer, seed)
        self.mlp_norm = make_norm(config)
        self.mlp = MLP(config)
        self.attention_dropout, self.mlp_dropout = (
            Dropout(config.dropout, seed=seed, site=f"blocks.{layer}.{branch}", max_seq_len=config.max_seq_len)
            for branch in ("attention", "mlp")
        )

    def forward(self, x: Tensor, *, context: Context) -> Tensor:
        """x [B, T, D] to [B, T, D]; context is the same for every block of a forward pass."""
        if self.norm_first:
            x = x + self.attention_dropout(self.attention(self.attention_norm(x), context), context.samples)
            return x + self.mlp_dropout(self.mlp(self.mlp_norm(x)), context.samples)
        x = self.attention_norm(x + self.attention_dropout(self.attention(x, context), context.samples))
        return self.mlp_norm(x + self.mlp_dropout(self.mlp(x), context.samples))


class Decoder(nn.Module):
    """A causal language model. Parameters only, no buffers: filling the parameters after `to_empty` completes it.

    `config` is resolved (models.registry.resolve_model); `seed` keys the dropout masks. `stages`: those of a pipeline
    that this rank holds (None: the whole model); parameters of others do not exist here, names are the same.
    """

    def __init__(self, config: ModelConfig, seed: int = 0, *, stages: Sequence[Stage] | None = None) -> None:
        super().__init__()
        self.config = config
        stages = make_stages([config.num_layers]) if stages is None else stages
        first, last = any(s.is_first for s in stages), any(s.is_last for s in stages)
        embeds = first or (last and config.tie_embeddings)
        self.embedding = nn.Embedding(config.vocab_size, config.hidden_size) if embeds else None
        learned = config.positions == "learned" and first
        self.positions = nn.Embedding(config.max_seq_len, config.hidden_size) if learned else None
        self.dropout = Dropout(config.dropout, seed=seed, site="embedding", max_seq_len=config.max_seq_len)
        self.blocks = nn.ModuleList()  # named by layer, as in the whole model
        for layer in sorted(layer for stage in stages for layer in range(stage.start, stage.stop)):
            self.blocks.add_module(str(layer), Block(config, layer, seed))
        self.final_norm = (make_norm(config) if config.final_norm else nn.Identity()) if last else None
        self.head = LMHead(config) if last else None

    def forward(
        self,
        tokens: Tensor,
        *,
        positions: Tensor | None = None,
        documents: Tensor | None = None,
        samples: Tensor | None = None,
        head: Callable[[Tensor, Tensor], Tensor] | None = None,
        stage: Stage | None = None,
        hidden: Tensor | None = None,
    ) -> Tensor:
        """Logits [B, T, V] of tokens [B, T] int64, or head(hidden [B, T, D], weight [V, D]) where a head is given.

        positions [B, T] int64 (None: 0, 1, ...), documents [B, T] int32 (None: attention crosses documents), samples
        [B] int64 (needed by dropout in training). A fused loss comes in as `head`, so that it runs inside the
        forward of the root module, where FSDP has gathered the weight. stage: run only this one, from `hidden`
        [B, T, D] unless it is the first, to hidden states unless it is the last; None: all layers. Raises ValueError
        for a sequence longer than the table of learned positions.
        """
        seq_len = tokens.shape[1]
        x = self._embed(tokens) if hidden is None else hidden
        context = build_context(
            self.config,
            seq_len=seq_len,
            device=x.device,
            dtype=x.dtype,
            positions=positions,
            documents=documents,
            samples=samples,
        )
        if hidden is None:
            if self.positions is not None:
                x = x + self._learned_positions(positions, seq_len)
            x = self.dropout(x, samples)
        for layer, block in self.blocks.named_children():
            if stage is None or stage.start <= int(layer) < stage.stop:
                x = block(x, context=context)
        if stage is not None and not stage.is_last:
            return x
        assert self.final_norm is not None
        assert self.head is not None
        x = self.final_norm(x)
        weight = self.head.weight if self.head.weight is not None else self._table()
        return self.head(x, weight) if head is None else head(x, weight)

    def _embed(self, tokens: Tensor) -> Tensor:
        """[B, T] to [B, T, D]."""
        assert self.embedding is not None
        return self.embedding(tokens)

    def _table(self) -> Tensor:
        """The embedding's weight [V, D], which a tied head shares."""
        assert self.embedding is not None
        return self.embedding.weight

    def _learned_positions(self, positions: Tensor | None, seq_len: int) -> Tensor:
        """[B or 1, T, D]."""
        assert self.positions is not None
        if seq_len > self.config.max_seq_len:
            raise ValueError(
                f"a sequence of {seq_len} tokens is longer than model.max_seq_len={self.config.max_seq_len}, "
                "the rows of the learned position table"
            )
        if positions is None:
            return self.positions.weight[None, :seq_len]
        return self.positions(positions)

    def initializers(self) -> dict[str, Initializer]:
        """How each parameter starts, by name: normal(init_std), biases 0, norm weights 1.

        The output projections of the 2 * num_layers residual branches get init_std / sqrt(2 * num_layers), so that the
        variance of the residual stream does not grow with depth (GPT-2, section 2.3).
        """
        std = self.config.init_std
        residual_std = std / math.sqrt(2 * self.config.num_layers)

        def of(name: str) -> Initializer:
            if name.endswith(".bias"):
                return Constant(0.0)
            if name.endswith("norm.weight"):
                return Constant(1.0)
            return Normal(residual_std if name.endswith(RESIDUAL_OUTPUTS) else std)

        return {name: of(name) for name, _ in self.named_parameters()}
