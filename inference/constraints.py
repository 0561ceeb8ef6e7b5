"""Constrained output: which tokens may come next, so that a continuation is JSON of a schema, matches a regular
expression, is one of some strings, or is derived from a grammar.

Grammars are llguidance's (derivative-based lexer, Earley parser, a mask over the vocabulary for each token), which is
an optional dependency. Where a continuation is in its grammar is a function of its tokens alone and is kept on the
host, so it goes on unchanged when a sequence is preempted.

R rows (sequences that get a token), W words of 32 bits that hold one bit for each token of the vocabulary.
"""

from __future__ import annotations

import json
import threading
from collections import OrderedDict
from collections.abc import Collection
from collections.abc import Sequence as Seq
from functools import cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from inference.config import SamplingConfig, constraint_of
from inference.text import Tokenizer

if TYPE_CHECKING:
    import llguidance

KEPT_GRAMMARS = 64
"""Compiled grammars that are kept for requests that have the same."""
PARALLEL_WORDS = 2**13
"""Of a step's masks, from which on threads share them: waking these takes half a millisecond."""
WHITESPACE = r"[ \n\t]{1,32}"
"""Between the parts of JSON. Unbounded, a model may write blanks until it runs out of tokens; a schema can say
otherwise in its "x-guidance"."""


class ConstraintError(ValueError):
    """A constraint that cannot be followed; the message says why."""


class Constraint:
    """Where one continuation is in its grammar."""

    def __init__(self, matcher: llguidance.LLMatcher, *, words: int) -> None:
        """words: of 32 bits that its mask fills."""
        self.matcher, self.words = matcher, words

    def push(self, token: int) -> None:
        """Go on behind a token of the continuation."""
        self.matcher.consume_token(token)

    def along(self, tokens: Seq[int]) -> list[Constraint | None]:
        """Where it would be behind each of some tokens that may follow; None from the first one on that is not
        allowed, or that ends the continuation. It stays where it is."""
        found: list[Constraint | None] = []
        state: Constraint | None = self
        for token in tokens:
            if state is not None:
                state = Constraint(state.matcher.deep_copy(), words=self.words)
                gone_on = not state.matcher.is_stopped() and state.matcher.try_consume_tokens([token]) == 1
                state = state if gone_on and not state.ended and state.error is None else None
            found.append(state)
        return found

    @property
    def error(self) -> str | None:
        """Why it cannot go on: a grammar that became too complex, or a token that was not allowed."""
        return _one_line(self.matcher.get_error()) if self.matcher.is_error() else None

    @property
    def ended(self) -> bool:
        """The continuation is complete, and nothing but the end of the document could follow."""
        return self.matcher.is_stopped()

    @property
    def ended_by_token(self) -> bool:
        """It is complete, and its last token is the end of the document, which is no text."""
        return self.matcher.stop_reason() == "EndOfSentence"


