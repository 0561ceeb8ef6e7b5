"""ModelRunner: a step of the scheduler as one forward pass of the trainer's own model, with the cache in pages.

The tokens of all sequences lie one behind the other, [1, N]; every layer is the one that was trained.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import groupby

import numpy as np
import torch
from torch import Tensor

from inference.blocks import Copy
from inference.config import EngineConfig, longest
from inference.sampling import Sampled, sample, settings_of
from inference.scheduler import Chunk, Step
from kernels.paged_attention import implementation
from models.config import ModelConfig
from models.decoder import Decoder
from models.layers.paged_cache import PagedCache

CPU_CACHE_BYTES = 2**30
LOGPROB_ROWS = 1024
"""Rows of logits that exist at a time where the log-probabilities of prompts are asked for."""


@dataclass
class Result:
    """What a step found out about one of its chunks. Filled by `ModelRunner.run`."""

    token: int | None = None  # the next one; None: the sequence is still behind
    logprob: float = 0.0
    top_logprobs: dict[int, float] | None = None
    prompt_logprobs: list[float] | None = None  # of tokens num_computed + 1 and on of the prompt


class ModelRunner:
    """The model, the pages of its cache, and copies of pages on the host.

    The model is served as it is: parameters that are changed in place (by a live trainer) serve from the next step on.
    """

    def __init__(self, model: Decoder, config: EngineConfig) -> None:
        parameter = next(model.parameters())
        self.model, self.device = model, parameter.device
        self.attention = implementation(self.device, parameter.dtype)  # what computes it
        self.max_seq_len = longest(config, model.config)
        self.block_size = config.block_size
        self.table_width = -(-self.max_seq_len // config.block_size)
        self.num_blocks = config.num_blocks or _fitting_blocks(model.config, config, parameter)
        self._keys, self._values = _pages(model.config, config.block_size, self.num_blocks, parameter)
        on_host = torch.empty(0, dtype=parameter.dtype, device="cpu")
        self._host = _pages(
            model.config, config.block_size, config.host_blocks, on_host, pin=self.device.type == "cuda"
        )

    @torch.no_grad()
    def run(self, step: Step) -> list[Result]:
        """Compute a step's chunks; one result for each. Waits for the device once, for the sampled tokens.

        Raises FloatingPointError where the model gives no probabilities (NaN).
        """
        self._copy(step.copies)
        if not step.chunks:
            return []
        sampling = [number for number, chunk in enumerate(step.chunks) if chunk.samples]
        sampled, of_prompts = self._forward(step.chunks, sampling)
        results = [Result() for _ in step.chunks]
        for number, logprobs in of_prompts.items():
            results[number].prompt_logprobs = logprobs.tolist()
        if sampled is not None:
            self._fill(results, step.chunks, sampling, sampled)
        return results

    def _forward(self, chunks: list[Chunk], sampling: list[int]) -> tuple[Sampled | None, dict[int, Tensor]]:
        """Next tokens of the chunks numbered in `sampling`, and log-probabilities of prompts by number of the chunk."""
        cache, tokens, positions = self._batch(chunks)
        ends = np.cumsum([chunk.num_tokens for chunk in chunks])
        rows = self._tensor(ends[sampling] - 1, torch.int64)
        of_prompts: dict[int, Tensor] = {}

        def head(hidden: Tensor, weight: Tensor) -> Tensor:
            assert self.model.head is not None
            for number, (chunk, end) in enumerate(zip(chunks, ends, strict=True)):
                if chunk.sequence.wants_prompt_logprobs:
                    targets = _next_of_prompt(chunk)
                    first = int(end) - chunk.num_tokens
                    parts = zip(
                        hidden[0, first : first + len(targets)].split(LOGPROB_ROWS),
                        self._tensor(targets, torch.int64).split(LOGPROB_ROWS),
                        strict=True,
                    )
                    found = [
                        _wide(self.model.head(h, weight)).log_softmax(-1).gather(-1, target[:, None])[:, 0]
                        for h, target in parts
                    ]
                    of_prompts[number] = torch.cat(found)
            return self.model.head(hidden[0, rows], weight)

        with _evaluating(self.model):
            logits = _wide(self.model(tokens, positions=positions, cache=cache, head=head))
        if not sampling:
            return None, of_prompts
        sequences = [chunks[number].sequence for number in sampling]
        settings = settings_of(sequences, vocab_size=logits.shape[1], device=self.device)
        return sample(logits, settings), of_prompts

    def _fill(self, results: list[Result], chunks: list[Chunk], sampling: list[int], sampled: Sampled) -> None:
        tokens, logprobs = sampled.tokens.tolist(), sampled.logprobs.tolist()
        if sampled.top_tokens is not None and sampled.top_logprobs is not None:
            tops = zip(sampled.top_tokens.tolist(), sampled.top_logprobs.tolist(), strict=True)
            for number, (top_tokens, top_logprobs) in zip(sampling, tops, strict=True):
                asked = chunks[number].sequence.sampling.top_logprobs
                results[number].top_logprobs = dict(zip(top_tokens[:asked], top_logprobs[:asked], strict=True))
        for number, token, logprob in zip(sampling, tokens, logprobs, strict=True):
            if logprob != logprob:
                raise FloatingPointError(
                    f"request {chunks[number].sequence.number}: the model gives NaN for its next token; its weights, "
                    "or what they make in this dtype, are not finite"
                )
            results[number].token, results[number].logprob = token, logprob

    def _batch(self, chunks: list[Chunk]) -> tuple[PagedCache, Tensor, Tensor]:
        """The cache as this step sees it, tokens [1, N] and positions [1, N]."""
        tables = np.zeros((len(chunks), self.table_width), dtype=np.int32)
        tokens, positions, slots = [], [], []
        for table, (sequence, count) in zip(tables, chunks, strict=True):
            table[: len(sequence.blocks)] = sequence.blocks
            first = sequence.num_computed
            place = np.arange(first, first + count)
            tokens += sequence.tokens[first : first + count]
            positions.append(place)
            slots.append(table[place // self.block_size].astype(np.int64) * self.block_size + place % self.block_size)
        starts = np.cumsum([0, *(chunk.num_tokens for chunk in chunks)])
        cache = PagedCache(
            keys=self._keys,
            values=self._values,
            slots=self._tensor(np.concatenate(slots), torch.int64),
            block_tables=self._tensor(tables, torch.int32),
            query_starts=self._tensor(starts, torch.int32),
            lengths=self._tensor([s.num_computed + count for s, count in chunks], torch.int32),
            max_seq_len=self.max_seq_len,
        )
        return cache, self._tensor([tokens], torch.int64), self._tensor(np.concatenate(positions)[None], torch.int64)

    def _copy(self, copies: list[Copy]) -> None:
        """Make copies in their order: a block may be filled again after it was saved, within one step."""
        for to_host, group in groupby(copies, key=lambda copy: copy.to_host):
            sources, targets = zip(*((copy.source, copy.target) for copy in group), strict=True)
            for here, there in zip((self._keys, self._values), self._host, strict=True):
                if here is None or there is None:
                    continue
                source, target = (here, there) if to_host else (there, here)
                # The device's own order keeps what follows behind this; copies to the host are waited for.
                pages = source[:, torch.tensor(sources, device=source.device)]
                target[:, torch.tensor(targets, device=target.device)] = pages.to(target.device)

    def _tensor(self, values: object, dtype: torch.dtype) -> Tensor:
        tensor = torch.as_tensor(values, dtype=dtype)
        return tensor.pin_memory().to(self.device, non_blocking=True) if self.device.type == "cuda" else tensor


def _pages(
    config: ModelConfig, block_size: int, num_blocks: int, like: Tensor, *, pin: bool = False
) -> tuple[Tensor, Tensor | None]:
    """Keys [L, P, page_size, G, K] and values [L, P, page_size, G, V], of the dtype and on the device of `like`."""

    def pages(heads: int, features: int) -> Tensor:
        shape = (config.num_layers, num_blocks, block_size, heads, features)
        return torch.zeros(shape, dtype=like.dtype, device=like.device, pin_memory=pin)

    if config.mla.kv_rank:
        return pages(1, config.mla.kv_rank + config.mla.rope_dim), None
    assert config.num_kv_heads is not None
    assert config.head_dim is not None  # resolved
    return pages(config.num_kv_heads, config.head_dim), pages(config.num_kv_heads, config.head_dim)


def _fitting_blocks(model: ModelConfig, config: EngineConfig, like: Tensor) -> int:
    """Blocks for all that may run at a time, or as many as there is memory for.

    Raises ValueError where that is less than one sequence takes.
    """
    keys, values = _pages(model, config.block_size, 1, torch.empty(0, dtype=like.dtype, device="meta"))
    block_bytes = keys.nbytes + (0 if values is None else values.nbytes)
    room = CPU_CACHE_BYTES
    if like.device.type == "cuda":
        free, total = torch.cuda.mem_get_info(like.device)
        room = int(free - (1 - config.memory_fraction) * total)
    one = -(-longest(config, model) // config.block_size)
    blocks = min(room // block_bytes, one * config.max_sequences)
    if blocks < one:
        raise ValueError(
            f"there is room for {max(blocks, 0)} blocks of {config.block_size} tokens ({block_bytes} bytes each), but "
            f"one sequence of engine.max_seq_len={longest(config, model)} takes {one}; use max_seq_len="
            f"{max(blocks, 0) * config.block_size} or less, or set engine.num_blocks"
        )
    return blocks


def _next_of_prompt(chunk: Chunk) -> list[int]:
    """The tokens that follow those of a chunk, as far as they are of the prompt."""
    sequence, first = chunk.sequence, chunk.sequence.num_computed + 1
    return sequence.tokens[first : min(first + chunk.num_tokens, sequence.num_prompt)]


def _wide(logits: Tensor) -> Tensor:
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


@contextmanager
def _evaluating(model: Decoder) -> Iterator[None]:
    """No dropout, no capacity of experts: also of a model that is being trained."""
    training = model.training
    if training:
        model.eval()
    try:
        yield
    finally:
        if training:
            model.train()
