"""The engine as its users see it: streaming, log-probabilities, ends, weights that change, and what is refused."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import torch
import transformers

from data.tokenizer import Tokenizer, train_bpe
from inference.config import EngineConfig, SamplingConfig
from inference.engine import Engine
from models.decoder import Decoder
from tests.inference.greedy import GREEDY, by_the_whole_model, prompts_of
from tests.models.small import random_decoder, tiny

SMALL = EngineConfig(block_size=4, max_batch_tokens=9, max_sequences=4)


@pytest.fixture(scope="module")
def model() -> Decoder:
    return random_decoder(tiny()).double()


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    """290 tokens, all bytes among them."""
    return train_bpe(iter(["one two three two one " * 9]), 290)


@pytest.fixture(scope="module")
def writer(tokenizer: Tokenizer) -> Decoder:
    return random_decoder(tiny(vocab_size=tokenizer.vocab_size)).double()


def test_what_steps_add_is_the_completion(writer: Decoder, tokenizer: Tokenizer) -> None:
    """A token, a log-probability or a piece of text lost or given twice on the way to a client."""
    engine = Engine(writer, SMALL, tokenizer=tokenizer)
    sampling = SamplingConfig(temperature=1.0, seed=3, max_tokens=9)
    requests = [engine.add(prompt, sampling) for prompt in ("one two", "three", "two")]
    tokens: dict[int, list[int]] = {request: [] for request in requests}
    texts = dict.fromkeys(requests, "")
    while engine.num_unfinished:
        for delta in engine.step():
            tokens[delta.request] += delta.token_ids
            texts[delta.request] += delta.text
            if delta.completion is not None:
                assert delta.completion.token_ids == tokens[delta.request]
                text = tokenizer.decode(tokens[delta.request], skip_special_tokens=True)
                assert delta.completion.text == texts[delta.request] == text
                assert delta.completion.finish_reason == "length"
    assert all(len(found) == 9 for found in tokens.values())


def test_log_probabilities_are_those_of_the_whole_model(model: Decoder) -> None:
    """Of tokens one place off; of prompts whose beginning was found in the prefix cache, or came in chunks."""
    engine = Engine(model, SMALL)
    prompts = prompts_of([1, 13, 14, 22], shared=9)
    engine.generate(prompts, GREEDY)  # fills the prefix cache
    sampling = replace(GREEDY, prompt_logprobs=True, top_logprobs=3)
    for prompt, completion in zip(prompts, engine.generate(prompts, sampling), strict=True):
        tokens, logprobs = by_the_whole_model(model, prompt, 6)
        assert completion.token_ids == tokens
        torch.testing.assert_close(completion.logprobs, logprobs, rtol=0, atol=1e-10)
        with torch.no_grad():
            exact = model(torch.tensor([prompt + tokens]))[0].log_softmax(-1)
        first, *rest = completion.prompt_logprobs or []
        assert first is None
        torch.testing.assert_close(rest, [float(exact[i, t]) for i, t in enumerate(prompt[1:])], rtol=0, atol=1e-10)
        for place, top in enumerate(completion.top_logprobs):
            assert list(top) == exact[len(prompt) - 1 + place].topk(3).indices.tolist()


def test_a_request_ends_at_its_stop_tokens_strings_or_the_end_of_a_document(
    writer: Decoder, tokenizer: Tokenizer
) -> None:
    """An end that is overlooked, or whose own text is shown."""
    free = SamplingConfig(temperature=0.0, max_tokens=8)
    (whole,) = Engine(writer, SMALL, tokenizer=tokenizer).generate(["one two"], free)
    fourth = whole.token_ids[3]
    before = whole.token_ids[: whole.token_ids.index(fourth) + 1]
    ending = Engine(writer, SMALL, tokenizer=tokenizer, eos_ids=[fourth])
    for engine, sampling in (
        (ending, free),
        (Engine(writer, SMALL, tokenizer=tokenizer), replace(free, stop_token_ids=[fourth])),
    ):
        (ended,) = engine.generate(["one two"], sampling)
        assert (ended.token_ids, ended.finish_reason) == (before, "stop")
        assert ended.text == tokenizer.decode(before[:-1])
    (ignored,) = ending.generate(["one two"], replace(free, ignore_eos=True))
    assert ignored.token_ids == whole.token_ids
    assert whole.text is not None
    stop = whole.text[2:4]
    (stopped,) = Engine(writer, SMALL, tokenizer=tokenizer).generate(["one two"], replace(free, stop=[stop]))
    assert (stopped.text, stopped.finish_reason) == (whole.text[: whole.text.index(stop)], "stop")


def with_special(tokenizer: Tokenizer, *names: str) -> tokenizers.Tokenizer:
    """The same with more special tokens."""
    core = tokenizers.Tokenizer.from_str(tokenizer.to_json())
    core.add_special_tokens(list(names))
    return core


def test_a_stop_string_may_be_a_special_token(tokenizer: Tokenizer) -> None:
    """One that never stops anything, as special tokens are not in the text that stop strings are looked for in.

    Negative control: without it, and with a part of it, the continuation goes on.
    """
    special = Tokenizer(with_special(tokenizer, "<|im_end|>"), eos_token="<|endoftext|>", bos_token=None)
    end = special.special_id("<|im_end|>")
    assert end == tokenizer.vocab_size
    assert special.special_id("one") is None
    model = random_decoder(tiny(vocab_size=special.vocab_size, tie_embeddings=False)).double()
    sampling = SamplingConfig(temperature=0.0, max_tokens=9)
    engine = Engine(model, SMALL, tokenizer=special, eos_ids=[end])
    said = engine.generate([[5, 6, 7]], replace(sampling, ignore_eos=True))[0].token_ids
    place = next(place for place in range(2, 9) if said[place] not in (5, 6, 7, *said[:place]))
    assert model.embedding is not None
    assert model.head is not None
    with torch.no_grad():  # the two tokens change their parts
        for weight in (model.embedding.weight, model.head.weight):
            weight[[said[place], end]] = weight[[end, said[place]]]
    engine.weights_changed()
    stops = [["<|im_end|>"], ["b", "<|im_end|>"], ["<|im_end"], []]
    asked = [replace(sampling, ignore_eos=True, stop=stop) for stop in stops]
    found = engine.generate([[5, 6, 7]] * 4, asked)
    assert [one.finish_reason for one in found] == ["stop", "stop", "length", "length"]
    for one in found[:2]:
        assert one.token_ids == [*said[:place], end]
        assert one.text == special.decode(said[:place])


def test_a_prompt_of_text_begins_as_its_tokenizer_has_it(tokenizer: Tokenizer, tmp_path: Path) -> None:
    """A Llama or Gemma that gets text without the bos that it was trained with, or ends its prompt with an eos; a bos
    where nobody asked for one."""
    core = with_special(tokenizer, "<s>", "</s>")
    bos, eos = (core.token_to_id(name) for name in ("<s>", "</s>"))
    special = [("<s>", bos), ("</s>", eos)]
    core.post_processor = tokenizers.processors.TemplateProcessing("<s> $A", "<s> $A $B", special)
    Tokenizer(core, eos_token="</s>", bos_token="<s>").save(tmp_path)
    opened = Tokenizer.from_path(tmp_path)
    model = random_decoder(tiny(vocab_size=opened.vocab_size))
    engine, alone = Engine(model, SMALL, tokenizer=opened), Engine(model, SMALL, tokenizer=tokenizer)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    for text in ("one two", " three", "", "<s>one"):
        assert engine.prepare(text).tokens == theirs(text).input_ids
        without = SamplingConfig(add_special_tokens=False)
        if text:
            plain = theirs(text, add_special_tokens=False).input_ids
            assert engine.prepare(text, without).tokens == engine.prepare(plain).tokens == plain
    assert alone.prepare("one two").tokens == tokenizer.encode("one two")


def test_an_aborted_request_leaves_no_trace(model: Decoder) -> None:
    """Blocks that stay taken, or other requests that notice."""
    engine = Engine(model, SMALL)
    prompts = prompts_of([5, 9, 13])
    requests = [engine.add(prompt, GREEDY) for prompt in prompts]
    engine.step()
    engine.step()
    assert engine.abort(requests[1]).finish_reason == "abort"
    found: dict[int, list[int]] = {}
    while engine.num_unfinished:
        found |= {d.request: d.completion.token_ids for d in engine.step() if d.completion is not None}
    assert found == {requests[i]: by_the_whole_model(model, prompts[i], 6)[0] for i in (0, 2)}
    assert engine.blocks.num_free == engine.blocks.num_blocks
    with pytest.raises(KeyError):
        engine.abort(requests[0])


def test_weights_that_change_in_place_serve_from_the_next_step_on() -> None:
    """A copy of the weights, or a prefix that others have made: rollouts of a model that is no more."""
    model = random_decoder(tiny(), seed=0).double()
    engine = Engine(model, SMALL)
    prompts = prompts_of([9, 14], shared=8)
    old = engine.generate(prompts, GREEDY)
    pointers = [parameter.data_ptr() for parameter in model.parameters()]
    engine.add(prompts[1], GREEDY)
    while not (begun := [token for delta in engine.step() for token in delta.token_ids]):
        pass
    generator = torch.Generator().manual_seed(8)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    engine.weights_changed()
    while engine.num_unfinished:
        begun += [token for delta in engine.step() for token in delta.token_ids]
    assert begun[1:] == by_the_whole_model(model, prompts[1] + begun[:1], 5)[0]
    new = engine.generate(prompts, GREEDY)
    for prompt, before, after in zip(prompts, old, new, strict=True):
        assert after.token_ids == by_the_whole_model(model, prompt, 6)[0] != before.token_ids
    assert pointers == [parameter.data_ptr() for parameter in model.parameters()]


def test_a_model_in_training_is_served_without_dropout_and_goes_on_training() -> None:
    """Rollouts of a live trainer with dropout in them, or a trainer left in eval mode."""
    model = random_decoder(tiny(dropout=0.5, max_seq_len=32)).double()
    expected = by_the_whole_model(model, [1, 2, 3], 6)[0]
    model.train()
    (completion,) = Engine(model, SMALL).generate([[1, 2, 3]], GREEDY)
    assert completion.token_ids == expected
    assert model.training
    assert all(module.training for module in model.modules())


def test_requests_without_a_seed_differ_and_with_one_do_not(model: Decoder) -> None:
    """Eight samples of one prompt that are all the same; a seed that is not enough to repeat one."""
    prompt = prompts_of([4])[0]
    sampling = SamplingConfig(temperature=2.0, max_tokens=8)
    engine = Engine(model, replace(SMALL, seed=5))
    free = [completion.token_ids for completion in engine.generate([prompt] * 4, sampling)]
    assert len(set(map(tuple, free))) == 4
    again = Engine(model, replace(SMALL, seed=5, max_sequences=1)).generate([prompt] * 4, sampling)
    assert [completion.token_ids for completion in again] == free
    seeded = engine.generate([prompt] * 2, replace(sampling, seed=11))
    assert seeded[0].token_ids == seeded[1].token_ids


def test_a_model_that_gives_nan_says_so() -> None:
    """Token 0 for ever."""
    model = random_decoder(tiny())
    with torch.no_grad():
        model.final_norm.weight.fill_(math.nan)  # type: ignore[union-attr, operator]
    with pytest.raises(FloatingPointError, match="request 0: the model gives NaN"):
        Engine(model, SMALL).generate([[1, 2]], GREEDY)


@pytest.mark.parametrize(
    ("prompt", "changes", "says"),
    [
        ([1] * 32, {}, "the prompt has 32 tokens; engine.max_seq_len=32 leaves room for at most 31"),
        ([1] * 30, {}, "sampling.max_tokens=6 behind a prompt of 30 tokens .* use at most 2, or null"),
        ([1, 61], {}, "the token id 61, outside of the model's vocabulary of 61"),
        ([-1], {}, "the token id -1"),
        ([], {}, "the prompt has no tokens"),
        ("text", {}, "the prompt is text, and there is no tokenizer"),
        ([1], {"stop": ["x"]}, "sampling.stop=.* needs a tokenizer"),
        ([1], {"temperature": -1.0, "top_p": 0.0}, "sampling.temperature=-1.0 .*; sampling.top_p=0.0"),
        ([1], {"temperature": math.nan}, "sampling.temperature=nan"),
        ([1], {"seed": 2**32}, "sampling.seed=4294967296 must be 0 to 4294967295"),
    ],
)
def test_a_request_that_cannot_be_served_is_refused(
    model: Decoder, prompt: Any, changes: dict[str, Any], says: str
) -> None:
    """An assertion deep inside, or a prompt that is cut without a word. The others of the list are not begun."""
    engine = Engine(model, SMALL)
    with pytest.raises(ValueError, match=rf"^prompts\[1\]: .*{says}"):
        engine.generate([[1, 2], prompt], [GREEDY, replace(GREEDY, **changes)])
    assert engine.num_unfinished == 0


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        (
            {"num_blocks": 3},
            "engine.num_blocks=3 blocks of 4 tokens cannot hold .* use at least 8 blocks, or max_seq_len=12",
        ),
        ({"preemption": "swap"}, "engine.preemption=swap has nowhere to swap to"),
        ({"preemption": "wait"}, "engine.preemption=wait is unknown; use recompute or swap"),
        ({"max_batch_tokens": 2}, "engine.max_batch_tokens=2 is below engine.max_sequences=4"),
        ({"chunked_prefill": False}, "engine.max_batch_tokens=9 is below engine.max_seq_len=32"),
        ({"block_size": 0}, "engine.block_size=0 must be at least 1"),
        ({"num_blocks": 10**14}, "no memory for engine.num_blocks=10{14} blocks on cpu; use less engine.num_blocks"),
        ({"host_blocks": 10**14}, "no memory for engine.host_blocks=10{14} blocks in host memory"),
    ],
)
def test_settings_that_cannot_work_are_refused(model: Decoder, changes: dict[str, Any], says: str) -> None:
    """A sequence that waits for ever for blocks there are not."""
    with pytest.raises(ValueError, match=says):
        Engine(model, replace(SMALL, **changes))


def test_a_step_that_was_launched_early_changes_nothing(model: Decoder) -> None:
    """A token behind the end of a document given out, penalties that look at a token that is not known yet, or a
    request that is dropped while it is computed and leaves blocks behind."""
    prompts = prompts_of([3, 8, 13, 5], shared=2)
    penalties = SamplingConfig(temperature=0.7, seed=2, max_tokens=7, repetition_penalty=1.3, frequency_penalty=0.2)
    for sampling in (SamplingConfig(temperature=0.9, seed=1, max_tokens=12), penalties):
        (seen, known) = (Engine(model, replace(SMALL, overlap=overlap)) for overlap in (True, False))
        plain = known.generate(prompts, sampling)
        ends = [plain[0].token_ids[3]]  # some token that occurs ends documents now
        seen.eos_ids = known.eos_ids = frozenset(ends)
        expected, found = (engine.generate(prompts, sampling) for engine in (known, seen))
        assert [c.token_ids for c in found] == [c.token_ids for c in expected]
        assert [c.finish_reason for c in found] == [c.finish_reason for c in expected]
        assert "stop" in {c.finish_reason for c in found}
        request, other = (seen.add(prompt, sampling) for prompt in prompts[:2])
        seen.step()
        seen.abort(request)
        deltas = [delta for _ in range(20) for delta in seen.step()]
        assert {delta.request for delta in deltas} == {other}
        assert seen.blocks.num_free == seen.blocks.num_blocks


def test_penalties_of_a_request_that_joins_others_whose_tokens_are_not_known_yet(model: Decoder) -> None:
    """Tokens of the others, still being computed, counted as if they were words: an index outside of the vocabulary."""
    penalties = SamplingConfig(temperature=0, max_tokens=6, repetition_penalty=1.3, frequency_penalty=0.2)
    expected = [Engine(model, SMALL).generate([[1, 2, 3]], sampling)[0] for sampling in (GREEDY, penalties)]
    engine = Engine(model, replace(SMALL, overlap=True))
    engine.add([1, 2, 3], GREEDY)
    engine.step()
    engine.add([1, 2, 3], penalties)
    done = {d.request: d.completion for _ in range(30) for d in engine.step() if d.completion is not None}
    assert [done[request].token_ids for request in (0, 1)] == [completion.token_ids for completion in expected]


def test_results_are_read_one_step_later(model: Decoder) -> None:
    """An engine that waits for each step all the same."""
    engine = Engine(model, replace(SMALL, overlap=True))
    engine.add([1, 2], SamplingConfig(temperature=0.0, max_tokens=3))
    assert [len(engine.step()) for _ in range(4)] == [0, 1, 1, 1]
