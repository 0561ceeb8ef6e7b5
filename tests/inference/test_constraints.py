"""Constrained continuations: valid whatever the model, the settings and the scheduler do, and as if undisturbed."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from data.tokenizer import Tokenizer
from inference.config import EngineConfig, SamplingConfig
from inference.constraints import Grammars, allowed, allowed_bits
from inference.engine import Engine, RequestError
from inference.sequence import Completion
from tests.inference.greedy import run_preempting
from tests.inference.serving import text_engine, text_model, text_tokenizer
from tests.inference.test_features import combination
from tests.models.small import random_decoder, tiny

SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"enum": ["one", "tw\u00f6"]},
        "count": {"type": "integer", "minimum": 3, "maximum": 700},
        "parts": {"type": "array", "items": {"type": "boolean"}, "minItems": 1, "maxItems": 3},
    },
    "required": ["name", "count", "parts"],
    "additionalProperties": False,
}


def is_of_schema(text: str) -> bool:
    """Written out by hand: no library's opinion of the schema."""
    try:
        found = json.loads(text)
    except ValueError:
        return False
    return (
        isinstance(found, dict)
        and set(found) == {"name", "count", "parts"}
        and found["name"] in ("one", "tw\u00f6")
        and type(found["count"]) is int
        and 3 <= found["count"] <= 700
        and 1 <= len(found["parts"]) <= 3
        and all(isinstance(part, bool) for part in found["parts"])
    )


def is_balanced(text: str) -> bool:
    """Of the grammar below, which no regular expression describes."""
    opened, rest = len(text) - len(text.lstrip("(")), text.strip("()")
    return rest == "x" and text == "(" * opened + "x" + ")" * opened


CHOICES = ["yes", 'no "thanks"\n', "h\u00f6chstens\\"]
KINDS: dict[str, tuple[dict[str, object], Callable[[str], bool]]] = {
    "json_schema": ({"json_schema": json.dumps(SCHEMA)}, is_of_schema),
    "regex": ({"regex": r"[0-9]{3}-(ab|\u00e9)+\."}, lambda text: bool(re.fullmatch(r"[0-9]{3}-(ab|\u00e9)+\.", text))),
    "choice": ({"choice": CHOICES}, CHOICES.__contains__),
    "grammar": ({"grammar": 'start: "(" start ")" | "x"'}, is_balanced),
}


def samplings(*, seeds: int, **changes: object) -> list[SamplingConfig]:
    """Every kind with some seeds, hot, greedy and filtered, and one that is free."""
    found = []
    for settings, _ in KINDS.values():
        for seed in range(seeds):
            how = ({"temperature": 1.7}, {"temperature": 0.0}, {"top_k": 3, "repetition_penalty": 1.2})[seed % 3]
            found.append(SamplingConfig(seed=seed, **settings | how | changes))  # type: ignore[arg-type]
    return [*found, SamplingConfig(seed=1, max_tokens=9)]


def check(completions: list[Completion], each: list[SamplingConfig]) -> int:
    """Those that ended are whole; the number of these. Others ran out of room."""
    whole = 0
    for completion, sampling in zip(completions, each, strict=True):
        for settings, valid in KINDS.values():
            if all(getattr(sampling, name) == value for name, value in settings.items()):
                assert completion.finish_reason in ("stop", "length")
                assert completion.text is not None
                assert valid(completion.text) == (completion.finish_reason == "stop"), completion.text
                whole += completion.finish_reason == "stop"
    return whole


def test_continuations_are_valid_and_those_of_the_model_alone_are_not() -> None:
    """A mask that is off by a token, or applied to another row; a test that anything would pass."""
    each = samplings(seeds=6, max_tokens=60)
    completions = text_engine().generate(["one two"] * len(each), each)
    assert check(completions, each) > 15
    free = text_engine().generate(["one two"] * 8, [SamplingConfig(seed=seed, max_tokens=25) for seed in range(8)])
    assert not any(valid(completion.text or "") for completion in free for _, valid in KINDS.values())


