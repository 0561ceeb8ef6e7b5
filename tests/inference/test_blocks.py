"""Scheduler and BlockManager without a model: pages hold token ids here, and every read is checked."""

from __future__ import annotations

import random
from collections import Counter, deque
from dataclasses import dataclass
from functools import cache
from typing import Any
from unittest.mock import patch

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from inference.blocks import BlockManager
from inference.config import EngineConfig, SamplingConfig
from inference.engine import Engine
from inference.runner import Launched, Result
from inference.scheduler import Chunk, Scheduler, Step
from inference.sequence import PENDING, Completion, Sequence, Status
from inference.speculation.counts import SpeculationCounts
from models.decoder import Decoder
from tests.models.small import random_decoder, tiny

MAX_LEN = 24


class Pages:
    """What a device would hold if a token's keys and values were its id and those before it."""

    def __init__(self, blocks: BlockManager, host_blocks: int) -> None:
        self.size = blocks.block_size
        self.device: list[dict[int, tuple[int, ...]]] = [{} for _ in range(blocks.num_blocks)]
        self.host: list[dict[int, tuple[int, ...]]] = [{} for _ in range(host_blocks)]

    def run(self, step: Step, texts: dict[int, list[int]] | None = None, wrong: list[int] | None = None) -> None:
        """Copies, writes of all chunks, then reads of all chunks, as a layer does.

        texts: by number of the sequence, what the device knows of it; None: what the host knows. It may be longer by
        drafts that stand. wrong: how many drafts of each chunk do not.
        """

        def text_of(sequence: Sequence) -> list[int]:
            return sequence.tokens if texts is None else texts[sequence.number]

        for source, target, to_host in step.copies:
            here, there = (self.device, self.host) if to_host else (self.host, self.device)
            there[target] = dict(here[source])
        written: Counter[tuple[int, int]] = Counter()
        for number, chunk in enumerate(step.chunks):
            sequence, text = chunk.sequence, text_of(chunk.sequence)
            assert chunk.num_tokens > 0
            drafts = step.num_drafts[number] if step.num_drafts else 0
            stands = chunk.end + drafts - (wrong[number] if wrong else 0)
            for place in range(chunk.first, chunk.end + drafts):
                block, offset = sequence.blocks[place // self.size], place % self.size
                written[block, offset] += 1
                self.device[block][offset] = tuple(text[: place + 1]) if place < stands else ()
        assert not written or max(written.values()) == 1
        for chunk in step.chunks:
            sequence = chunk.sequence
            for place in range(chunk.end):
                block, offset = sequence.blocks[place // self.size], place % self.size
                assert self.device[block][offset] == tuple(text_of(sequence)[: place + 1])


def check_books(scheduler: Scheduler, host_blocks: int) -> None:
    """Every block is free or counted once per sequence that has it; nothing is lost on the host either."""
    blocks = scheduler.blocks
    uses = Counter(block for sequence in scheduler.running for block in sequence.blocks)
    assert [uses[block] for block in range(blocks.num_blocks)] == blocks._uses
    assert set(blocks._free) == {block for block in range(blocks.num_blocks) if not uses[block]}
    on_host = [block for sequence in scheduler.swapped for block in sequence.host_blocks]
    assert sorted(on_host + blocks._free_host) == list(range(host_blocks))
    assert all(sequence.blocks == [] for sequence in [*scheduler.waiting, *scheduler.swapped])
    assert all(sequence.num_computed == 0 for sequence in scheduler.waiting)
    assert sorted(blocks._block_of.values()) == sorted(blocks._content_of)


def sequence_of(number: int, tokens: list[int]) -> Sequence:
    return Sequence(number, tokens, len(tokens), SamplingConfig(), seed=0, max_tokens=10**6, text=None)


@settings(max_examples=120, deadline=None, derandomize=True)
@given(
    prompts=st.lists(st.lists(st.integers(0, 1), min_size=1, max_size=18), min_size=1, max_size=9),
    block_size=st.integers(1, 6),
    spare=st.integers(0, 12),
    host_blocks=st.sampled_from([0, 3, 30]),
    max_sequences=st.integers(1, 5),
    budget=st.integers(0, 9),
    prefix_cache=st.booleans(),
    preempting=st.sampled_from([0.0, 0.5, 1.0]),
    seed=st.integers(0, 5),
)
def test_no_block_is_lost_or_overwritten_whatever_is_preempted(
    prompts: list[list[int]],
    block_size: int,
    spare: int,
    host_blocks: int,
    max_sequences: int,
    budget: int,
    prefix_cache: bool,
    preempting: float,
    seed: int,
) -> None:
    """A leak, a block freed while it is read, a stale prefix, a copy in the wrong order; two tokens, so many prefixes
    are shared. With preempting=1 a sequence is preempted before every step."""
    chance = random.Random(seed)
    config = EngineConfig(
        block_size=block_size,
        max_sequences=max_sequences,
        max_batch_tokens=max_sequences + budget,
        preemption="swap" if host_blocks else "recompute",
    )
    blocks = BlockManager(
        -(-MAX_LEN // block_size) + spare, block_size, host_blocks=host_blocks, prefix_cache=prefix_cache
    )
    scheduler, pages = Scheduler(config, blocks), Pages(blocks, host_blocks)
    for number, prompt in enumerate(prompts):
        scheduler.add(sequence_of(number, list(prompt)))
    ends = {number: chance.randint(len(prompt) + 1, MAX_LEN) for number, prompt in enumerate(prompts)}
    for steps in range(4000):
        if not scheduler.num_unfinished:
            break
        # One that is preempted before every step by recomputation, and behind by more than a step, never goes on.
        if steps < 300 and scheduler.running and chance.random() < preempting:
            scheduler.preempt(chance.choice(scheduler.running))
            check_books(scheduler, host_blocks)
        if chance.random() < 0.02:
            scheduler.restart()
            blocks.forget()
        step = scheduler.schedule()
        assert step.chunks
        assert sum(chunk.num_tokens for chunk in step.chunks) <= config.max_batch_tokens
        assert len(scheduler.running) <= max_sequences
        pages.run(step)
        for chunk in step.chunks:
            sequence = chunk.sequence
            sequence.num_computed = chunk.end
            blocks.keep(sequence)
            if chunk.samples:
                sequence.tokens.append(chance.randint(0, 1))
                if len(sequence.tokens) == ends[sequence.number] or chance.random() < 0.02:
                    scheduler.finish(sequence)
        check_books(scheduler, host_blocks)
    assert scheduler.num_unfinished == 0
    assert blocks.num_free == blocks.num_blocks
    assert sorted(blocks._free_host) == list(range(host_blocks))


@dataclass
class Script:
    """What becomes of an engine that has `Scripted` for a runner."""

    chance: random.Random
    drafting: bool


class Scripted:
    """In place of SpeculativeRunner: tokens are drawn at a launch, and the host is told when it asks."""

    def __init__(self, model: Decoder, config: EngineConfig, script: Any) -> None:
        assert config.num_blocks is not None
        self.chance, self.drafting, self.config = script.chance, script.drafting, config
        self.num_blocks, self.device, self.max_seq_len = config.num_blocks, torch.device("cpu"), MAX_LEN
        self.pages = Pages(BlockManager(config.num_blocks, config.block_size), config.host_blocks)
        self.texts: dict[int, list[int]] = {}  # by number of the request: all tokens, known to the host or not
        self.active = False  # whether the next step may have drafts
        self.policy = type("Policy", (), {"counts": SpeculationCounts()})
        self._results: deque[list[Result]] = deque()

    def receive_weights(self) -> None:
        """They are nobody's."""

    def must_know_tokens(self) -> bool:
        return self.active

    def plan_drafts(self, chunks: list[Chunk]) -> list[int]:
        if not self.active or any(chunk.sequence.tokens[-1] == PENDING for chunk in chunks):
            return [0] * len(chunks)
        return [self._wanted(chunk) for chunk in chunks]

    def _wanted(self, chunk: Chunk) -> int:
        sequence = chunk.sequence
        left = sequence.num_prompt + sequence.max_tokens - len(sequence.tokens)
        continued = chunk.samples and chunk.num_tokens == 1 and chunk.first > 0
        return min(self.chance.randint(0, 3), left - 1) if continued else 0

    def launch(self, step: Step) -> Launched:
        counts = step.num_drafts or [0] * len(step.chunks)
        assert sum(c.num_tokens for c in step.chunks) + sum(counts) <= self.config.max_batch_tokens
        results, wrong = [], []
        for chunk, drafts in zip(step.chunks, counts, strict=True):
            sequence = chunk.sequence
            text = self.texts.setdefault(sequence.number, list(sequence.tokens))
            known = [one if one != PENDING else text[place] for place, one in enumerate(sequence.tokens)]
            assert known == text  # no token is lost, or computed twice
            stand = self.chance.randint(0, drafts)
            wrong.append(drafts - stand)
            new = [self.chance.choice([0, 1] * 25 + [STOP]) for _ in range(stand + 1)] if chunk.samples else []
            text += new
            then = [Result(token) for token in new[1:]]
            results.append(Result(new[0], then=then) if new else Result())
        self.pages.run(step, self.texts, wrong)
        self.active = self.drafting and self.chance.random() < 0.7
        if step.chunks:  # nobody asks for the results of nothing
            self._results.append(results)
        return Launched(step.chunks, [], None, {}, None, torch.empty(0) if any(counts) else None)

    def results(self, launched: Launched) -> list[Result]:
        return self._results.popleft()


STOP = 2


@cache
def unused_model() -> Decoder:
    return random_decoder(tiny(num_layers=1))


@settings(max_examples=120, deadline=None, derandomize=True)
@given(
    prompts=st.lists(st.lists(st.integers(0, 1), min_size=1, max_size=12), min_size=2, max_size=9),
    block_size=st.integers(1, 6),
    spare=st.integers(0, 4),
    host_blocks=st.sampled_from([0, 3, 30]),
    max_sequences=st.integers(2, 6),
    budget=st.integers(0, 19),
    prefix_cache=st.booleans(),
    overlap=st.booleans(),
    drafting=st.booleans(),
    preempting=st.sampled_from([0.0, 0.3]),
    aborting=st.sampled_from([0.0, 0.05, 0.3]),
    seed=st.integers(0, 5),
)
def test_no_block_or_token_is_lost_whatever_is_asked_of_the_engine(
    prompts: list[list[int]],
    block_size: int,
    spare: int,
    host_blocks: int,
    max_sequences: int,
    budget: int,
    prefix_cache: bool,
    overlap: bool,
    drafting: bool,
    preempting: float,
    aborting: float,
    seed: int,
) -> None:
    """A request that is dropped while it waits, lies on the host, or is being computed, and its blocks; a sequence that
    gives way before its token is known; blocks of drafts, and what those that did not stand left in them."""
    chance = random.Random(seed)
    config = EngineConfig(
        block_size=block_size,
        num_blocks=-(-MAX_LEN // block_size) + spare,
        host_blocks=host_blocks,
        max_seq_len=MAX_LEN,
        max_sequences=max_sequences,
        max_batch_tokens=max_sequences + budget,
        prefix_cache=prefix_cache,
        preemption="swap" if host_blocks else "recompute",
        overlap=overlap,
    )

    def preempt(scheduler: Scheduler, sequence: Sequence) -> None:
        assert PENDING not in sequence.tokens  # what gives way begins again from its tokens
        real(scheduler, sequence)

    real = Scheduler.preempt
    with patch("inference.engine.SpeculativeRunner", Scripted), patch.object(Scheduler, "preempt", preempt):
        script: Any = Script(chance, drafting)
        engine = Engine(unused_model(), config, speculation=script)
        completions = ask_anything(engine, prompts, chance, preempting, aborting)
    assert isinstance(engine.runner, Scripted)
    for number, (prompt, completion) in enumerate(zip(prompts, completions, strict=True)):
        text = engine.runner.texts.get(number, prompt)
        assert completion.token_ids == text[len(prompt) :][: len(completion.token_ids)]
        assert completion.finish_reason in ("stop", "length", "abort")
        assert (completion.finish_reason == "stop") == (STOP in completion.token_ids)
    assert engine.blocks.num_free == engine.blocks.num_blocks
    assert sorted(engine.blocks._free_host) == list(range(host_blocks))


def ask_anything(
    engine: Engine, prompts: list[list[int]], chance: random.Random, preempting: float, aborting: float
) -> list[Completion]:
    """Requests that come while others run and are preempted or dropped; the weights may change."""
    completions: dict[int, Completion] = {}
    waiting = list(prompts)
    for steps in range(4000):
        while waiting and (chance.random() < 0.7 or not engine.num_unfinished):
            prompt = waiting.pop(0)
            most = chance.choice([1, MAX_LEN - len(prompt), MAX_LEN - len(prompt)])
            engine.add(prompt, SamplingConfig(max_tokens=most, stop_token_ids=[STOP]))
        if not engine.num_unfinished:
            break
        if steps < 300 and engine.scheduler.running and chance.random() < preempting:
            engine.preempt(chance.choice(engine.scheduler.running))
        if engine.num_unfinished and chance.random() < aborting:
            queues = engine.scheduler
            dropped = chance.choice([*queues.waiting, *queues.swapped, *queues.running]).number
            completions[dropped] = engine.abort(dropped)
        if chance.random() < 0.02:
            engine.weights_changed()
        check_books(engine.scheduler, engine.config.host_blocks)
        completions |= {d.request: d.completion for d in engine.step() if d.completion is not None}
        check_books(engine.scheduler, engine.config.host_blocks)
    return [completions[number] for number in range(len(prompts))]


def test_the_pages_of_this_file_notice_a_block_that_is_given_to_two() -> None:
    """Negative control."""
    config = EngineConfig(block_size=2, max_sequences=2, max_batch_tokens=8)
    scheduler = Scheduler(config, BlockManager(12, 2))
    scheduler.add(sequence_of(0, [1, 2, 3]))
    scheduler.add(sequence_of(1, [4, 5, 6]))
    step = scheduler.schedule()
    step.chunks[1].sequence.blocks[0] = step.chunks[0].sequence.blocks[0]
    with pytest.raises(AssertionError):
        Pages(scheduler.blocks, 0).run(step)


def test_equal_hashes_of_different_tokens_are_told_apart() -> None:
    """A prefix cache that trusts its hashes: in Python -1 and -2 have one."""
    assert hash((0, (-1, -1))) == hash((0, (-2, -2)))
    blocks = BlockManager(8, 2)
    first, second = sequence_of(0, [-1, -1, 5]), sequence_of(1, [-2, -2, 5])
    assert blocks.start(first)
    first.num_computed = 3
    blocks.keep(first)
    assert blocks.start(second)
    assert second.num_computed == 0
    assert first.blocks[0] != second.blocks[0]


def test_a_block_is_found_only_behind_the_same_beginning() -> None:
    """Blocks known by their own tokens alone: keys and values depend on all that precede."""
    blocks = BlockManager(12, 2)
    first = sequence_of(0, [1, 1, 7, 7, 0])
    assert blocks.start(first)
    first.num_computed = 5
    blocks.keep(first)
    for tokens, cached in (([2, 2, 7, 7, 0], 0), ([1, 1, 7, 7, 0], 4), ([1, 1, 7, 7], 2), ([1, 1, 7, 8, 0], 2)):
        other = sequence_of(1, tokens)
        assert blocks.start(other)
        assert other.num_computed == cached
        blocks.release(other)


def test_what_was_used_last_stays_longest_and_ends_go_before_beginnings() -> None:
    """Evicting a common beginning first: what follows it could never be found again."""
    blocks = BlockManager(4, 1)
    old, new = sequence_of(0, [1, 2, 3]), sequence_of(1, [9, 8])
    for sequence in (old, new):
        assert blocks.start(sequence)
        sequence.num_computed = len(sequence.tokens) - 1
        blocks.keep(sequence)
        blocks.release(sequence)
    probe = sequence_of(2, [5])
    assert blocks.start(probe)  # takes the one block without content
    assert blocks.extend(probe, 2)  # and one with: the end of the older sequence
    blocks.release(probe)
    assert blocks.start(old)
    assert old.num_computed == 1
    assert old.status is Status.WAITING  # the scheduler's business


def test_blocks_that_a_prompt_in_chunks_has_already_are_not_taken_for_free_ones() -> None:
    """A sequence that gives way while its token is computed: a prompt holds blocks that its next chunk does not need,
    and they made up for those that another sequence lacks."""
    config = EngineConfig(block_size=4, num_blocks=5, max_sequences=2, max_batch_tokens=5, prefix_cache=False)
    scheduler = Scheduler(config, BlockManager(5, 4, prefix_cache=False))
    for tokens in ([1] * 3, [2] * 15):
        sampling = SamplingConfig()
        scheduler.add(Sequence(0, tokens, len(tokens), sampling, seed=0, max_tokens=9, text=None))
    for expected in (False, False, True):  # the first decodes its 4th token, then its 5th, with no block free
        assert scheduler.must_know_tokens() is expected
        if not expected:
            for chunk in scheduler.schedule().chunks:
                chunk.sequence.num_computed = chunk.end
                chunk.sequence.tokens += [1] * chunk.samples
    assert scheduler.blocks.num_free == 0
