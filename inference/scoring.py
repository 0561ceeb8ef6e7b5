"""Log-probabilities of given tokens by the engine, and how a text that is longer than the model's context is cut."""

from __future__ import annotations

import math
from collections.abc import Iterator
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from typing import NamedTuple

from inference.config import SamplingConfig
from inference.engine import Engine

_SCORE = SamplingConfig(temperature=0.0, max_tokens=1, ignore_eos=True, prompt_logprobs=True)


class Window(NamedTuple):
    """tokens[begin:end] are given to the model, of which those from `scored` on are scored."""

    begin: int
    scored: int
    end: int


@dataclass
class Likelihood:
    """Of a text. Filled by `likelihood`."""

    nll: float  # nats of all scored tokens together
    scored: list[int]  # their places

    @property
    def perplexity(self) -> float:
        """exp of the mean over tokens, whatever window they were in."""
        return exp_or_inf(self.nll / len(self.scored))

    def bits_per_byte(self, num_bytes: int) -> float:
        """num_bytes: of the scored tokens' text."""
        return self.nll / math.log(2) / num_bytes


def sliding_windows(num_tokens: int, *, window: int, stride: int) -> Iterator[Window]:
    """Windows of `window` tokens, each `stride` behind the one before; each scores what those before have not.

    Every token but the first is scored, behind at least window - stride others where the text has them. With
    stride = window nothing overlaps, and the first token of each window, which has no context, is not scored.
    """
    done = 0
    for begin in range(0, num_tokens, stride):
        end = min(begin + window, num_tokens)
        yield Window(begin, max(done, begin + 1), end)
        done = end
        if end == num_tokens:
            return


def score(engine: Engine, sequences: Seq[Seq[int]], counts: Seq[int]) -> list[list[float]]:
    """Log-probabilities of the last counts[i] tokens of each sequence, by the model alone; all sequences at once.

    Raises RequestError for a sequence that is not shorter than the engine's longest, ValueError where a first token is
    to be scored and FloatingPointError where the model gives no probabilities (NaN).
    """
    found = []
    for completion, count in zip(engine.generate(list(sequences), _SCORE), counts, strict=True):
        assert completion.prompt_logprobs is not None
        logprobs = completion.prompt_logprobs[len(completion.prompt_logprobs) - count :]
        known = [logprob for logprob in logprobs if logprob is not None]
        if len(known) != count:
            raise ValueError("the first token of a sequence has no context and cannot be scored")
        if any(map(math.isnan, known)):
            raise FloatingPointError("the model gives NaN for a token; its weights, or what they make, are not finite")
        found.append(known)
    return found


def likelihood(engine: Engine, tokens: Seq[int], *, window: int, stride: int) -> Likelihood:
    """Of a text of at least two tokens, by sliding windows. Raises what `score` raises."""
    windows = list(sliding_windows(len(tokens), window=window, stride=stride))
    windows = [cut for cut in windows if cut.scored < cut.end]
    rows = score(engine, [tokens[w.begin : w.end] for w in windows], [w.end - w.scored for w in windows])
    places = [place for w in windows for place in range(w.scored, w.end)]
    return Likelihood(-math.fsum(logprob for row in rows for logprob in row), places)


def exp_or_inf(x: float) -> float:
    """exp, where floats end inf."""
    return math.exp(x) if x < 709 else math.inf
