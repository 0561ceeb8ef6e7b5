"""Self-attention of a block, and what all blocks share of it in one forward pass.

B batch, T tokens, D hidden_size, H query heads, G key/value heads, K head_dim.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.tensor import Shard

from kernels.attention import flex, fused, reference, sdpa
from kernels.attention.alibi import slopes as alibi_slopes
from kernels.attention.blockwise import BlockAttention
from kernels.attention.fused_blockwise import FusedBlockAttention, KeptMasks
from kernels.attention.sinks import with_sinks
from models.config import ModelConfig
from models.layers import rope
from models.layers.as_served import Runs, runs_of, value_as_served
from models.layers.context_attention import ContextAttention, runs_on_context
from models.layers.dropout import Dropout
from models.layers.linear import column_linear, fused_column_linear, row_linear
from models.layers.norm import make_head_norm
from models.layers.paged_cache import PagedCache
from parallel.cut import Cut
from parallel.fused import stands_for
from parallel.groups import NO_GROUPS, ModelParallel
from parallel.tensor import empty_parameter, local_shard, project


class Context(NamedTuple):
    """What every block of one forward pass needs besides its input; a pytree. Filled by `build_context`."""

    implementation: str  # reference, sdpa, flex or triton; paged: the cache's
    cos: Tensor | None  # [B or 1, T, 1, K/2] fp32; None: no rope
    sin: Tensor | None
    mask: Any  # of layers without a window: None, Tensor (sdpa), BlockMask (flex) or Mask (triton)
    window_mask: Any  # of layers with the window
    slopes: Tensor | None  # [H] fp32, of the heads that are computed here; None: no ALiBi
    documents: Tensor | None  # [B, S]: of the whole sequence, S = T unless context-parallel
    indices: Tensor | None  # [T]: where the tokens lie in the sequence; None: all of it is here
    samples: Tensor | None  # [B], the key of dropout
    cut: Cut | None = None  # which tokens each rank of cp_ring holds; None: zigzag
    tokens: Tensor | None = None  # [T of the residual stream] int64, their index in the sequence; None: 0, 1, ...
    aux_scale: Tensor | None = None  # 0-d, gradient of the training loss by auxiliary losses; filled by Decoder.forward
    cache: PagedCache | None = None  # in serving: keys and values of earlier tokens; None: those of this pass are all
    block_masks: KeptMasks | None = None  # of the triton implementation between parts of a sequence
    runs: Runs | None = None  # without a cache, of a batch-invariant model: attend as with one (models/invariant.py)


# What model.attention=auto takes: the first that can run. The one place where measurements decide (H200, bf16, heads of
# 64 and 128; benchmarks/roofline/attention.py). cuDNN, which sdpa takes, is the fastest for plain causal attention
# (triton has 0.84 to 0.96 of its speed) and has no kernel for anything else; of what has, triton has 1.19 to 1.84 times
# the speed of flex with windows and documents.
PREFERRED_PLAIN = ("sdpa", "reference")  # causal, and everything where there is no CUDA
PREFERRED_MASKED = ("triton", "flex", "sdpa", "reference")  # on CUDA: documents, windows, sinks, parts of a ring


class AttentionChoice(NamedTuple):
    """An implementation; as a string, what run.json says of it."""

    name: str
    why: str = ""  # where model.attention=auto left it open

    def __str__(self) -> str:
        return f"{self.name} (auto: {self.why})" if self.why else self.name


def choose_attention(
    config: ModelConfig,
    device: torch.device,
    dtype: torch.dtype,
    *,
    documents: bool = False,
    cp_method: str | None = None,
) -> AttentionChoice:
    """The implementation that runs: what model.attention=auto means on `device`, with or without document masks.

    dtype: of activations. On CUDA, sdpa for plain causal attention and triton where a window, documents, sinks or the
    blocks of a split sequence have no kernel of cuDNN's; elsewhere sdpa. Where these have none for a dtype, a size of
    heads or sinks, the next that can. Across a sequence that is split by cp_method, one that the method runs on (see
    `runs_on_context`). Raises ValueError for an implementation that is asked for and does not run.
    """
    obstacles = _obstacles(config, device, dtype)
    possible = tuple(obstacles)
    if cp_method is not None:
        possible = runs_on_context(config.attention, cp_method, sinks=config.attention_sinks)
    if config.attention != "auto":
        if obstacle := obstacles[config.attention]:
            raise ValueError(f"model.attention={config.attention} {obstacle}; use model.attention=auto or reference")
        return AttentionChoice(config.attention)
    elsewhere = f"does not run under parallel.cp_method={cp_method}"
    obstacles |= {name: obstacles[name] or elsewhere for name in obstacles if name not in possible}
    asked = {
        "documents": documents,
        "a sliding window": config.sliding_window is not None,
        "attention sinks": config.attention_sinks,
        "keys of other ranks": cp_method not in (None, "ulysses"),
    }
    needs = [name for name, needed in asked.items() if needed]
    preferred: tuple[str, ...] = PREFERRED_PLAIN
    if device.type != "cuda":
        why = f"on {device.type}"
    elif needs:
        preferred, why = PREFERRED_MASKED, f"{', '.join(needs)}, for which cuDNN has no kernel"
    elif config.positions == "alibi":
        why = "ALiBi, as a mask in memory"
    else:
        why = "plain causal attention, cuDNN's where it can"
    chosen = next(name for name in preferred if obstacles[name] is None)
    passed_over = [f"{name} {obstacles[name]}" for name in preferred[: preferred.index(chosen)]]
    return AttentionChoice(chosen, "; ".join([why, *passed_over]))


def _obstacles(config: ModelConfig, device: torch.device, dtype: torch.dtype) -> dict[str, str | None]:
    """By implementation, why it cannot run on one rank; None: it can."""
    assert config.head_dim is not None
    assert config.value_dim is not None  # resolved
    obstacles = {
        "triton": fused.obstacle(device, dtype, config.head_dim, config.value_dim),
        "flex": flex.obstacle(device, config.head_dim, config.value_dim),
        "sdpa": sdpa.obstacle(device, dtype, config.head_dim, config.value_dim),
        "reference": None,
    }
    if config.attention_sinks:
        obstacles["sdpa"] = "does not return the log-sum-exp that model.attention_sinks=true needs"
    return obstacles


def build_context(
    config: ModelConfig,
    *,
    seq_len: int,
    device: torch.device,
    dtype: torch.dtype,
    positions: Tensor | None,
    documents: Tensor | None,
    samples: Tensor | None,
    indices: Tensor | None = None,
    cut: Cut | None = None,
    cache: PagedCache | None = None,
    groups: ModelParallel = NO_GROUPS,
    batch_invariant_rows: int | None = None,
) -> Context:
    """Tables and masks of a forward pass over sequences of seq_len; positions None: 0, 1, ... dtype: of activations.

    indices [T]: this rank has those tokens of each sequence; the others are on other ranks of groups, as
    `cut` says. With tensor parallelism slopes are those of this rank's heads. With a cache, seq_len is
    that of the longest sequence. batch_invariant_rows: B, of a batch-invariant model (models/invariant.py); None: it
    is an ordinary one.
    """
    if positions is None:
        positions = torch.arange(seq_len, device=device)[None]
    cp_method = groups.cp_method if indices is not None and groups.cp_size > 1 else None
    implementation = "paged"
    if cache is None:
        choice = choose_attention(config, device, dtype, documents=documents is not None, cp_method=cp_method)
        implementation = choice.name
    slopes = None if cache is None else cache.slopes
    if slopes is None and config.positions == "alibi":
        slopes = alibi_slopes(config.num_heads, device)
    if slopes is not None and groups.tp is not None:
        slopes = slopes.chunk(groups.tp.size())[groups.tp.get_local_rank()]
    if slopes is not None and cp_method is not None and groups.cp_ulysses is not None:
        slopes = slopes.chunk(groups.cp_ulysses.size())[groups.cp_ulysses.get_local_rank()]
    cos = sin = None
    if config.positions == "rope":
        assert config.rotary_dim is not None  # resolved
        known, invariant = None if cache is None else cache.frequencies, batch_invariant_rows is not None
        cos, sin = rope.tables(config.rope, config.rotary_dim, positions, seq_len, known, batch_invariant=invariant)

    runs = None
    if batch_invariant_rows is not None and cache is None:
        runs = runs_of(batch_invariant_rows, seq_len, documents, device)
    in_blocks = cp_method is not None and groups.cp_ring is not None

    def build(window: int | None) -> Any:
        if implementation == "sdpa":
            return sdpa.build_mask(seq_len, device, dtype, window=window, documents=documents, slopes=slopes)
        if implementation == "flex":
            return flex.build_block_mask(seq_len, device, window=window, documents=documents)
        if implementation == "triton" and not in_blocks:
            return fused.build_mask(seq_len, device, window=window, documents=documents)
        return None  # the reference makes its own, and so do blocks and the cache

    windows = {config.window_of(layer) for layer in range(config.num_blocks)}
    return Context(
        implementation=implementation,
        cos=cos,
        sin=sin,
        mask=build(None) if None in windows else None,
        window_mask=build(config.sliding_window) if config.sliding_window in windows - {None} else None,
        slopes=slopes,
        documents=documents,
        indices=indices,
        samples=samples,
        cut=cut,
        tokens=_residual_tokens(seq_len, indices, device, groups),
        cache=cache,
        block_masks=KeptMasks() if in_blocks and implementation == "triton" else None,
        runs=runs,
    )


def _residual_tokens(
    seq_len: int, indices: Tensor | None, device: torch.device, groups: ModelParallel
) -> Tensor | None:
    """Context.tokens: with sequence parallelism each rank's residual stream has its slice of the tokens here."""
    if groups.tp is None or not groups.sequence_parallel:
        return indices
    here = torch.arange(seq_len, device=device) if indices is None else indices
    return here.chunk(groups.tp.size())[groups.tp.get_local_rank()]


