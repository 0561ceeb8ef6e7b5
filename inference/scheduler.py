"""Scheduler: which tokens of which sequences the next step computes, and who gives way when blocks run out."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

from inference.blocks import BlockManager, Copy
from inference.config import EngineConfig
from inference.sequence import Sequence, Status
from inference.speculation.counts import SpeculationCounts


class Chunk(NamedTuple):
    """Tokens that a step computes: num_tokens of a sequence from the first-th on."""

    sequence: Sequence
    num_tokens: int
    first: int
    samples: bool  # the step gives the sequence its next token

    @property
    def end(self) -> int:
        """Place of the token behind it, the next one if the step samples."""
        return self.first + self.num_tokens


def _next_chunk(sequence: Sequence, budget: int) -> Chunk:
    count = min(sequence.num_behind, budget)
    return Chunk(sequence, count, sequence.num_computed, count == sequence.num_behind)


@dataclass
class Step:
    """Filled by `Scheduler.schedule`."""

    chunks: list[Chunk] = field(default_factory=list)
    copies: list[Copy] = field(default_factory=list)  # to be made first, in this order
    num_drafts: list[int] = field(default_factory=list)  # of each chunk: tokens to be drafted behind it; empty: none


@dataclass
class Counts:
    """What happened so far. Filled by Scheduler, but for what is said to be another's."""

    recomputed: int = 0  # preemptions that lose what was computed
    swapped: int = 0  # preemptions that keep it on the host
    cached_tokens: int = 0  # that the prefix cache had
    prompt_tokens: int = 0  # of sequences that were started, or started again
    speculation: SpeculationCounts | None = None  # kept by SpeculativeRunner; None: nobody drafts


class Scheduler:
    """First come, first served; every step has one token of each sequence that decodes and fills up with prompts.

    `running` is in the order of admission. The last one gives way (is preempted) when blocks run out, and comes back
    before sequences that have not begun: the first one always goes on, so every sequence comes to its end. For that the
    cache must hold any sequence on its own (config.engine_problems).
    """

    def __init__(self, config: EngineConfig, blocks: BlockManager) -> None:
        self.config, self.blocks = config, blocks
        self.waiting: deque[Sequence] = deque()
        self.swapped: deque[Sequence] = deque()
        self.running: list[Sequence] = []
        self.counts = Counts()
        self._copies: list[Copy] = []  # of the next step
        self.plan_drafts: Callable[[list[Chunk]], list[int]] | None = None  # set by Engine if it speculates

    @property
    def num_unfinished(self) -> int:
        return len(self.waiting) + len(self.swapped) + len(self.running)

    def add(self, sequence: Sequence) -> None:
        """Queue a new sequence."""
        self.waiting.append(sequence)

    def schedule(self) -> Step:
        """The next step; its chunks are empty only if there is no sequence."""
        chunks: list[Chunk] = []
        budget = self.config.max_batch_tokens
        for sequence in list(self.running):
            if sequence.status is not Status.RUNNING or sequence.has_all_tokens or budget == 0:
                continue
            chunk = _next_chunk(sequence, budget)
            self._make_room(sequence, chunk.num_tokens)
            if sequence.status is Status.RUNNING:
                chunks.append(chunk)
                budget -= chunk.num_tokens
        drafts = self._drafts(chunks, budget)
        budget -= sum(drafts)
        while budget > 0 and len(self.running) < self.config.max_sequences:
            admitted = self._admit(budget)
            if admitted is None:
                break
            chunks.append(admitted)
            budget -= admitted.num_tokens
        drafts += [0] * (len(chunks) - len(drafts)) if drafts else []
        step, self._copies = Step(chunks, self._copies, drafts), []
        return step

    def must_know_tokens(self) -> bool:
        """Whether the next step needs tokens that are still being computed, or would lose those that are.

        A sequence that gives way begins again from its tokens, and some ways to sample look at all of them.
        """
        missing, budget = 0, self.config.max_batch_tokens
        for sequence in self.running:
            if sequence.samples_by_tokens:
                return True
            if not sequence.has_all_tokens:
                count = min(sequence.num_behind, budget)
                needed = self.blocks.blocks_for(sequence.num_computed + count)
                missing += max(0, needed - len(sequence.blocks))  # a prompt in chunks has blocks for all of it
                budget -= count
        return missing > self.blocks.num_free

    def preempt(self, sequence: Sequence) -> None:
        """Take a running sequence's blocks away; it goes on later, to the same end."""
        self.running.remove(sequence)
        copies = self.blocks.swap_out(sequence) if self.config.preemption == "swap" else None
        if copies is not None:
            self._copies += copies
            sequence.status = Status.SWAPPED
            self.swapped.appendleft(sequence)
            self.counts.swapped += 1
        else:
            self._restart(sequence)
            self.counts.recomputed += 1

    def restart(self) -> None:
        """Let every sequence that has begun begin again: keys and values in the cache hold no more."""
        for sequence in [*reversed(self.swapped), *reversed(self.running)]:
            self._restart(sequence)
        self.swapped.clear()
        self.running.clear()

    def finish(self, sequence: Sequence) -> None:
        """Drop a sequence, wherever it is."""
        for queue in (self.running, self.waiting, self.swapped):
            if sequence in queue:
                queue.remove(sequence)
        self.blocks.release(sequence)
        sequence.status = Status.FINISHED

    def _restart(self, sequence: Sequence) -> None:
        self.blocks.release(sequence)
        sequence.num_computed = 0
        sequence.status = Status.WAITING
        self.waiting.appendleft(sequence)

    def _make_room(self, sequence: Sequence, count: int) -> None:
        """Blocks for `count` more tokens of a running sequence; others, or last of all itself, give way for them."""
        while not self.blocks.extend(sequence, sequence.num_computed + count):
            last = self.running[-1]
            self.preempt(last)
            if last is sequence:
                return

    def _drafts(self, chunks: list[Chunk], budget: int) -> list[int]:
        """How many drafts each chunk gets: what is planned and there is room for. Nobody gives way for them.

        They leave room to sequences that could begin: half of the tokens, or those of the first one's prompt where
        prompts are not cut.
        """
        if self.plan_drafts is None:
            return []
        if (self.waiting or self.swapped) and len(self.running) < self.config.max_sequences:
            first = len(self.waiting[0].tokens) if self.waiting and not self.swapped else 1
            if self.config.chunked_prefill:
                budget //= 2
            elif first <= budget:
                budget -= first
        drafts = []
        for chunk, count in zip(chunks, self.plan_drafts(chunks), strict=True):
            count = min(count, budget)
            while count and not self.blocks.extend(chunk.sequence, chunk.end + count):
                count -= 1
            drafts.append(count)
            budget -= count
        return drafts

    def _admit(self, budget: int) -> Chunk | None:
        """The first of those that do not run, if there is room for all of its tokens."""
        if self.swapped:
            sequence = self.swapped[0]
            copies = self.blocks.swap_in(sequence)
            if copies is None:
                return None
            self._copies += copies
            self.swapped.popleft()
        elif self.waiting:
            sequence = self.waiting[0]
            if not self.config.chunked_prefill and len(sequence.tokens) > budget:
                return None
            if not self.blocks.start(sequence):
                return None
            self.waiting.popleft()
            self.counts.cached_tokens += sequence.num_computed
            if sequence.completion.cached_tokens is None:  # else it was preempted, and finds what was its own
                sequence.completion.cached_tokens = sequence.num_computed
            self.counts.prompt_tokens += len(sequence.tokens)
        else:
            return None
        sequence.status = Status.RUNNING
        self.running.append(sequence)
        return _next_chunk(sequence, budget)
