"""Working memory: what the largest step takes beside weights and cache, by arithmetic.

On CUDA the largest step is also run and measured before the cache gets what is left (inference/runner.py): libraries'
workspaces and temporary buffers of sorts are not in any formula. What nobody can run before the cache is there, the
pools of captured graphs, is arithmetic alone.

N tokens of a step, R rows of logits, V vocabulary; D, F, H, G, K as in models/layers.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq
from typing import NamedTuple

from models.config import ModelConfig
from models.decoder import Decoder

SAMPLED_LOGITS = 2**24
"""Logits that are penalized, filtered and drawn from at a time; rows do not look at each other."""
SAMPLING_BYTES = 48
"""Of each of these, where a row has penalties and filters: fp32 logits twice, probabilities, their sort with indices
and sums, and fp64 sums to draw by."""
SORT_BYTES = 24
"""CUDA: of each of these, the second buffers of a sort of rows and the rows' numbers."""
PROMPT_LOGITS = 2**25
"""Logits that exist at a time where the log-probabilities of prompts are asked for."""
LIBRARY_BYTES = 2**27
"""CUDA: cuBLAS's workspaces, 32 MiB of each stream that multiplies on Hopper, and what a context takes with its first
kernels."""
STAGING_BYTES = 2**26
"""Of blocks on their way between device and host."""


class GraphSize(NamedTuple):
    """A captured pass: its outputs stay in memory, what is between is shared with other passes."""

    tokens: int
    rows: int  # of logits
    states: int = 0  # rows of hidden states among its outputs


class Demand(NamedTuple):
    """What steps may ask for at most. Filled by ModelRunner."""

    tokens: int  # of a step
    rows: int  # of logits that are sampled in a step
    graphs: Seq[GraphSize] = ()
    cuda: bool = False
    fused: bool = False  # blocks are computed by models/layers/serving.py
    swaps: bool = False  # blocks travel between device and host
    extra: int = 0  # bytes that somebody else keeps, as a drafter does


class WorkingMemory(NamedTuple):
    """Bytes beside weights and cache. Filled by `working_memory`; `measured` by ModelRunner."""

    activations: int  # of the tokens of the largest step, in one block
    logits: int  # of all rows
    sampling: int  # of as many rows as are looked at at a time, or of a prompt's, whichever is more
    graphs: int
    other: int  # libraries, blocks on their way to the host, drafters
    measured: int | None = None  # of the largest step without graphs; None: it was not measured

    @property
    def step(self) -> int:
        """The largest step's, without graphs."""
        return max(self.logits + max(self.activations, self.sampling), self.measured or 0)

    @property
    def total(self) -> int:
        return self.step + self.graphs + self.other

    def describe(self) -> str:
        """In a line."""
        parts = {"activations": self.activations, "logits": self.logits, "sampling": self.sampling}
        step = ", ".join(f"{name} {gib(value)}" for name, value in parts.items())
        measured = "not measured" if self.measured is None else f"measured {gib(self.measured)}"
        return (
            f"{gib(self.total)} GiB of working memory: a step {gib(self.step)} ({step}; {measured}), graphs "
            f"{gib(self.graphs)}, other {gib(self.other)}"
        )


def working_memory(model: Decoder, demand: Demand, itemsize: int) -> WorkingMemory:
    """Of a model whose activations have itemsize bytes."""
    V, ranks = model.config.vocab_size, 1 if model.groups.tp is None else model.groups.tp.size()
    wide = max(itemsize, 4)
    # Over tp a rank's words, the same padded, and those of all ranks.
    copies = 1 if ranks == 1 else 3
    at_a_time = min(demand.rows, max(1, SAMPLED_LOGITS // V))
    per_logit = SAMPLING_BYTES * wide // 4 + SORT_BYTES * demand.cuda
    of_prompts = min(demand.tokens, max(1, PROMPT_LOGITS // V)) * V * (itemsize + wide + wide * (itemsize < wide))
    return WorkingMemory(
        activations=activation_bytes(model.config, demand.tokens, itemsize, ranks=ranks, fused=demand.fused),
        logits=demand.rows * V * itemsize * copies,
        sampling=max(at_a_time * V * per_logit, of_prompts),
        graphs=_graph_bytes(model.config, demand, itemsize, ranks),
        other=(LIBRARY_BYTES if demand.cuda else 0) + (STAGING_BYTES if demand.swaps else 0) + demand.extra,
    )


def activation_bytes(config: ModelConfig, tokens: int, itemsize: int, *, ranks: int = 1, fused: bool = False) -> int:
    """What exists at most while a block computes so many tokens: in attention, or in its MLP or experts.

    Counts tensors, as if nothing of a half of a block were freed before its end. ranks: of tp.
    """
    D, words = config.hidden_size, 3 if fused else 4 if config.gated_mlp else 2
    assert config.num_kv_heads is not None
    assert config.head_dim is not None  # resolved
    H, G, K = config.num_heads // ranks, max(1, config.num_kv_heads // ranks), config.head_dim
    mlp = words * config.intermediate_size // ranks if _has_dense_layers(config) else 0
    if moe := config.moe.num_experts and config.moe:
        inner = (config.moe.top_k + config.moe.num_shared) * config.moe.intermediate_size // ranks
        # Tokens in the order of experts and what these make of them; the router's scores are fp32.
        routed = 2 * config.moe.top_k * D + words * inner + 4 * moe.num_experts * 4 // itemsize
        mlp = max(mlp, routed)
    if config.mla.kv_rank:
        latent = config.mla.kv_rank + config.mla.rope_dim
        attention = H * (2 * latent + 2 * (config.mla.nope_dim + config.mla.rope_dim + config.mla.value_dim)) + latent
    else:
        attention = (2 * H + 2 * G) * K if fused else (3 * H + 4 * G) * K
    tables = 4 * K * 4 // itemsize if config.positions == "rope" else 0  # cosines and sines in fp32
    return tokens * itemsize * (6 * D + attention + mlp + tables)


def _has_dense_layers(config: ModelConfig) -> bool:
    return not all(config.moe.in_layer(layer) for layer in range(config.num_layers))


def _graph_bytes(config: ModelConfig, demand: Demand, itemsize: int, ranks: int) -> int:
    """All outputs, and the largest pass between."""
    if not demand.graphs:
        return 0
    V, D = config.vocab_size, config.hidden_size
    outputs = sum(size.rows * V + size.states * D for size in demand.graphs) * itemsize
    most = max(size.tokens for size in demand.graphs)
    rows = max(size.rows for size in demand.graphs)
    between = activation_bytes(config, most, itemsize, ranks=ranks, fused=demand.fused)
    return outputs + between + (2 * rows * V * itemsize if ranks > 1 else 0)


def gib(num_bytes: int) -> str:
    return f"{num_bytes / 2**30:.2f}"
