"""Sequence: one request on its way through the engine."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum

from inference.config import SamplingConfig
from inference.constraints import Constraint
from inference.speculation.counts import DraftCounts
from inference.text import TextStream


class Status(Enum):
    """Where a sequence is. Only RUNNING ones hold blocks of the cache; SWAPPED ones hold blocks on the host."""

    WAITING = "waiting"
    RUNNING = "running"
    SWAPPED = "swapped"
    FINISHED = "finished"


@dataclass
class Completion:
    """A request's result. `Engine` fills it as tokens arrive."""

    token_ids: list[int] = field(default_factory=list)  # the one that ended it included
    logprobs: list[float] = field(
        default_factory=list
    )  # of each, by the model alone: no penalty, no temperature (but tempered_logprobs)
    text: str | None = None  # without what ended it; None: there is no tokenizer
    # stop: a stop string, stop token, end of document or of a constraint; length; abort; None: not yet; and failures,
    # nan: the model gives no probabilities; constraint: it cannot be followed any further
    finish_reason: str | None = None
    error: str | None = None  # of a failure: what happened
    top_logprobs: list[dict[int, float]] = field(default_factory=list)  # sampling.top_logprobs: of each place
    prompt_logprobs: list[float | None] | None = None  # sampling.prompt_logprobs: the first token has none
    cached_tokens: int | None = None  # of the prompt, that the prefix cache had when it was begun; None: it was not
    speculation: DraftCounts | None = None  # what became of drafts; None: there were none


PENDING = -1
"""A token that is still being computed, at the end of Sequence.tokens."""


@dataclass(eq=False)
class Sequence:
    """Tokens, how many of them are in the cache, and where.

    Prompts and continuations are not told apart when they are computed: a sequence is behind by some tokens, a step
    computes some of these, and once it is behind by none the step's last logits give the next token.
    """

    number: int  # of the request
    tokens: list[int]  # of prompt and continuation; the last may be PENDING
    num_prompt: int
    sampling: SamplingConfig
    seed: int
    max_tokens: int
    text: TextStream | None
    constraint: Constraint | None = None  # advanced by Engine
    adapter: int = 0  # number of the one that computes it; 0: the model alone
    completion: Completion = field(default_factory=Completion)
    status: Status = Status.WAITING  # kept by Scheduler
    num_computed: int = 0  # tokens whose keys and values are in the cache, or will be; kept by Engine, Scheduler
    blocks: list[int] = field(default_factory=list)  # kept by BlockManager, as the rest
    host_blocks: list[int] = field(default_factory=list)
    contents: list[int] = field(default_factory=list)  # of its first blocks: number of what is in them

    @property
    def num_behind(self) -> int:
        """Tokens that are not in the cache; at least 1."""
        return len(self.tokens) - self.num_computed

    @property
    def has_all_tokens(self) -> bool:
        """Whether its last token is known or being computed."""
        return len(self.tokens) >= self.num_prompt + self.max_tokens

    @property
    def samples_by_tokens(self) -> bool:
        """Whether its next token depends on its earlier ones by more than the model."""
        return self.constraint is not None or self.sampling.has_penalties

    @property
    def wants_prompt_logprobs(self) -> bool:
        """Whether hidden states of its prompt are still needed, so that a cached prefix would not do."""
        return self.completion.prompt_logprobs is not None and None in self.completion.prompt_logprobs[1:]
