"""Text that arrives token by token: nothing is lost, nothing is taken back."""

from __future__ import annotations

import random
import time
from collections.abc import Sequence

import pytest

from data.tokenizer import Tokenizer, train_bpe
from inference.text import TextStream

TEXT = "Gräser, 草, and 🙂🙃 under a naïve sky; def f(x): return x\n"


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_bpe(iter([TEXT * 3, "the stop of it stops here"]), 290)


def streamed(tokenizer: Tokenizer, ids: list[int], stop: list[str]) -> tuple[str, list[str]]:
    stream, given = TextStream(tokenizer, stop=stop), []
    for token in ids:
        stream.push(token)
        if stream.stopped:
            break
        given.append(stream.take())
    given.append(stream.finish())
    return stream.text, given


def test_pieces_add_up_to_the_text_of_all_tokens(tokenizer: Tokenizer) -> None:
    """Characters cut in two by the edge of a token, bytes that never become one, special tokens in between."""
    chance = random.Random(0)
    written = tokenizer.encode(TEXT)
    for trial in range(60):
        ids = written if trial == 0 else [chance.randrange(tokenizer.vocab_size) for _ in range(30)]
        text, given = streamed(tokenizer, ids, [])
        assert text == "".join(given) == tokenizer.decode(ids, skip_special_tokens=True)
    assert len([piece for piece in streamed(tokenizer, written, [])[1] if piece]) > 10


@pytest.mark.parametrize(
    ("stop", "left"),
    [
        (["🙃"], TEXT.partition("🙃")[0]),
        (["sky; ", "naïve sky"], TEXT.partition("naïve")[0]),
        (["return x\n"], TEXT.partition("return")[0]),
        (["return y", "xx"], TEXT),
        (["G"], ""),
    ],
)
def test_text_ends_before_a_stop_string_of_which_nothing_was_given(
    tokenizer: Tokenizer, stop: list[str], left: str
) -> None:
    """The beginning of a stop string shown before it was known to be one; a stop string across tokens overlooked."""
    text, given = streamed(tokenizer, tokenizer.encode(TEXT), stop)
    assert text == "".join(given) == left


def test_only_what_may_begin_a_stop_string_is_held_back(tokenizer: Tokenizer) -> None:
    """A stream that lags behind by the length of the longest stop string."""
    stream = TextStream(tokenizer, stop=["Gräzz", "something long"])
    seen = ""
    for token in tokenizer.encode("Gräser"):
        stream.push(token)
        seen += stream.take()
        held = stream.text.removeprefix(seen)
        assert held in ("", "G", "Gr", "Grä", "s")
    assert seen + stream.finish() == "Gräser"


class Counting:
    """A tokenizer that knows how much it was asked to decode at a time."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer, self.longest = tokenizer, 0

    def __getattr__(self, name: str) -> object:
        return getattr(self._tokenizer, name)

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = False) -> str:
        self.longest = max(self.longest, len(ids))
        return self._tokenizer.decode(ids, skip_special_tokens=skip_special_tokens)


@pytest.mark.parametrize("kind", ["special", "unknown", "incomplete", "broken"])
def test_tokens_without_text_cost_the_same_however_many_came_before(tokenizer: Tokenizer, kind: str) -> None:
    """Ends of documents that are ignored, or bytes that are no character, decoded all over again with each token: the
    engine's thread slower and slower for everybody. What comes behind them is text as ever."""
    by_bytes = {tokenizer.token_bytes(token): token for token in range(tokenizer.vocab_size)}
    endless = {
        "special": [tokenizer.eos_id],
        "unknown": [tokenizer.vocab_size + 5],  # as models have that have more rows than their tokenizer tokens
        "incomplete": [by_bytes[b"\x80"]],
        "broken": [by_bytes[bytes([byte])] for byte in "\U0001f642".encode()[:3]],
    }[kind]
    written = [by_bytes[bytes([byte])] for byte in " 草 \U0001f642!".encode()]
    for count in range(60, 64):  # wherever what is given up on ends
        ids = [*tokenizer.encode("sky"), *(endless * count), *written, *(endless * count), *written]
        counting = Counting(tokenizer)
        stream, given = TextStream(counting, stop=["stop"]), []
        for token in ids:
            stream.push(token)
            given.append(stream.take())
        given.append(stream.finish())
        assert stream.text == "".join(given) == tokenizer.decode(ids, skip_special_tokens=True)
        assert counting.longest < 45  # those that may change, and as many before them


class Letters:
    """A tokenizer of one letter."""

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = False) -> str:
        return "a" * len(ids)

    def is_special(self, token: int) -> bool:
        return False


def test_stop_strings_that_almost_stand_there_cost_little() -> None:
    """Every beginning of every stop string compared with every token: a client whose text is like its stop strings,
    which may be 16 of 256 characters, slows the engine's thread for everybody (a second here)."""
    stop = ["a" * (255 - number) + "b" for number in range(16)]
    stream = TextStream(Letters(), stop=stop)  # type: ignore[arg-type]
    began = time.process_time()
    for token in range(1500):
        stream.push(token)
        stream.take()
    assert time.process_time() - began < 0.3
    assert not stream.stopped


def test_a_stop_string_is_found_wherever_it_begins() -> None:
    """One that begins within what looked like its own beginning; the later one of two; too little held back."""
    chance = random.Random(0)

    class Pieces:
        """Token n is a piece of the text."""

        def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = False) -> str:
            return "".join(pieces[token] for token in ids)

        def is_special(self, token: int) -> bool:
            return False

    stops = 0
    for _ in range(300):
        pieces = ["".join(chance.choices("ab", k=chance.randint(1, 4))) for _ in range(12)]
        stop = ["".join(chance.choices("ab", k=chance.randint(2, 9))) for _ in range(3)]
        stream, text, given = TextStream(Pieces(), stop=stop), "", ""  # type: ignore[arg-type]
        for token, piece in enumerate(pieces):
            stream.push(token)
            text += piece
            given += stream.take()
            found = [text.find(one) for one in stop if one in text]
            if found:
                text = text[: min(found)]
                break
            held = max((n for one in stop for n in range(len(one)) if text.endswith(one[:n])), default=0)
            assert given == text[: len(text) - held]
        stops += stream.stopped
        assert stream.stopped == bool(found)
        assert given + stream.finish() == stream.text == text
    assert 50 < stops < 290
