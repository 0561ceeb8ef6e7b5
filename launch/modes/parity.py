"""mode=parity: the train-serve contract. Log-probabilities of the same tokens by the trainer's forward and by every way
through the engine, one against another.

With parallel.tp > 1 every way of the engine is over these ranks, and what it is held against is the trainer's forward
of the whole model, which rank 0 has beside its part; the trainer's own forward over the ranks is one way more.

One JSON object goes to `out` or standard output, a table to stderr. Exit code 1 where the bound is broken.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from itertools import combinations
from typing import Any

import torch
from torch import Tensor

from data.batch import IGNORE_INDEX
from inference.config import EngineConfig, SamplingConfig, longest
from inference.engine import Engine
from inference.sequence import Completion
from inference.speculation.config import SpeculationConfig
from launch.lab_config import LabConfig, device_of, make_engine, open_served, prepare, say_what_computes
from launch.lab_ranks import Verdict, call_on_ranks, open_whole_on_ranks
from launch.modes.files import out_problems, prompt_problems, token_prompts, write_json
from launch.open_model import OpenedModel
from models.decoder import Decoder
from parallel.regions import local_tensor
from trainer.config import ConfigError
from trainer.loss import token_losses, vocabulary_shard

BOUNDS = {torch.float64: 1e-5, torch.float32: 1e-5, torch.float16: 2**-4, torch.bfloat16: 2**-1}
"""Largest |delta log p|, in nats. In half precision two units in the last place of a logit between 32 and 64: trainer
and engine both round logits, and what makes them."""


class ParityError(Verdict):
    """The bound is broken."""


@dataclass
class Outcome:
    """What one way of computing makes of all sequences. Filled by the functions below."""

    name: str
    continuations: list[list[int]]  # tokens behind the prompts, whose log-probabilities these are
    logprobs: list[list[float | None]]  # of every token of prompt and continuation but the first; None: not computed
    chosen: list[list[int]] | None = None  # its own greedy token at each place of a continuation; None: not known
    margins: list[list[float]] | None = None  # by how much these are more probable than the next, in nats
    notes: dict[str, int] = field(default_factory=dict)  # what happened on the way


@dataclass
class Pair:
    """Two outcomes beside each other. Filled by `compare`."""

    a: str
    b: str
    compared: int  # tokens
    max_abs_delta: float  # of their log-probabilities
    tokens_equal: bool | None  # greedy ones; None: one of both knows none
    margin: float  # largest margin of a token that differs; 0: none does

    def keeps(self, bound: float, *, half: bool) -> bool:
        """Half precision may choose otherwise between tokens that are about as probable."""
        return self.max_abs_delta <= bound and (self.tokens_equal is not False or (half and self.margin <= bound))


@dataclass
class Setup:
    """What all ways have in common."""

    opened: OpenedModel  # what is served
    whole: Decoder  # the trainer's: the same module, or over ranks a copy of it that is not cut
    engine: EngineConfig  # with room for all sequences at a time, whole
    prompts: list[list[int]]
    max_tokens: int
    config: LabConfig
    continuations: list[list[int]] = field(default_factory=list)  # of the first way that generated

    @property
    def sequences(self) -> list[list[int]]:
        return [prompt + rest for prompt, rest in zip(self.prompts, self.continuations, strict=True)]

    def make(self, **changes: Any) -> Engine:
        """An engine with these settings changed."""
        config = replace(self.engine, **changes)
        assert config.max_seq_len is not None
        blocks = sum(-(-(len(prompt) + self.max_tokens + 1) // config.block_size) for prompt in self.prompts)
        one = -(-config.max_seq_len // config.block_size)
        return make_engine(
            self.opened,
            replace(config, num_blocks=max(blocks, one), host_blocks=max(blocks, one)),
            SpeculationConfig(),
        )


def parity(config: LabConfig) -> None:
    """Compare. Raises ParityError where the bound is broken, after everything was written."""
    opened = open_served(config)
    over_ranks = config.parallel.tp > 1
    if not over_ranks:
        prepare(opened, config.engine)
    whole = open_whole_on_ranks(config.model).model if over_ranks else opened.model
    setup = _setup(config, opened, whole)
    first = generated(setup, "decode", max_sequences=1, max_batch_tokens=setup.engine.max_seq_len)
    setup.continuations = first.continuations
    outcomes = [trained(setup, "trainer", together=True), trained(setup, "trainer, alone", together=False), first]
    if over_ranks:
        outcomes.insert(2, trained(setup, f"trainer, tp={config.parallel.tp}", together=True, over_ranks=True))
    outcomes += [way() for way in _ways(setup)]
    pairs = [compare(a, b, setup.prompts) for a, b in combinations(outcomes, 2)]
    bound, half = _bound(config, whole)
    broken = [pair for pair in pairs if not pair.keeps(bound, half=half)]
    engine = setup.make()
    say_what_computes(engine)
    _print_table(outcomes, pairs, bound)
    report = {
        "dtype": str(_dtype(whole)).removeprefix("torch."),
        "device": device_of(config.device).type,
        "deterministic": config.engine.deterministic,
        "tp": config.parallel.tp,
        "attention": engine.runner.attention,
        "bound": bound,
        "kept": not broken,
        "prompts": len(setup.prompts),
        "tokens": sum(map(len, setup.sequences)),
        "paths": [{"name": outcome.name, **outcome.notes} for outcome in outcomes],
        "pairs": [pair.__dict__ for pair in pairs],
    }
    write_json(config, report)
    if broken:
        worst = max(broken, key=lambda pair: (pair.max_abs_delta, pair.margin))
        raise ParityError(
            f"{len(broken)} of {len(pairs)} pairs break the bound of {bound:g}: {worst.a} and {worst.b} differ by "
            f"{worst.max_abs_delta:.3g} nats" + ("" if worst.tokens_equal is not False else " and in tokens")
        )


def problems(config: LabConfig) -> list[str]:
    """Every reason why these settings cannot be used that no model is needed to see; one line each."""
    settings = config.parity
    found = [
        f"parity.{name}={getattr(settings, name)} must be at least {least}"
        for name, least in (("num_prompts", 1), ("max_tokens", 1), ("chunk_tokens", 1), ("seed", 0))
        if getattr(settings, name) < least
    ]
    if len(settings.prompt_tokens) != 2 or not 1 <= settings.prompt_tokens[0] <= settings.prompt_tokens[1]:
        found.append(f"parity.prompt_tokens={settings.prompt_tokens} must be least and most, such as [1,48]")
    if not settings.page_sizes or min(settings.page_sizes) < 1:
        found.append(f"parity.page_sizes={settings.page_sizes} must be numbers of tokens, such as [1,16,64]")
    if settings.bound is not None and not 0 <= settings.bound < float("inf"):
        found.append(f"parity.bound={settings.bound} must be at least 0, or null")
    if config.speculation.method != "none":
        found.append(f"speculation.method={config.speculation.method} has no effect with mode=parity; leave it out")
    return found + prompt_problems(config, needed=False) + out_problems(config)


def _setup(config: LabConfig, opened: OpenedModel, whole: Decoder) -> Setup:
    settings, model = config.parity, opened.model.config
    prompts = token_prompts(config, opened)
    if prompts is None:
        chance = random.Random(settings.seed)
        least, most = settings.prompt_tokens
        beginning = [chance.randrange(model.vocab_size) for _ in range(most)]  # shared, for the prefix cache
        lengths = [most, *(chance.randint(least, most) for _ in range(settings.num_prompts - 1))]
        own = [chance.randint(0, length // 2) for length in lengths]
        prompts = [
            beginning[: length - n] + [chance.randrange(model.vocab_size) for _ in range(n)]
            for length, n in zip(lengths, own, strict=True)
        ]
    needed, room = max(map(len, prompts)) + settings.max_tokens + 1, longest(config.engine, model)
    if needed > room:
        raise ConfigError([
            f"parity needs {needed} tokens of a sequence (a prompt of {max(map(len, prompts))}, parity.max_tokens="
            f"{settings.max_tokens} and one more), and there is room for {room}; use shorter prompts or fewer tokens"
        ])  # fmt: skip
    engine = replace(
        config.engine,
        max_seq_len=needed,
        max_sequences=len(prompts),
        max_batch_tokens=max(needed * len(prompts), config.engine.max_batch_tokens),
        chunked_prefill=True,
        prefix_cache=False,
        preemption="recompute",
    )
    return Setup(opened, whole, engine, prompts, settings.max_tokens, config)


def _ways(setup: Setup) -> Iterator[Callable[[], Outcome]]:
    """Every way of the engine but the first."""
    settings = setup.config.parity
    yield lambda: given(setup, "prefill", max_sequences=1)
    yield lambda: given(setup, "token by token", max_sequences=1, max_batch_tokens=1)
    yield lambda: given(setup, "chunked", max_sequences=1, max_batch_tokens=settings.chunk_tokens)
    yield lambda: given(setup, "prefill, batched")
    yield lambda: generated(setup, "batched")
    small = len(setup.prompts) + settings.chunk_tokens
    yield lambda: generated(setup, "batched, chunked", max_batch_tokens=small)
    for size in settings.page_sizes:
        yield lambda size=size: generated(setup, f"pages of {size}", block_size=size)  # type: ignore[misc]
    if setup.make().runner.graphs is not None:
        yield lambda: generated(setup, "without CUDA graphs", cuda_graphs=False)
    yield lambda: cached(setup, "prefix cached", min(settings.page_sizes))
    yield lambda: preempted(setup, "preempted, recomputed", preemption="recompute")
    yield lambda: preempted(setup, "preempted, swapped", preemption="swap")


# ---- ways to compute


def trained(setup: Setup, name: str, *, together: bool, over_ranks: bool = False) -> Outcome:
    """The trainer's own forward and loss, of sequences as rows of one batch, or of each alone.

    over_ranks: of the model as it is cut, by all ranks; else of the whole one, by this process.
    """
    found = Outcome(name, setup.continuations, [], [], [])
    assert found.chosen is not None
    assert found.margins is not None
    rows = list(zip(setup.prompts, setup.continuations, strict=True))
    for batch in [rows] if together else [[row] for row in rows]:
        computed = (
            call_on_ranks(setup.opened, _trained_rows, batch) if over_ranks else _trained_rows(setup.whole, batch)
        )
        for logprobs, chosen, margins in computed:
            found.logprobs.append(logprobs)
            found.chosen.append(chosen)
            found.margins.append(margins)
    return found


@torch.no_grad()
def _trained_rows(
    model: Decoder, rows: list[tuple[list[int], list[int]]]
) -> list[tuple[list[float | None], list[int], list[float]]]:
    """(log-probabilities, greedy tokens, margins), as in Outcome, of each of the rows (prompt, continuation)."""
    device = local_tensor(next(model.parameters())).device
    lengths = [len(prompt) + len(rest) - 1 for prompt, rest in rows]
    tokens = torch.zeros(len(rows), max(lengths), dtype=torch.int64)
    labels = torch.full_like(tokens, IGNORE_INDEX)
    for row, (prompt, rest) in enumerate(rows):
        tokens[row, : lengths[row]] = torch.tensor((prompt + rest)[:-1])
        labels[row, : lengths[row]] = torch.tensor((prompt + rest)[1:])
    labels = labels.to(device)
    vocabulary = vocabulary_shard(model.config.vocab_size, model.groups)
    tops: list[tuple[Tensor, Tensor]] = []

    def head(hidden: Tensor, weight: Tensor) -> Tensor:
        assert model.head is not None
        for row, (prompt, _) in enumerate(rows):
            logits = model.head(hidden[row, len(prompt) - 1 : lengths[row]], weight)
            tops.append((logits.argmax(-1), logits.double().topk(2).values))
        return token_losses(hidden, weight, labels, vocabulary=vocabulary, batch_invariant=model.batch_invariant)

    losses = model(tokens.to(device), head=head).tolist()
    return [
        ([-loss for loss in losses[row][: lengths[row]]], chosen.tolist(), (top[:, 0] - top[:, 1]).tolist())
        for row, (chosen, top) in enumerate(tops)
    ]


def given(setup: Setup, name: str, **changes: Any) -> Outcome:
    """The engine computes prompts that are the whole sequences, and nothing is chosen."""
    sampling = _sampling(1, prompt_logprobs=True)
    completions = setup.make(**changes).generate(setup.sequences, sampling)
    return Outcome(name, setup.continuations, [_of_prompt(completion) for completion in completions])


def generated(setup: Setup, name: str, **changes: Any) -> Outcome:
    """The engine continues the prompts."""
    engine = setup.make(**changes)
    completions = engine.generate(setup.prompts, _sampling(setup.max_tokens, prompt_logprobs=True))
    return _outcome(name, completions, setup)


def cached(setup: Setup, name: str, block_size: int) -> Outcome:
    """The same a second time, with the prompts' blocks in the prefix cache: of prompts no log-probabilities then."""
    engine = setup.make(prefix_cache=True, block_size=block_size)
    sampling = _sampling(setup.max_tokens, prompt_logprobs=False)
    engine.generate(setup.prompts, sampling)
    before = engine.counts.cached_tokens
    completions = engine.generate(setup.prompts, sampling)
    return _outcome(name, completions, setup, cached_tokens=engine.counts.cached_tokens - before)


