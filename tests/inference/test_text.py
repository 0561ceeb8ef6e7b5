"""Text that arrives token by token: nothing is lost, nothing is taken back."""

from __future__ import annotations

import random

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