@pytest.mark.parametrize("seed", range(6))
def test_features_do_not_change_constrained_continuations(seed: int) -> None:
    """A state that is lost, or advanced twice, when a sequence is preempted, swapped, chunked or launched early."""
    each = samplings(seeds=3, max_tokens=18)
    alone = text_engine().generate(["one two"] * len(each), each)
    engine = text_engine(replace(combination(seed), max_seq_len=32))
    found = run_preempting_each(engine, each, seed=seed)
    assert [completion.token_ids for completion in found] == [completion.token_ids for completion in alone]
    check(found, each)


def run_preempting_each(engine: Engine, each: list[SamplingConfig], *, seed: int) -> list[Completion]:
    """`run_preempting`, each prompt with settings of its own."""
    waiting = iter(each)
    add = engine.add
    engine.add = lambda prompt, sampling=None: add(prompt, next(waiting))  # type: ignore[method-assign]
    return run_preempting(engine, ["one two"] * len(each), SamplingConfig(), seed=seed, late=5)  # type: ignore[list-item]


def test_free_rows_do_not_notice_constrained_ones() -> None:
    """A mask of one row that reaches another."""
    free = [SamplingConfig(seed=seed, max_tokens=10, top_p=0.9) for seed in range(4)]
    alone = text_engine().generate(["two"] * 4, free)
    mixed = [sampling for pair in zip(free, samplings(seeds=1)[:4], strict=True) for sampling in pair]
    together = text_engine().generate(["two"] * 8, mixed)
    assert [completion.token_ids for completion in together[::2]] == [completion.token_ids for completion in alone]


def spelled(tokenizer: Tokenizer, token: int) -> bytes | None:
    """The bytes of a token that is text."""
    return None if token == tokenizer.eos_id else tokenizer.token_bytes(token)


