"""The engine as a model of lm-evaluation-harness, by its interface; tests/launch/test_eval.py runs the real one."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import replace
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from inference.engine import Engine
from inference.text import Tokenizer
from tests.inference.serving import SMALL, TEMPLATE, text_model, text_tokenizer

PREFIX = 7


class _Cache:
    """In place of the harness's."""

    def __init__(self) -> None:
        self.added: list[Any] = []

    def add_partial(self, kind: str, arguments: Any, result: Any) -> None:
        self.added.append((kind, arguments, result))


class _LM:
    """What EngineLM derives from, where lm-eval is not installed."""

    def __init__(self) -> None:
        self.cache_hook: Any = _Cache()


@pytest.fixture(scope="module")
def harness() -> Iterator[ModuleType]:
    """inference.harness, on the real base class if there is one."""
    stand_ins = {}
    try:
        import lm_eval.api.model  # noqa: F401
    except ImportError:
        stand_ins = {name: ModuleType(name) for name in ("lm_eval", "lm_eval.api", "lm_eval.api.model")}
        stand_ins["lm_eval.api.model"].LM = _LM  # type: ignore[attr-defined]
    sys.modules.update(stand_ins)
    import inference.harness

    yield inference.harness
    if stand_ins:
        for name in (*stand_ins, "inference.harness"):
            del sys.modules[name]


@pytest.fixture
def model(harness: ModuleType) -> Any:
    engine = Engine(text_model(), replace(SMALL, max_seq_len=24), tokenizer=text_tokenizer(), eos_ids=[])
    found = harness.EngineLM(engine, prefix_id=PREFIX, max_gen_toks=5)
    found.cache_hook = _Cache()
    return found


def asked(*arguments: Any) -> SimpleNamespace:
    return SimpleNamespace(args=arguments)


def closed(context: list[int], continuation: list[int]) -> tuple[float, bool]:
    total, greedy = 0.0, True
    for place, token in enumerate(continuation):
        with torch.no_grad():
            last = text_model()(torch.tensor([context + continuation[:place]]))[0, -1].log_softmax(-1)
        total, greedy = total + float(last[token]), greedy and int(last.argmax()) == token
    return total, greedy


def test_likelihoods_are_those_of_the_continuation_alone(model: Any) -> None:
    """The context scored as well; a token that spans both divided; too long a context cut at its end; results of other
    requests; choices that are called greedy, or not, by another choice's tokens."""
    tokenizer: Tokenizer = text_tokenizer()
    encode = tokenizer.encode
    long = "one two three " * 9
    pairs = [("one two", " three two"), ("one two ", "three two"), ("", "one two"), ("xyz", "!"), (long, "three one")]
    found = model.loglikelihood([asked(*pair) for pair in pairs])
    whole = encode("one two three two")
    assert whole[: len(encode("one two"))] == encode("one two")
    room = model.max_length + 1
    blanks = encode(long.rstrip() + " three one")
    after = blanks[len(encode(long.rstrip())) :]
    expected = [
        closed(encode("one two"), whole[len(encode("one two")) :]),
        closed(encode("one two"), whole[len(encode("one two")) :]),
        closed([PREFIX], encode("one two")),
        closed(encode("xyz"), encode("xyz!")[len(encode("xyz")) :]),
        closed(encode(long.rstrip())[-(room - len(after)) :], after),
    ]
    assert len(blanks) > room
    assert [logprob for logprob, _ in found] == pytest.approx([logprob for logprob, _ in expected], rel=1e-10)
    assert [greedy for _, greedy in found] == [greedy for _, greedy in expected]
    assert [result for *_, result in model.cache_hook.added] == found

    context = encode("one two")
    first = int(text_model()(torch.tensor([context]))[0, -1].argmax())
    choices = [(context, [first]), (context, [first, 3]), (context, [(first + 1) % 9])]
    assert model._are_greedy(choices) == [closed(*choice)[1] for choice in choices]
    assert model._are_greedy(choices)[0]