def preempted(setup: Setup, name: str, *, preemption: str) -> Outcome:
    """Before about every second step one of the sequences has to give way."""
    engine = setup.make(preemption=preemption, max_batch_tokens=len(setup.prompts) + setup.config.parity.chunk_tokens)
    sampling = _sampling(setup.max_tokens, prompt_logprobs=True)
    requests = [engine.add(prompt, sampling) for prompt in setup.prompts]
    chance, count = random.Random(setup.config.parity.seed), 0
    completions: dict[int, Completion] = {}
    while engine.num_unfinished:
        running = engine.scheduler.running
        if running and (count == 0 or chance.random() < 0.5):
            engine.preempt(chance.choice(running))
            count += 1
        completions |= {d.request: d.completion for d in engine.step() if d.completion is not None}
    counts = {"recomputed": engine.counts.recomputed, "swapped": engine.counts.swapped}
    return _outcome(name, [completions[request] for request in requests], setup, **counts)


def _sampling(max_tokens: int, *, prompt_logprobs: bool) -> SamplingConfig:
    return SamplingConfig(
        temperature=0.0, max_tokens=max_tokens, ignore_eos=True, top_logprobs=2, prompt_logprobs=prompt_logprobs
    )


def _of_prompt(completion: Completion) -> list[float | None]:
    assert completion.prompt_logprobs is not None
    return completion.prompt_logprobs[1:]