class Grammars:
    """The grammars over one tokenizer's tokens. Any thread may call `start`."""

    def __init__(self, tokenizer: Tokenizer, *, vocab_size: int, eos_ids: Collection[int]) -> None:
        """vocab_size: of the model. eos_ids: tokens that may follow a complete continuation; none: the tokenizer's.

        Raises ConstraintError without llguidance, and for a tokenizer it cannot read.
        """
        library = _library()
        size = max(vocab_size, tokenizer.vocab_size)  # tokens the model lacks are cut off in `allowed`
        ends = sorted(eos_ids) or [tokenizer.eos_id]
        try:
            self._tokenizer = library.LLTokenizer(tokenizer.to_json(), n_vocab=size, eos_token=ends)
        except ValueError as error:
            raise ConstraintError(f"llguidance cannot read the tokenizer: {_one_line(str(error))}") from None
        self._compiled: OrderedDict[tuple[str, str], llguidance.LLMatcher] = OrderedDict()
        self._lock = threading.Lock()

    def start(self, sampling: SamplingConfig) -> Constraint | None:
        """The beginning of a continuation; None: sampling has no constraint. Raises ConstraintError for a wrong one."""
        found = constraint_of(sampling)
        if found is None:
            return None
        key = (found.kind, found.text)
        with self._lock:
            compiled = self._compiled.get(key)
        if compiled is None:
            compiled = self._compile(found.kind, found.text)
        with self._lock:
            self._compiled[key] = compiled
            self._compiled.move_to_end(key)
            if len(self._compiled) > KEPT_GRAMMARS:
                self._compiled.popitem(last=False)
            return Constraint(compiled.deep_copy(), words=-(-self._tokenizer.vocab_size // 32))

    def _compile(self, kind: str, text: str) -> llguidance.LLMatcher:
        try:
            matcher = _library().LLMatcher(self._tokenizer, _grammar(kind, text), log_level=0)
        except ValueError as error:
            raise ConstraintError(f"sampling.{kind} is wrong: {_one_line(str(error))}") from None
        if matcher.is_error():
            raise ConstraintError(f"sampling.{kind} is wrong: {_one_line(matcher.get_error())}")
        first = matcher.deep_copy()
        first.compute_bitmask()
        if first.is_error():
            raise ConstraintError(f"sampling.{kind} allows nothing, or is too complex: {_one_line(first.get_error())}")
        return matcher


def allowed_bits(constraints: Seq[Constraint | None], *, vocab_size: int) -> Tensor | None:
    """What each row's next token may be: [R, W] int32 on the host, bit b of word w for token 32 w + b.

    None: no row has a constraint. A row in which nothing is allowed, as when a grammar needs a token that the model
    lacks, allows everything: whatever is taken is an error of its constraint.
    """
    rows = [(row, constraint) for row, constraint in enumerate(constraints) if constraint is not None]
    if not rows:
        return None
    words = rows[0][1].words  # of the tokenizer, which may have more tokens than the model
    bits = torch.full((len(constraints), words), -1, dtype=torch.int32)
    row_bytes = words * bits.itemsize
    if len(rows) > 1 and len(rows) * words >= PARALLEL_WORDS:
        matchers = [(constraint.matcher, row) for row, constraint in rows]
        _executor().unsafe_compute_mask_ptr(matchers, bits.data_ptr(), row_bytes, len(bits))
    else:
        for row, constraint in rows:
            constraint.matcher.unsafe_compute_mask_ptr(bits[row].data_ptr(), row_bytes)
    whole, rest = divmod(vocab_size, 32)
    if rest:
        bits[:, whole] &= (1 << rest) - 1
    bits = bits[:, : whole + (rest > 0)].contiguous()
    bits[(bits == 0).all(1)] = -1
    return bits


def allowed(bits: Tensor, *, vocab_size: int) -> Tensor:
    """[R, vocab_size] bool of bits [R, W], on their device."""
    place = torch.arange(32, dtype=torch.int32, device=bits.device)
    return ((bits[:, :, None] >> place) & 1).flatten(1)[:, :vocab_size].bool()


def _grammar(kind: str, text: str) -> str:
    """llguidance's form of a constraint."""
    matcher = _library().LLMatcher
    if kind == "json_schema":
        return matcher.grammar_from_json_schema(text, defaults={"whitespace_pattern": WHITESPACE})
    if kind == "regex":
        return matcher.grammar_from_regex(text)
    if kind == "choice":
        text = "start: " + " | ".join(json.dumps(choice, ensure_ascii=False) for choice in json.loads(text))
    return matcher.grammar_from_lark(text)


@cache
def _executor() -> llguidance.LLExecutor:
    """Threads that compute the masks of a step's rows."""
    return _library().LLExecutor()


def _library() -> Any:
    """llguidance, which not everybody has."""
    try:
        import llguidance
    except ImportError:
        raise ConstraintError(
            "constrained output needs the package llguidance; pip install 'lattice-train[constrained]'"
        ) from None
    return llguidance


def _one_line(message: str) -> str:
    """Without the library's dump of its state."""
    return " ".join(message.partition("<state>")[0].split())