def test_a_whole_text_is_scored_once_in_windows(model: Any) -> None:
    """A text's end lost, its first token free, a window that sees what it predicts."""
    text = "one two three! " * 12
    tokens = text_tokenizer().encode(text)
    most = model.max_length
    assert len(tokens) > 2 * most
    expected = closed([PREFIX], tokens[:most])[0]
    for begin in range(most, len(tokens), most):
        end = min(begin + most, len(tokens))
        expected += closed(tokens[end - most - 1 : begin], tokens[begin:end])[0]
    short = closed([PREFIX], text_tokenizer().encode("two"))[0]
    assert model.loglikelihood_rolling([asked(text), asked("two"), asked("")]) == pytest.approx([expected, short, 0.0])


def test_windows_of_the_real_harness(harness: ModuleType) -> None:
    """Texts cut in another way than by the harness's own models."""
    utils = pytest.importorskip("lm_eval.utils")
    for length in range(0, 40):
        tokens = list(range(100, 100 + length))
        real = [
            (context + continuation, len(continuation))
            for context, continuation in map(
                utils.make_disjoint_window,
                utils.get_rolling_token_windows(tokens, prefix_token=7, max_seq_len=9, context_len=1),
            )
        ]
        assert harness.rolling_windows(tokens, 7, 9) == real


def test_continuations_end_as_tasks_say(model: Any) -> None:
    """Sampling where greedy was asked for, a stop string that is in the answer, a length that nobody asked for."""
    engine = model._engine
    tokens = text_tokenizer().encode("one two")

    def greedy(count: int) -> str:
        sampling = model._sampling({"max_gen_toks": count})
        (completion,) = engine.generate([tokens], sampling)
        assert completion.text is not None
        return completion.text

    whole = greedy(8)
    kwargs = [
        {"until": [], "max_gen_toks": 8},
        {"until": whole[2], "max_gen_toks": 8, "do_sample": False, "temperature": 0.9},
        {},
        {"max_new_tokens": 3, "temperature": 0, "num_beams": 1, "until": [""]},
    ]
    found = model.generate_until([asked("one two", each) for each in kwargs])
    assert found == [whole, whole[: whole.index(whole[2])], greedy(5), greedy(3)]
    drawn = model._sampling({"do_sample": True, "temperature": 0.7, "top_p": 0.9, "top_k": 5, "seed": None})
    assert (drawn.temperature, drawn.top_p, drawn.top_k, drawn.seed) == (0.7, 0.9, 5, None)
    with pytest.raises(ValueError, match="generation_kwargs have num_beams=4, which the engine does not know"):
        model.generate_until([asked("one", {"num_beams": 4})])
    with pytest.raises(ValueError, match="max_gen_toks=24 leaves no room for a prompt"):
        model.generate_until([asked("one", {"max_gen_toks": 24})])
    (long,) = model.generate_until([asked("one two three " * 9, {"max_gen_toks": 4})])
    assert isinstance(long, str)
    with pytest.raises(ValueError, match="a continuation has"):
        model.loglikelihood([asked("one", " two three!" * 20)])


def test_conversations_become_text_by_the_models_template(harness: ModuleType, model: Any) -> None:
    """A template of the harness's choice."""
    from data.chat import ChatTemplate

    with pytest.raises(ValueError, match="there is no chat template"):
        model.apply_chat_template([{"role": "user", "content": "x"}])
    template = ChatTemplate(TEMPLATE, {})
    talks = harness.EngineLM(model._engine, prefix_id=PREFIX, template=template)
    assert talks.apply_chat_template([{"role": "user", "content": "x"}]) == "<user>x\n<assistant>"
    assert talks.chat_template(True) == TEMPLATE
    assert talks.chat_template(False) == model.chat_template(True) == ""
    assert talks.tokenizer_name.startswith("lattice-")