@pytest.mark.parametrize("threads", [False, True])
@pytest.mark.parametrize("begun", [b"", b"1", b"12", b"12t", b"12two"])
def test_the_mask_is_what_the_language_allows(begun: bytes, threads: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against an enumeration: a token may come if some string of the language begins with all that is there then."""
    tokenizer, vocab_size = text_tokenizer(), text_model().config.vocab_size
    language = [f"{a}{b}{word}".encode() for a in range(10) for b in range(10) for word in ("two", "three", "two!")]
    grammars = Grammars(tokenizer, vocab_size=vocab_size, eos_ids=[tokenizer.eos_id])
    constraint = grammars.start(SamplingConfig(regex="[0-9][0-9](two|three|two!)"))
    assert constraint is not None
    for byte in begun:
        constraint.push(next(t for t in range(vocab_size) if spelled(tokenizer, t) == bytes([byte])))
    monkeypatch.setattr("inference.constraints.PARALLEL_WORDS", 0 if threads else 2**30)
    again = grammars.start(SamplingConfig(choice=["yes"]))
    bits = allowed_bits([None, constraint, again], vocab_size=vocab_size)
    assert bits is not None
    mask = allowed(bits, vocab_size=vocab_size)
    assert mask[0].all()
    assert {tokenizer.decode([token]) for token in mask[2].nonzero()[:, 0].tolist()} == {"y"}
    for token in range(vocab_size):
        text = spelled(tokenizer, token)
        may = begun in language if text is None else bool(text) and any(s.startswith(begun + text) for s in language)
        assert bool(mask[1, token]) == may, (token, text)
    assert not constraint.ended


def test_stop_strings_and_stop_tokens_still_end_a_continuation() -> None:
    """A constraint that takes over what else may end a request."""
    sampling = SamplingConfig(regex="[ab]{30}", seed=3)
    (whole,) = text_engine().generate(["one"], sampling)
    assert whole.text is not None
    assert (len(whole.text), whole.finish_reason) == (30, "stop")
    first = whole.text.index("ba")
    (stopped,) = text_engine().generate(["one"], replace(sampling, stop=["ba"]))
    assert (stopped.text, stopped.finish_reason) == (whole.text[:first], "stop")
    (cut,) = text_engine().generate(["one"], replace(sampling, max_tokens=4))
    assert (cut.text, cut.finish_reason) == (whole.text[:4], "length")
    (insisting,) = text_engine().generate(["one"], SamplingConfig(regex="a|ab", seed=3, ignore_eos=True))
    assert (insisting.text in ("a", "ab"), insisting.finish_reason) == (True, "stop")


def test_a_constraint_that_needs_tokens_the_model_lacks_ends_with_a_reason() -> None:
    """A row without a token that is allowed: NaN, or any token at all. The others go on."""
    tokenizer = text_tokenizer()
    small = next(token for token in range(tokenizer.vocab_size) if tokenizer.token_bytes(token) == b"z")
    model = random_decoder(tiny(vocab_size=small, max_seq_len=48)).double()
    engine = Engine(model, EngineConfig(block_size=4), tokenizer=tokenizer, eos_ids=[tokenizer.eos_id])
    lost, fine = engine.generate([[1], [1]], [SamplingConfig(regex="az"), SamplingConfig(regex="ab")])
    assert (lost.text, lost.finish_reason) != ("az", "stop")
    assert lost.finish_reason == "constraint"
    assert lost.error
    assert (fine.text, fine.finish_reason) == ("ab", "stop")
    assert engine.blocks.num_free == engine.blocks.num_blocks


WRONG = [
    ({"json_schema": "{"}, "sampling.json_schema is wrong"),
    ({"json_schema": '{"type": "objec"}'}, "sampling.json_schema is wrong: Invalid type: objec"),
    ({"json_schema": '{"$ref": "#"}'}, "sampling.json_schema allows nothing"),
    ({"regex": "[a"}, "sampling.regex is wrong: .*unclosed character class"),
    ({"regex": "(?=a)b"}, "sampling.regex is wrong: .*look-ahead"),
    ({"grammar": "start: other"}, 'sampling.grammar is wrong: .*unknown name: "other"'),
    ({"choice": [""]}, "sampling.choice=.* must be strings that are not empty"),
    ({"regex": "a", "json_schema": "{}"}, "sampling.json_schema and sampling.regex exclude each other"),
]


@pytest.mark.parametrize(("settings", "says"), WRONG)
def test_what_is_no_constraint_is_refused(settings: dict[str, object], says: str) -> None:
    """A thread that panics later, or output that follows nothing."""
    with pytest.raises(RequestError, match=f"^{says}"):
        text_engine().add("one", SamplingConfig(**settings))  # type: ignore[arg-type]


def test_without_a_tokenizer_or_the_library_it_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """An ImportError in the middle of a batch. What is not constrained needs neither."""
    engine = Engine(text_model(), EngineConfig(block_size=4))
    with pytest.raises(RequestError, match=r"^sampling.regex needs a tokenizer, and there is none"):
        engine.add([1], SamplingConfig(regex="a"))
    monkeypatch.setitem(sys.modules, "llguidance", None)
    with pytest.raises(RequestError, match=r"needs the package llguidance; pip install 'lattice-train\[constrained\]'"):
        text_engine().add([1], SamplingConfig(regex="a"))
    assert text_engine().generate([[1]], SamplingConfig(max_tokens=3))[0].finish_reason is not None


@torch.no_grad()
def test_bits_become_a_mask_of_every_width() -> None:
    """The last word of a vocabulary that is no multiple of 32, or its sign bit."""
    for vocab_size in (1, 31, 32, 33, 64, 77):
        wanted = torch.rand(3, vocab_size, generator=torch.Generator().manual_seed(vocab_size)) < 0.5
        words = torch.zeros(3, -(-vocab_size // 32), dtype=torch.int64)
        for token in range(vocab_size):
            words[:, token // 32] |= wanted[:, token].long() << (token % 32)
        assert torch.equal(allowed(words.to(torch.int32), vocab_size=vocab_size), wanted)
