"""Settings of the engine and of a request, and what can be wrong with them."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import NamedTuple

import torch

from models.config import ModelConfig

PREEMPTIONS = ("recompute", "swap")
CACHE_DTYPES = {"auto": None, "fp8": torch.float8_e4m3fn, "int8": torch.int8}
"""By name; None: that of the weights."""
MAX_SEED = 2**32 - 1


@dataclass
class EngineConfig:
    """`engine`: memory, batches and features."""

    block_size: int = 16  # tokens of a block (page) of the cache
    num_blocks: int | None = None  # of the cache; None: what memory_fraction leaves, off CUDA at most 1 GiB
    memory_fraction: float = 0.9  # CUDA: of the device's memory, for weights, cache and what steps and graphs take
    cache_dtype: str = "auto"  # one of CACHE_DTYPES; in 8 bits with a scale for each token and head, half the memory
    host_blocks: int = 0  # room in host memory for sequences that are swapped out
    max_seq_len: int | None = None  # tokens of a prompt and its continuation; None: what the model was made for
    max_sequences: int = 256  # that run at a time
    max_batch_tokens: int = 8192  # of a step, prompts and continuations together
    chunked_prefill: bool = True  # a long prompt is computed in several steps; false: only whole
    prefix_cache: bool = True  # blocks of equal beginnings are computed once
    preemption: str = "recompute"  # of a sequence that has to give way, one of PREEMPTIONS; swap needs host_blocks
    overlap: bool | None = None  # a step is launched before the results of the one before are read; None: on CUDA
    # CUDA: steps that decode, and small ones with prompts, are one launch each. None: yes; but of a policy in training
    # only where its weights stay in their place and its launches are fused (trainer/rl/serving.py)
    cuda_graphs: bool | None = None
    # Numbers of sequences that decoding is captured for: a step pads to the next, and one with more has no graph. Each
    # keeps the logits of as many rows. Empty: 1, 2, 4, 8, then so close that at most an eighth pads
    graph_sizes: list[int] = field(default_factory=list)
    warmup: bool = False  # CUDA: graphs are captured and kernels compiled at the start, so that no request waits
    deterministic: bool = False  # a token's log-probability has the same bits whatever is computed beside it; slower
    seed: int = 0  # makes the seeds of requests that have none


@dataclass
class SamplingConfig:
    """`sampling`: how a request is continued. The order is: penalties, temperature, top_k, top_p, min_p."""

    temperature: float = 1.0  # 0, or below 1e-6: greedy
    top_k: int = 0  # of the most probable tokens; 0: all
    top_p: float = 1.0  # of the most probable tokens those that make up this much together
    min_p: float = 0.0  # of those at least this times as probable as the most probable one
    repetition_penalty: float = 1.0  # of tokens of prompt and continuation: divides positive logits (1909.05858)
    presence_penalty: float = 0.0  # of tokens of the continuation, subtracted from their logits
    frequency_penalty: float = 0.0  # the same, times how often they occur
    seed: int | None = None  # 0 to MAX_SEED; None: made of engine.seed and the number of the request
    max_tokens: int | None = None  # of the continuation; None: as many as engine.max_seq_len leaves room for
    # Strings that end it; the text ends before them. One that spells a special token stands for that token as well
    stop: list[str] = field(default_factory=list)
    stop_token_ids: list[int] = field(default_factory=list)  # tokens that end it, besides those that end a document
    ignore_eos: bool = False  # do not stop at the end of a document
    # A prompt of text begins with what its tokenizer puts before texts, as a bos; rendered conversations have their own
    add_special_tokens: bool = True
    top_logprobs: int = 0  # also the log-probabilities of so many most probable tokens
    prompt_logprobs: bool = False  # also those of the prompt's tokens
    # Of the model with its logits divided by the temperature, where that is not 0 (the prompt's stay the model's own)
    tempered_logprobs: bool = False
    speculate: bool = True  # false: this request gets no drafts, whatever the engine's speculation.method
    # At most one of these; the continuation then ends where it is complete (inference/constraints.py).
    json_schema: str | None = None  # text of a JSON schema: JSON that is valid under it
    regex: str | None = None  # what matches this regular expression as a whole (syntax of Rust's regex)
    choice: list[str] = field(default_factory=list)  # one of these
    grammar: str | None = None  # what a grammar in Lark's syntax derives from `start`

    @property
    def has_penalties(self) -> bool:
        return (self.repetition_penalty, self.presence_penalty, self.frequency_penalty) != (1.0, 0.0, 0.0)


class ConstraintText(NamedTuple):
    """What a continuation has to be."""

    kind: str  # one of CONSTRAINTS
    text: str


CONSTRAINTS = ("json_schema", "regex", "choice", "grammar")


def constraint_of(sampling: SamplingConfig) -> ConstraintText | None:
    """The one constraint that sampling has; None: none."""
    for kind in CONSTRAINTS:
        value = getattr(sampling, kind)
        if value is not None and value != []:
            return ConstraintText(kind, json.dumps(value) if kind == "choice" else value)
    return None


def longest(config: EngineConfig, model: ModelConfig) -> int:
    """Tokens of the longest sequence that is served."""
    if config.max_seq_len is not None:
        return config.max_seq_len
    dynamic = model.positions == "rope" and model.rope.scaling == "ntk"
    return min(model.max_seq_len, model.rope.original_max_seq_len) if dynamic else model.max_seq_len


def engine_problems(config: EngineConfig, model: ModelConfig) -> list[str]:
    """Every reason why this model cannot be served like this; one line each. model is resolved."""
    return settings_problems(config) or _length_problems(config, model)


def settings_problems(config: EngineConfig) -> list[str]:
    """Those that no model mends."""
    found = [
        f"engine.{name}={getattr(config, name)} must be at least {least}"
        for name, least in (
            ("block_size", 1),
            ("max_sequences", 1),
            ("max_batch_tokens", 1),
            ("host_blocks", 0),
            ("seed", 0),
            ("num_blocks", 1),
            ("max_seq_len", 1),
        )
        if getattr(config, name) is not None and getattr(config, name) < least
    ]
    if not 0 < config.memory_fraction <= 1:
        found.append(f"engine.memory_fraction={config.memory_fraction} must be above 0 and at most 1; 0.9 is usual")
    found += _graph_problems(config)
    if config.cache_dtype not in CACHE_DTYPES:
        found.append(f"engine.cache_dtype={config.cache_dtype} is unknown; use {', '.join(CACHE_DTYPES)}")
    if config.deterministic and config.cache_dtype != "auto":
        found.append(
            f"engine.deterministic=true makes log-probabilities those of training, which knows no engine.cache_dtype="
            f"{config.cache_dtype}; use cache_dtype=auto, or deterministic=false"
        )
    if config.preemption not in PREEMPTIONS:
        found.append(f"engine.preemption={config.preemption} is unknown; use {' or '.join(PREEMPTIONS)}")
    if config.preemption == "swap" and config.host_blocks == 0:
        found.append("engine.preemption=swap has nowhere to swap to; set engine.host_blocks, or use recompute")
    return found


def _graph_problems(config: EngineConfig) -> list[str]:
    outside = [size for size in config.graph_sizes if not 1 <= size <= config.max_sequences]
    if outside:
        nearest = sorted({min(max(size, 1), max(config.max_sequences, 1)) for size in config.graph_sizes})
        return [
            f"engine.graph_sizes={config.graph_sizes} has {outside[0]}, and steps have 1 to engine.max_sequences="
            f"{config.max_sequences} sequences; use {nearest}"
        ]
    if config.cuda_graphs is False and config.graph_sizes:
        return [
            f"engine.graph_sizes={config.graph_sizes} has no effect with engine.cuda_graphs=false; use [], or "
            "cuda_graphs=true"
        ]
    return []


def _length_problems(config: EngineConfig, model: ModelConfig) -> list[str]:
    found = []
    length = longest(config, model)
    if model.positions == "learned" and length > model.max_seq_len:
        found.append(
            f"engine.max_seq_len={length} is above model.max_seq_len={model.max_seq_len}, the rows of the learned "
            f"position table; use at most {model.max_seq_len}"
        )
    if model.positions == "rope" and model.rope.scaling == "ntk" and length > model.rope.original_max_seq_len:
        found.append(
            f"engine.max_seq_len={length} is above model.rope.original_max_seq_len={model.rope.original_max_seq_len}: "
            "from there on model.rope.scaling=ntk turns all keys anew with every token, so none can be kept; use at "
            f"most {model.rope.original_max_seq_len}"
        )
    needed = -(-length // config.block_size)
    if config.num_blocks is not None and config.num_blocks < needed:
        found.append(
            f"engine.num_blocks={config.num_blocks} blocks of {config.block_size} tokens cannot hold one sequence of "
            f"engine.max_seq_len={length}; use at least {needed} blocks, or max_seq_len="
            f"{config.num_blocks * config.block_size}"
        )
    if config.max_batch_tokens < config.max_sequences:
        found.append(
            f"engine.max_batch_tokens={config.max_batch_tokens} is below engine.max_sequences={config.max_sequences}, "
            "which all get a token in a step; raise the former or lower the latter"
        )
    if not config.chunked_prefill and config.max_batch_tokens < length:
        found.append(
            f"engine.max_batch_tokens={config.max_batch_tokens} is below engine.max_seq_len={length}, and "
            f"engine.chunked_prefill=false computes prompts whole; use at least {length}, or chunked_prefill=true"
        )
    return found


def sampling_problems(sampling: SamplingConfig) -> list[str]:
    """Every reason why a request cannot be continued like this; one line each."""
    found = []

    def hold(good: bool, name: str, rule: str) -> None:
        if not good:
            found.append(f"sampling.{name}={getattr(sampling, name)} must be {rule}")

    hold(0 <= sampling.temperature < float("inf"), "temperature", "at least 0, which is greedy")
    hold(sampling.top_k >= 0, "top_k", "at least 1, or 0 for all tokens")
    hold(0 < sampling.top_p <= 1, "top_p", "above 0 and at most 1, which is all tokens")
    hold(0 <= sampling.min_p <= 1, "min_p", "0 to 1")
    hold(0 < sampling.repetition_penalty < float("inf"), "repetition_penalty", "above 0; 1 is none")
    hold(abs(sampling.presence_penalty) < float("inf"), "presence_penalty", "finite; 0 is none")
    hold(abs(sampling.frequency_penalty) < float("inf"), "frequency_penalty", "finite; 0 is none")
    hold(sampling.seed is None or 0 <= sampling.seed <= MAX_SEED, "seed", f"0 to {MAX_SEED}, or null")
    hold(sampling.max_tokens is None or sampling.max_tokens >= 1, "max_tokens", "at least 1, or null")
    hold(all(sampling.stop), "stop", "strings that are not empty")
    hold(sampling.top_logprobs >= 0, "top_logprobs", "at least 0")
    hold(all(sampling.choice), "choice", "strings that are not empty")
    constraints = [kind for kind in CONSTRAINTS if getattr(sampling, kind) not in (None, [])]
    if len(constraints) > 1:
        found.append(f"{' and '.join(f'sampling.{kind}' for kind in constraints)} exclude each other; set one of them")
    return found