def _outcome(name: str, completions: list[Completion], setup: Setup, **notes: int) -> Outcome:
    found = Outcome(name, [], [], [], [], notes)
    assert found.chosen is not None
    assert found.margins is not None
    for prompt, completion in zip(setup.prompts, completions, strict=True):
        before = [None] * (len(prompt) - 1) if completion.prompt_logprobs is None else _of_prompt(completion)
        found.continuations.append(completion.token_ids)
        found.logprobs.append([*before, *completion.logprobs])
        found.chosen.append(completion.token_ids)
        tops = [list(top.values()) for top in completion.top_logprobs]
        found.margins.append([first - second for first, second in tops])
    return found


# ---- one against another


def compare(a: Outcome, b: Outcome, prompts: list[list[int]]) -> Pair:
    """Log-probabilities up to where contexts part, and greedy tokens up to where they differ first."""
    compared, largest, equal, margin = 0, 0.0, True, 0.0
    for row, prompt in enumerate(prompts):
        same = _common(a.continuations[row], b.continuations[row])
        both = zip(a.logprobs[row], b.logprobs[row], strict=True)
        known = [(x, y) for x, y in list(both)[: len(prompt) - 1 + same] if x is not None and y is not None]
        deltas = [abs(x - y) for x, y in known]
        compared += len(deltas)
        largest = max([largest, *(float("inf") if delta != delta else delta for delta in deltas)])
        if a.chosen is not None and b.chosen is not None:
            place = _common(a.chosen[row], b.chosen[row])
            if place < len(a.chosen[row]):
                equal = False
                margin = max([margin, *(x.margins[row][place] for x in (a, b) if x.margins is not None)])
    known_tokens = a.chosen is not None and b.chosen is not None
    return Pair(a.name, b.name, compared, largest, equal if known_tokens else None, margin)


