"""ModelRunner: a step of the scheduler as one forward pass of the trainer's own model, with the cache in pages.

The tokens of all sequences lie one behind the other, [1, N]; every layer is the one that was trained.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from collections.abc import Sequence as Seq
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from inference.batch import Batch, pack, unpack
from inference.blocks import Copy
from inference.config import EngineConfig, SamplingConfig, longest
from inference.graphs import GraphSizes, StepGraphs
from inference.memory import PROMPT_LOGITS, Demand, GraphSize, working_memory
from inference.pages import fitting_blocks, make_copies, make_pages, no_room_named
from inference.ranks import agreed
from inference.sampling import Sampled, log_probabilities, sample, settings_of
from inference.scheduler import Chunk, Step
from inference.sequence import PENDING, Sequence
from inference.tables import BlockTables
from inference.weights import receive_weights
from kernels.attention.alibi import slopes
from kernels.paged_attention import implementation
from models.config import ModelConfig
from models.decoder import Decoder
from models.layers import serving
from models.layers.attention import choose_attention
from models.layers.paged_cache import LONG_PROMPT, Fresh, PagedCache
from models.layers.rope import frequencies
from parallel.regions import local_tensor


@dataclass
class Result:
    """What a step found out about one of its chunks. Filled by `ModelRunner.results`."""

    token: int | None = None  # the next one; None: the sequence is still behind
    logprob: float = 0.0
    finite: bool = True  # false: the model gives no probabilities (NaN), and the token means nothing
    top_logprobs: dict[int, float] | None = None
    prompt_logprobs: list[float] | None = None  # of tokens first + 1 and on of the prompt
    then: list[Result] = field(default_factory=list)  # of the tokens behind it, where drafts of the next ones stood


class Launched(NamedTuple):
    """A step that was given to the device. Filled by `ModelRunner.launch`, read by `ModelRunner.results`."""

    chunks: list[Chunk]
    sampling: list[int]  # numbers of those that sample
    sampled: Sampled | None  # on the host once `done`, as the rest
    of_prompts: dict[int, Tensor]  # log-probabilities of prompts by number of the chunk
    done: torch.cuda.Event | None  # None: it is
    drafts: Tensor | None = None  # drafted token behind each one sampled, -1: none; None: the step had no drafts


class ModelRunner:
    """The model, the pages of its cache, and copies of pages on the host.

    The model is served as it is: parameters that are changed in place (by a live trainer) serve from the next step on.
    `launch` gives a step to the device without waiting, `results` waits for one; a step may be launched before the
    results of the one before are known: tokens go from step to step on the device.
    """

    def __init__(self, model: Decoder, config: EngineConfig, *, extra_block_bytes: int = 0) -> None:
        """extra_block_bytes: memory that something else will take for each block of the cache."""
        parameter = local_tensor(next(model.parameters()))
        self.model, self.config, self.device = model, config, parameter.device
        self.attention = implementation(self.device, parameter.dtype)  # what computes it
        self.max_seq_len = longest(config, model.config)
        self.block_size = config.block_size
        # What a pass would copy to the device each time.
        rotary, kept = model.config.rotary_dim if model.config.positions == "rope" else None, model.config.rope
        self._frequencies, self._slopes = None, None
        if rotary is not None:
            inverse, factor = frequencies(kept, rotary, self.max_seq_len)
            self._frequencies = inverse.to(self.device), factor
        if model.config.positions == "alibi":
            self._slopes = slopes(model.config.num_heads, self.device)
        # Fused launches round otherwise than the trainer's, whose bits a batch-invariant model has.
        self.fused = is_fused(model)
        # What computes attention of prompts that begin in a step: triton for several in one launch, and cuDNN's, by
        # sdpa, for long ones. None: the pages' kernel, as for all else.
        self._prompt_attention: str | None = None
        if choose_attention(model.config, self.device, parameter.dtype, documents=True).name == "triton":
            self._prompt_attention = choose_attention(model.config, self.device, parameter.dtype).name
        on_host = torch.device("cpu")
        with no_room_named(f"engine.host_blocks={config.host_blocks} blocks in host memory", "host_blocks"):
            self._host = make_pages(
                model, config, config.host_blocks, parameter.dtype, on_host, pin=self.device.type == "cuda"
            )
        self.graphs: StepGraphs | None = None
        self.memory_demand = self._demand(config)
        self.memory = working_memory(model, self.memory_demand, parameter.itemsize)
        if config.num_blocks is None and self.device.type == "cuda":
            self.memory = self.memory._replace(measured=self._measured(config))
        self.num_blocks = config.num_blocks or fitting_blocks(model, config, parameter, extra_block_bytes, self.memory)
        with no_room_named(f"engine.num_blocks={self.num_blocks} blocks on {self.device}", "num_blocks"):
            self._make_cache(config, self.num_blocks)
        if has_graphs(self.device, parameter.dtype, config, num_ranks(model)):
            self.graphs = StepGraphs(
                self._decode, self._mixed, config.max_sequences, config.max_batch_tokens, config.graph_sizes
            )

    def _make_cache(self, config: EngineConfig, blocks: int) -> None:
        """Pages for so many blocks, empty, and tables of nobody's."""
        dtype = local_tensor(next(self.model.parameters())).dtype
        pages = make_pages(self.model, config, blocks, dtype, self.device)
        self._pages = pages
        self._keys, self._values, self._key_scales, self._value_scales = pages
        self._tables = BlockTables(config.max_sequences, -(-self.max_seq_len // config.block_size), self.device)
        self._last_tokens = torch.zeros(config.max_sequences + 1, dtype=torch.int64, device=self.device)  # by row

    def _demand(self, config: EngineConfig) -> Demand:
        return demand_of(self.model, config)

    def _measured(self, config: EngineConfig) -> int:
        """Bytes that the largest step takes beside weights and one block of cache. CUDA; leaves nothing behind."""
        self._make_cache(config, 1)
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        with no_room_named("the largest step", "max_batch_tokens, or engine.max_sequences"):
            self._launch_largest(EVERYTHING)
            torch.cuda.synchronize()
        taken = torch.cuda.max_memory_allocated() - before
        del self._pages, self._keys, self._values, self._key_scales, self._value_scales
        torch.cuda.empty_cache()  # what is free is asked of the device
        return taken

    def warm_up(self) -> int:
        """Capture all graphs and compile what is compiled, so that no step waits for it; how many graphs.

        Before the first request: block 0 is written to. Collective over tp. Off CUDA there is nothing to do.
        """
        if self.device.type != "cuda":
            return 0
        for sampling in (SamplingConfig(temperature=0.0), SamplingConfig(temperature=1.0), EVERYTHING):
            self._launch_largest(sampling)
        keys = [] if self.graphs is None else self.graphs.every_key()
        if self.graphs is not None:
            with torch.no_grad(), evaluating(self.model):
                self.graphs.capture(keys, self._tables.nobody)
        torch.cuda.synchronize()
        return len(keys)

    def _launch_largest(self, sampling: SamplingConfig) -> None:
        """What it finds out is of no use."""
        ModelRunner.launch(self, largest_step(self.config, self.model.config, sampling))

    @property
    def cache_bytes_per_token(self) -> int:
        """Bytes that a token occupies in the pages of all layers."""
        return sum(x.nbytes for x in self._pages if x is not None) // (self.num_blocks * self.block_size)

    @torch.no_grad()
    def launch(self, step: Step) -> Launched:
        """Give a step to the device."""
        self._copy(step.copies)
        chunks = sorted(step.chunks, key=lambda chunk: chunk.first != 0)
        sampling = [number for number, chunk in enumerate(chunks) if chunk.samples]
        if not chunks:
            return Launched(chunks, sampling, None, {}, None)
        with evaluating(self.model):
            rows = self._tables.rows([chunk.sequence for chunk in chunks])
            logits, of_prompts = self._forward(chunks, rows, sampling)
        sampled = None
        if sampling:
            sequences = [chunks[number].sequence for number in sampling]
            settings = settings_of(sequences, vocab_size=logits.shape[1], device=self.device)
            sampled = sample(logits, settings, batch_invariant=self.model.batch_invariant)
            sampled = agreed(sampled, self.model.groups.tp)
            self.give([rows[number] for number in sampling], sampled.tokens)
        return self._on_its_way(Launched(chunks, sampling, sampled, of_prompts, None))

    def receive_weights(self) -> None:
        """Let what follows wait for weights that are still on their way into the model: a captured graph runs no
        hooks."""
        receive_weights(self.model)

    def results(self, launched: Launched) -> list[Result]:
        """Wait for a step; what it found out about each of its chunks."""
        if launched.done is not None:
            launched.done.synchronize()
        results = [Result() for _ in launched.chunks]
        for number, logprobs in launched.of_prompts.items():
            results[number].prompt_logprobs = logprobs.tolist()
        if launched.sampled is not None:
            _fill(results, launched.chunks, launched.sampling, launched.sampled)
        return results

    @property
    def block_tables(self) -> Tensor:
        """[R + 1, M] int32, filled as sequences come and go."""
        return self._tables.tables

    def logits(self, chunks: list[Chunk]) -> tuple[list[int], Tensor]:
        """Of the chunks that sample, in their order: rows of the block tables, and logits [R, V]; nothing is sampled.

        The next call may overwrite the logits.
        """
        order = sorted(range(len(chunks)), key=lambda number: chunks[number].first != 0)  # as `_fresh` wants them
        computed = [chunks[number] for number in order]
        sampling = [place for place, chunk in enumerate(computed) if chunk.samples]
        with evaluating(self.model):
            rows = self._tables.rows([chunk.sequence for chunk in computed])
            logits, _ = self._forward(computed, rows, sampling)
        back = sorted(range(len(sampling)), key=lambda one: order[sampling[one]])
        if back != list(range(len(sampling))):
            logits = logits[self._tensor(back, torch.int64)]
        return [rows[sampling[one]] for one in back], logits

    def give(self, rows: list[int], tokens: Tensor) -> None:
        """What sequences' PENDING tokens are, by their rows of the block tables: int64 [R]."""
        self._last_tokens.index_put_((self._tensor(rows, torch.int64),), tokens)

    def _forward(self, chunks: list[Chunk], rows: list[int], sampling: list[int]) -> tuple[Tensor, dict[int, Tensor]]:
        """Logits [R, V] of the chunks numbered in `sampling`, and log-probabilities of prompts by number of chunk."""
        targets = {number: found for number, chunk in enumerate(chunks) if (found := next_of_prompt(chunk))}
        if not targets and (logits := self._by_graph(chunks, rows)) is not None:
            return logits if len(sampling) == len(chunks) else logits[self._tensor(sampling, torch.int64)], {}
        batch = unpack(self._tensor(pack(chunks, rows, self._tables.nobody), torch.int64), len(chunks))
        sequences = self._tensor(sampling, torch.int64)
        wanted = batch.lasts[sequences], sequences
        cache = self._cache(batch)._replace(fresh=self._fresh(chunks), wanted=None if targets else wanted)
        return self._logits(batch, cache, wanted[0], chunks, targets)

    def _by_graph(self, chunks: list[Chunk], rows: list[int]) -> Tensor | None:
        """Logits by chunk; None: there is no graph for such a step."""
        if self.graphs is None:
            return None
        decodes = all(chunk.num_tokens == 1 and chunk.samples for chunk in chunks)
        size = self.graphs.size_of(len(chunks), sum(chunk.num_tokens for chunk in chunks), decodes=decodes)
        if size is None:
            return None
        packed = pack(chunks, rows, self._tables.nobody, size)
        return self.graphs.run(packed, size, decodes=decodes)[: len(chunks)]

    def _decode(self, packed: Tensor, sequences: int) -> Tensor:
        """Logits [S, V] of one token of each of S sequences. Nothing here, or in `_mixed`, looks at the device."""
        batch = unpack(packed, sequences)
        cache = self._cache(batch)._replace(decodes=True)
        return self.model(self._known(batch)[None], positions=batch.positions[None], cache=cache)[0]

    def _mixed(self, packed: Tensor, sequences: int) -> Tensor:
        """Logits [S, V] of the last of some tokens of each of S sequences."""
        batch = unpack(packed, sequences)
        wanted = batch.lasts, torch.arange(sequences, device=self.device)
        return self._logits(batch, self._cache(batch)._replace(wanted=wanted), batch.lasts)[0]

    def _logits(
        self,
        batch: Batch,
        cache: PagedCache,
        rows: Tensor,
        chunks: Seq[Chunk] = (),
        targets: Mapping[int, list[int]] = MappingProxyType({}),
        states: list[Tensor] | None = None,
    ) -> tuple[Tensor, dict[int, Tensor]]:
        """Logits [R, V] of the tokens numbered in rows [R], and log-probabilities of `targets`, by number of chunk.

        states: a list that gets the model's hidden states, [N, D] of all tokens unless cache.wanted says otherwise.
        """
        of_prompts: dict[int, Tensor] = {}
        everything = cache.wanted is None or not self.fused
        at_a_time = max(1, PROMPT_LOGITS // self.model.config.vocab_size)

        def head(hidden: Tensor, weight: Tensor) -> Tensor:
            assert self.model.head is not None
            if states is not None:
                states.append(hidden[0])
            for number, its_targets in targets.items():
                first = sum(chunk.num_tokens for chunk in chunks[:number])
                parts = zip(
                    hidden[0, first : first + len(its_targets)].split(at_a_time),
                    self._tensor(its_targets, torch.int64).split(at_a_time),
                    strict=True,
                )
                of_prompts[number] = torch.cat([self._logprobs(h, weight, target) for h, target in parts])
            return self.model.head(hidden[0, rows] if everything else hidden[0], weight)

        tokens, positions = self._known(batch)[None], batch.positions[None]
        return self.model(tokens, positions=positions, cache=cache, head=head), of_prompts

    def _logprobs(self, hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        """Log-probabilities [N] of targets [N] after hidden [N, D]."""
        head = self.model.head
        assert head is not None
        if head.axis is not None:
            return head.logprobs(hidden, weight, targets)
        invariant = self.model.batch_invariant
        return log_probabilities(head(hidden, weight), targets[:, None], batch_invariant=invariant)[:, 0]

    def _known(self, batch: Batch) -> Tensor:
        """Tokens [N], those that the step before sampled among them."""
        return torch.where(batch.tokens == PENDING, self._last_tokens[batch.token_rows], batch.tokens)

    def _cache(self, batch: Batch) -> PagedCache:
        if self.model.served is not None:
            self.model.served.tell(self._tables.adapters[batch.token_rows])
        tables = self._tables.tables[batch.rows]
        blocks = tables[batch.owners, batch.positions // self.block_size]
        slots = blocks * self.block_size + batch.positions % self.block_size
        return PagedCache(
            keys=self._keys,
            values=self._values,
            slots=torch.where(batch.token_rows == self._tables.nobody, -1, slots),
            block_tables=tables,
            query_starts=batch.starts.to(torch.int32),
            lengths=batch.lengths.to(torch.int32),
            max_seq_len=self.max_seq_len,
            frequencies=self._frequencies,
            slopes=self._slopes,
            batch_invariant=self.model.batch_invariant,
            fused=self.fused,
            key_scales=self._key_scales,
            value_scales=self._value_scales,
        )

    def _fresh(self, chunks: list[Chunk]) -> Fresh | None:
        """The sequences that begin in this step; `launch` has put them first."""
        counts = [chunk.num_tokens for chunk in chunks if chunk.first == 0]
        if not counts or not self.fused or self._prompt_attention is None:
            return None
        documents = self._tensor(np.repeat(np.arange(len(counts)), counts)[None], torch.int32)
        ends = tuple(int(end) for end in np.cumsum(counts))
        return Fresh(ends, documents, plain=self._prompt_attention == "sdpa" and ends[-1] >= LONG_PROMPT * len(counts))

    def _on_its_way(self, launched: Launched) -> Launched:
        """The same, with copies of its tensors to the host enqueued."""
        if self.device.type != "cuda":
            return launched
        sampled, of_prompts = launched.sampled, launched.of_prompts
        if sampled is not None:
            sampled = Sampled(*(None if x is None else _to_host(x) for x in sampled))  # type: ignore[arg-type]
        done = torch.cuda.Event()
        moved = launched._replace(
            sampled=sampled,
            of_prompts={n: _to_host(x) for n, x in of_prompts.items()},
            done=done,
            drafts=None if launched.drafts is None else _to_host(launched.drafts),
        )
        done.record()
        return moved

    def _copy(self, copies: list[Copy]) -> None:
        """Make copies in their order: a block may be filled again after it was saved, within one step."""
        pairs = zip(self._pages, self._host, strict=True)
        make_copies(copies, [(here, there) for here, there in pairs if here is not None and there is not None])

    def _tensor(self, values: object, dtype: torch.dtype) -> Tensor:
        tensor = torch.as_tensor(values, dtype=dtype)
        return tensor.pin_memory().to(self.device, non_blocking=True) if self.device.type == "cuda" else tensor


def is_fused(model: Decoder) -> bool:
    """Whether blocks are computed by models/layers/serving.py, which multiplies with weights alone."""
    return serving.obstacle(model.config, model.groups) is None and not (model.batch_invariant or model.adapted)


def num_ranks(model: Decoder) -> int:
    """Over which a model lies."""
    return 1 if model.groups.tp is None else model.groups.tp.size()


MOST_RANKS_WITH_GRAPHS = 1
"""Over two a model's steps are captured and replayed well on H200s (docs/LOG.md), but not all of
tests/gpu/test_engine_tp_cuda.py has run with graphs, and a capture that is invalid ends the engine."""


def has_graphs(device: torch.device, dtype: torch.dtype, config: EngineConfig, ranks: int) -> bool:
    """Whether small steps are captured. The reference of attention waits for the device, and cannot be."""
    if config.cuda_graphs is False or ranks > MOST_RANKS_WITH_GRAPHS:
        return False
    return device.type == "cuda" and implementation(device, dtype) == "triton"


def demand_of(model: Decoder, config: EngineConfig) -> Demand:
    """What steps of a model may ask for at most."""
    parameter = local_tensor(next(model.parameters()))
    sizes = GraphSizes(config.max_sequences, config.max_batch_tokens, config.graph_sizes)
    graphs = has_graphs(parameter.device, parameter.dtype, config, num_ranks(model))
    return Demand(
        tokens=min(config.max_batch_tokens, config.max_sequences * longest(config, model.config)),
        rows=config.max_sequences,
        graphs=[GraphSize(key.tokens, key.sequences) for key in sizes.every_key()] if graphs else [],
        cuda=parameter.device.type == "cuda",
        fused=is_fused(model),
        swaps=config.host_blocks > 0,
    )


EVERYTHING = SamplingConfig(
    temperature=1.0, top_p=0.9, repetition_penalty=1.1, presence_penalty=0.1, top_logprobs=1, prompt_logprobs=True
)
"""That takes memory."""


def largest_step(config: EngineConfig, model: ModelConfig, sampling: SamplingConfig) -> Step:
    """A step with as many tokens and sequences as there may be, most of them in one prompt.

    Its sequences lie in block 0, one over the other: what it computes means nothing.
    """
    count, chunks = min(config.max_sequences, config.max_batch_tokens), []
    left, most = config.max_batch_tokens - count, longest(config, model)
    for number in range(count):
        length = 1 + min(left, most - 1)
        left -= length - 1
        sequence = Sequence(number, [number % model.vocab_size] * length, length, sampling, number, 1, None)
        if sampling.prompt_logprobs:
            sequence.completion.prompt_logprobs = [None] * length
        sequence.blocks = [0] * -(-length // config.block_size)
        chunks.append(Chunk(sequence, length, 0, True))
    return Step(chunks)


def next_of_prompt(chunk: Chunk) -> list[int]:
    """The tokens that follow those of a chunk, as far as they are of the prompt and somebody wants to know of them."""
    if not chunk.sequence.wants_prompt_logprobs:
        return []
    return chunk.sequence.tokens[chunk.first + 1 : min(chunk.end + 1, chunk.sequence.num_prompt)]


def _fill(results: list[Result], chunks: list[Chunk], sampling: list[int], sampled: Sampled) -> None:
    tokens, logprobs = sampled.tokens.tolist(), sampled.logprobs.tolist()
    if sampled.top_tokens is not None and sampled.top_logprobs is not None:
        tops = zip(sampled.top_tokens.tolist(), sampled.top_logprobs.tolist(), strict=True)
        for number, (top_tokens, top_logprobs) in zip(sampling, tops, strict=True):
            asked = chunks[number].sequence.sampling.top_logprobs
            if asked:  # not where only others of the batch do
                results[number].top_logprobs = dict(zip(top_tokens[:asked], top_logprobs[:asked], strict=True))
    for number, token, logprob in zip(sampling, tokens, logprobs, strict=True):
        results[number].finite = logprob == logprob
        results[number].token, results[number].logprob = token, logprob


def _to_host(x: Tensor) -> Tensor:
    """A copy in pinned memory that is enqueued, not waited for."""
    return torch.empty(x.shape, dtype=x.dtype, pin_memory=True).copy_(x, non_blocking=True)


@contextmanager
def evaluating(model: Decoder) -> Iterator[None]:
    """No dropout, no capacity of experts: also of a model that is being trained."""
    training = model.training
    if training:
        model.eval()
    try:
        yield
    finally:
        if training:
            model.train()
