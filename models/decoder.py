"""The decoder: one class for every family, a setting of ModelConfig each."""

from __future__ import annotations

import math
from collections.abc import Callable

from torch import Tensor, nn

from models.config import ModelConfig
from models.initializers import Constant, Initializer, Normal
from models.layers.attention import Attention, Context, build_context
from models.layers.dropout import Dropout
from models.layers.embedding import LearnedPositions, LMHead, make_embedding
from models.layers.mlp import MLP
from models.layers.norm import make_norm
from parallel.groups import NO_GROUPS, ModelParallel

RESIDUAL_OUTPUTS = ("attention.o.weight", "mlp.down.weight")


class Block(nn.Module):
    """Attention and feed-forward network, each on a residual branch, normalised before (pre-norm) or after the sum."""

    def __init__(self, config: ModelConfig, layer: int, seed: int, groups: ModelParallel) -> None:
        super().__init__()
        self.norm_first = config.norm_first
        self.attention_norm = make_norm(config, groups)
        self.attention = Attention(config, layer, seed, groups)
        self.mlp_norm = make_norm(config, groups)
        self.mlp = MLP(config, groups)
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
            x = x + self.attention_dropout(self.attention(self.attention_norm(x), context), *keys)
            return x + self.mlp_dropout(self.mlp(self.mlp_norm(x)), *keys)
        x = self.attention_norm(x + self.attention_dropout(self.attention(x, context), *keys))
        return self.mlp_norm(x + self.mlp_dropout(self.mlp(x), *keys))


class Decoder(nn.Module):
    """A causal language model. Parameters only, no buffers: filling the parameters after `to_empty` completes it.

    `config` is resolved (models.registry.resolve_model); `seed` keys the dropout masks; `groups` are the process groups
    inside the layers. Names and whole shapes of the parameters do not depend on them.
    """

    def __init__(self, config: ModelConfig, seed: int = 0, groups: ModelParallel = NO_GROUPS) -> None:
        super().__init__()
        self.config = config
        self.groups = groups
        self.embedding = make_embedding(config, groups)
        self.positions = LearnedPositions(config, groups) if config.positions == "learned" else None
        self.dropout = Dropout(config.dropout, seed=seed, site="embedding", max_seq_len=config.max_seq_len)
        self.blocks = nn.ModuleList(Block(config, layer, seed, groups) for layer in range(config.num_layers))
        self.final_norm = make_norm(config, groups) if config.final_norm else nn.Identity()
        self.head = LMHead(config, groups)

    def forward(
        self,
        tokens: Tensor,
        *,
        positions: Tensor | None = None,
        documents: Tensor | None = None,
        samples: Tensor | None = None,
        head: Callable[[Tensor, Tensor], Tensor] | None = None,
    ) -> Tensor:
        """Logits [B, T, V] of tokens [B, T] int64, or head(hidden [B, T, D], weight [V, D]) where a head is given.

        positions [B, T] int64 (None: 0, 1, ...), documents [B, T] int32 (None: attention crosses documents), samples
        [B] int64 (needed by dropout in training). A fused loss comes in as `head`, so that it runs inside the
        forward of the root module, where FSDP has gathered the weight. With tensor parallelism a head gets all tokens
        and this rank's words of the weight, [V/R, D]; without one the logits are of all words. Raises ValueError for a
        sequence longer than the table of learned positions.
        """
        seq_len = tokens.shape[1]
        x = self.embedding(tokens)
        context = build_context(
            self.config,
            seq_len=seq_len,
            device=x.device,
            dtype=x.dtype,
            positions=positions,
            documents=documents,
            samples=samples,
            groups=self.groups,
        )
        if self.positions is not None:
            x = x + self._learned_positions(positions, seq_len, context.tokens)
        x = self.dropout(x, samples, context.tokens)
        for block in self.blocks:
            x = block(x, context=context)
        x = self.final_norm(x)
        table = self.embedding.weight if self.head.weight is None else self.head.weight
        assert isinstance(table, Tensor)
        x, weight = self.head.inputs(x, table)
        return self.head(x, weight) if head is None else head(x, weight)

    def _learned_positions(self, positions: Tensor | None, seq_len: int, tokens: Tensor | None) -> Tensor:
        """[B or 1, T, D], of the tokens of the residual stream (Context.tokens)."""
        assert self.positions is not None
        if seq_len > self.config.max_seq_len:
            raise ValueError(
                f"a sequence of {seq_len} tokens is longer than model.max_seq_len={self.config.max_seq_len}, "
                "the rows of the learned position table"
            )
        return self.positions(positions, seq_len, tokens)

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