def _common(a: list[int], b: list[int]) -> int:
    """How many tokens at the beginning are the same."""
    return next((n for n, (x, y) in enumerate(zip(a, b, strict=True)) if x != y), len(a))


def _dtype(model: Decoder) -> torch.dtype:
    return next(model.parameters()).dtype


def _bound(config: LabConfig, model: Decoder) -> tuple[float, bool]:
    """The bound, and whether it is one of half precision, in which a greedy token may be another one within it."""
    half = _dtype(model).itemsize == 2 and not config.engine.deterministic
    usual = 0.0 if config.engine.deterministic else BOUNDS[_dtype(model)]
    return (usual if config.parity.bound is None else config.parity.bound), half


def _print_table(outcomes: list[Outcome], pairs: list[Pair], bound: float) -> None:
    """Every way against the first one, and the worst pair of all."""
    said = {True: "equal", False: "differ", None: "-"}
    lines = [f"{'against the trainer':24}{'tokens':>8}{'max |delta log p|':>20}  greedy tokens"]
    for pair in pairs[: len(outcomes) - 1]:
        lines.append(f"{pair.b:24}{pair.compared:>8}{pair.max_abs_delta:>20.3g}  {said[pair.tokens_equal]}")
    worst = max(pairs, key=lambda pair: pair.max_abs_delta)
    lines.append(f"of all {len(pairs)} pairs at most {worst.max_abs_delta:.3g} ({worst.a}; {worst.b}); bound {bound:g}")
    print("\n".join(lines), file=sys.stderr)