class Attention(nn.Module):
    """Causal self-attention with grouped key/value heads (GQA, 2305.13245). [B, T, D] to [B, T, D].

    q, k and v are one layer, `qkv`, unless model.fused_projections=false, or ranks of tp share key/value heads: what
    is whole on several ranks and what is cut cannot be one DTensor.
    """

    def __init__(self, config: ModelConfig, layer: int, seed: int, groups: ModelParallel = NO_GROUPS) -> None:
        super().__init__()
        self.across = ContextAttention(groups) if groups.cp_size > 1 else None
        assert config.head_dim is not None  # resolved
        assert config.num_kv_heads is not None
        self.head_dim = config.head_dim
        self.num_heads = config.num_heads
        self.layer, self.window = layer, config.window_of(layer)
        inner, inner_kv = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
        # With fewer key/value heads than tp ranks, neighbours share one: those whose query heads attend to it.
        ranks = 1 if groups.tp is None else groups.tp.size()
        shared_by = max(1, ranks // config.num_kv_heads)
        hidden, bias = config.hidden_size, config.qkv_bias
        rows = {"q": inner, "k": inner_kv, "v": inner_kv}
        self.fused = config.fused_projections and shared_by == 1
        if self.fused:
            self.qkv = fused_column_linear(self, "qkv", hidden, rows, bias=bias, groups=groups)
        else:
            self.q = column_linear(hidden, inner, bias=bias, groups=groups)
            self.k = column_linear(hidden, inner_kv, bias=bias, groups=groups, shared_by=shared_by)
            self.v = column_linear(hidden, inner_kv, bias=bias, groups=groups, shared_by=shared_by)
            if config.fused_projections:
                for part in (self.q, self.k, self.v):
                    stands_for(part, "qkv")
        self.o = row_linear(inner, hidden, bias=config.attention_bias, groups=groups)
        self.q_norm = make_head_norm(config, groups) if config.qk_norm else None
        self.k_norm = make_head_norm(config, groups) if config.qk_norm else None
        self.first_head = 0 if groups.tp is None else groups.tp.get_local_rank() * (config.num_heads // ranks)
        self.sinks = make_sinks(config, groups)
        self.dropout = Dropout(
            config.attention_dropout,
            seed=seed,
            site=f"blocks.{layer}.attention.probabilities",
            max_seq_len=config.max_seq_len,
        )

    def forward(self, x: Tensor, context: Context) -> Tensor:
        q, k, v = (y.unflatten(-1, (-1, self.head_dim)) for y in self._projected(x))
        if self.fused and context.cos is not None and self.q_norm is None:
            v = v.contiguous()  # kept for backward, a view would keep q and k as they were before rope with it
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        if context.cos is not None and context.sin is not None:
            q, k = rope.rotate(q, context.cos, context.sin), rope.rotate(k, context.cos, context.sin)
        if context.cache is not None:
            output = self._attend_cached(q, k, v, context)
        elif context.runs is not None:
            output = value_as_served(
                lambda: self._attend(q, k, v, context), lambda: self._attend_cached(q, k, v, context)
            )
        elif context.indices is None:
            output = self._attend(q, k, v, context)
        else:
            output = self._attend_across(q, k, v, context)
        return self.o(output.flatten(2))

    def _projected(self, x: Tensor) -> Sequence[Tensor]:
        """q, k and v of x [B, T, D], each [B, T, heads of this rank x K]."""
        if not self.fused:
            return project(x, (self.q, self.k, self.v))
        (y,) = project(x, (self.qkv,))
        return y.split(self.qkv.parts.sizes(), dim=-1)  # type: ignore[union-attr, operator]

    def _attend_cached(
        self, q: Tensor, k: Tensor, v: Tensor | None, context: Context, *, value_dim: int | None = None
    ) -> Tensor:
        """`_attend` where tokens are in pages. v None: the first value_dim features of k."""
        pages = context.runs if context.cache is None else context.cache
        assert pages is not None
        return pages.attend(
            self.layer,
            q,
            k,
            v,
            value_dim=self.head_dim if value_dim is None else value_dim,
            scale=self.head_dim**-0.5,
            window=self.window,
            slopes=context.slopes,
            sinks=self._sinks_of(0, q.shape[2]),
        )

    def _attend_across(self, q: Tensor, k: Tensor, v: Tensor, context: Context) -> Tensor:
        """`_attend` where the sequence is split over ranks."""
        if self.across is None:
            raise ValueError("indices say that the sequence is split, but the model was built without parallel.cp")
        attend = self._attend if self.across.ring is None else self._attend_in_blocks
        return self.across.by_heads(q, k, v, partial(attend, context=context))

    def _attend_in_blocks(self, q: Tensor, k: Tensor, v: Tensor, context: Context, first_head: int) -> Tensor:
        """`_attend` with the keys of other ranks."""
        assert self.across is not None
        masked: dict[str, Any] = {"window": self.window, "documents": context.documents, "slopes": context.slopes}
        masked["dropout"] = self._dropout(context, first_head)
        if context.block_masks is None:
            blocks = BlockAttention(**masked)
        else:
            blocks = FusedBlockAttention(**masked, masks=context.block_masks)
        return self.across.by_tokens(q, k, v, blocks, self._sinks_of(first_head, q.shape[2]), context.cut)

    def _sinks_of(self, first_head: int, num_heads: int) -> Tensor | None:
        """[num_heads] of the heads of this tp rank, from the first_head-th on; None: there are no sinks."""
        if self.sinks is None:
            return None
        return local_shard(self.sinks, grad="sharded")[first_head : first_head + num_heads]

    def _dropout(self, context: Context, first_head: int = 0) -> Callable[..., Tensor] | None:
        """What drops probabilities in this pass, if anything does."""
        if not self.dropout.active:
            return None
        return partial(
            self.dropout.on_probabilities,
            samples=context.samples,
            first_head=self.first_head + first_head,
            num_heads=self.num_heads,
        )

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, context: Context, first_head: int = 0) -> Tensor:
        """q [B, T, H, K] over k, v [B, T, G, K] by the implementation of the context. Returns [B, T, H, K].

        first_head: number of the first head of q, where others are elsewhere; context.slopes are those of q's heads.
        """
        mask = context.mask if self.window is None else context.window_mask
        sinks = self._sinks_of(first_head, q.shape[2])
        if context.implementation == "sdpa":
            return sdpa.attention(q, k, v, mask)
        if context.implementation == "flex":
            return flex.attention(q, k, v, mask, context.slopes, sinks)
        if context.implementation == "triton":
            return fused.attention(q, k, v, mask, slopes=context.slopes, sinks=sinks)[0]
        dropout = self._dropout(context, first_head)
        output, lse = reference.attention(
            q, k, v, window=self.window, documents=context.documents, slopes=context.slopes, dropout=dropout
        )
        return output if sinks is None else with_sinks(output, lse, sinks)


def make_sinks(config: ModelConfig, groups: ModelParallel) -> nn.Parameter | None:
    """A logit [H] of each head's attention sink, cut by heads over the tp axis; None without model.attention_sinks."""
    if not config.attention_sinks:
        return None
    if groups.tp is None:
        return nn.Parameter(torch.empty(config.num_heads))
    return empty_parameter(config.num_heads, mesh=groups.tp, placement=Shard(0))
