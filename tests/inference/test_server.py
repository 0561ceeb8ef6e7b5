"""The server as OpenAI's own client sees it: what is sent is what the engine makes, whole and in pieces."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Iterator
from dataclasses import replace

import httpx
import openai
import pytest

from inference.config import EngineConfig, SamplingConfig
from inference.sequence import Completion
from inference.server.config import ServeConfig
from tests.inference.serving import NAME, SMALL, Running, bos_tokenizer, serving, text_engine, text_tokenizer

MESSAGES = [{"role": "user", "content": "one"}]
RENDERED = "<user>one\n<assistant>"
HOT = {"temperature": 1.5, "top_p": 0.9, "seed": 11, "max_tokens": 9}


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    with serving(text_engine()) as running:
        yield running


@pytest.fixture
def client(server: Running) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=90)


def expected(prompt: str | list[int], **sampling: object) -> Completion:
    """What the engine makes of the same request, on its own."""
    return text_engine().generate([prompt], SamplingConfig(**sampling))[0]  # type: ignore[arg-type]


def test_completions_are_those_of_the_engine(client: openai.OpenAI) -> None:
    """Parameters that do not arrive, choices of the wrong prompt, log-probabilities of other tokens."""
    prompts = ["one two", "three"]
    answer = client.completions.create(model=NAME, prompt=prompts, n=2, logprobs=3, **HOT)  # type: ignore[call-overload]
    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
    wanted = [expected(p, **HOT | {"seed": 11 + i, "top_logprobs": 3}) for p in prompts for i in range(2)]
    for choice, one in zip(answer.choices, wanted, strict=True):
        assert (choice.text, choice.finish_reason) == (one.text, one.finish_reason)
        assert choice.logprobs.token_logprobs == pytest.approx(one.logprobs)
        assert [len(top) for top in choice.logprobs.top_logprobs] == [3] * len(one.token_ids)
        assert choice.logprobs.text_offset[0] == 0
    assert answer.usage.prompt_tokens == sum(len(text_tokenizer().encode(prompt)) for prompt in prompts)
    assert answer.usage.completion_tokens == sum(len(one.token_ids) for one in wanted)
    assert (answer.model, answer.object) == (NAME, "text_completion")


def test_chat_completions_are_those_of_the_rendered_conversation(client: openai.OpenAI) -> None:
    """A template that was not used, or an answer whose log-probabilities lie beside it."""
    answer = client.chat.completions.create(
        model=NAME, messages=MESSAGES, logprobs=True, top_logprobs=2, **HOT  # type: ignore[call-overload]
    )  # fmt: skip
    one = expected(RENDERED, **HOT, top_logprobs=2)
    (choice,) = answer.choices
    assert (choice.message.role, choice.message.content) == ("assistant", one.text)
    assert [entry.logprob for entry in choice.logprobs.content] == pytest.approx(one.logprobs)
    spelled = b"".join(bytes(entry.bytes) for entry in choice.logprobs.content)
    assert spelled.decode(errors="replace").removesuffix("<|endoftext|>") == one.text
    assert all(len(entry.top_logprobs) == 2 for entry in choice.logprobs.content)
    in_parts = [{"role": "user", "content": [{"type": "text", "text": "one"}]}]
    again = client.chat.completions.create(model=NAME, messages=in_parts, **HOT)  # type: ignore[call-overload]
    assert again.choices[0].message.content == one.text
    assert again.usage.prompt_tokens_details.cached_tokens == (again.usage.prompt_tokens - 1) // 4 * 4


def test_a_stream_is_the_whole_answer_in_pieces(client: openai.OpenAI) -> None:
    """Text given twice, or lost at the end; a finish reason or a usage that never comes."""
    whole = client.completions.create(model=NAME, prompt="one", n=3, logprobs=1, **HOT)  # type: ignore[call-overload]
    texts, tokens, ends = [""] * 3, [[] for _ in range(3)], [None] * 3
    usage = None
    for chunk in client.completions.create(  # type: ignore[call-overload]
        model=NAME, prompt="one", n=3, logprobs=1, stream=True, stream_options={"include_usage": True}, **HOT
    ):
        usage = chunk.usage or usage
        for choice in chunk.choices:
            assert ends[choice.index] is None
            texts[choice.index] += choice.text
            tokens[choice.index] += choice.logprobs.tokens
            ends[choice.index] = choice.finish_reason
    assert texts == [choice.text for choice in whole.choices]
    assert tokens == [choice.logprobs.tokens for choice in whole.choices]
    assert ends == [choice.finish_reason for choice in whole.choices]
    assert usage.completion_tokens == whole.usage.completion_tokens
    chunks = list(client.chat.completions.create(model=NAME, messages=MESSAGES, stream=True, **HOT))  # type: ignore[call-overload]
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == expected(RENDERED, **HOT).text
    assert chunks[-1].choices[0].finish_reason == expected(RENDERED, **HOT).finish_reason


def test_many_streams_at_once_do_not_mix(server: Running) -> None:
    """Deltas in the wrong stream; an answer that depends on what it was batched with (fp64)."""

    async def one(client: openai.AsyncOpenAI, number: int) -> str:
        stream = await client.completions.create(
            model=NAME, prompt=[number + 1, 7], seed=number, max_tokens=8, stream=True, extra_body={"ignore_eos": True}
        )
        return "".join([chunk.choices[0].text async for chunk in stream])

    async def all_of_them() -> list[str]:
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
            return await asyncio.gather(*(one(client, number) for number in range(24)))

    found = asyncio.run(all_of_them())
    sampling = [SamplingConfig(seed=number, max_tokens=8, ignore_eos=True) for number in range(24)]
    wanted = text_engine().generate([[number + 1, 7] for number in range(24)], sampling)
    assert found == [completion.text for completion in wanted]


def test_every_parameter_of_the_engine_can_be_set(client: openai.OpenAI) -> None:
    """An extension that is accepted and does nothing."""
    extensions = {"top_k": 9, "min_p": 0.01, "repetition_penalty": 1.4, "ignore_eos": True, "stop_token_ids": [300]}
    extensions = {k: v for k, v in extensions.items() if k != "stop_token_ids"} | {"stop_token_ids": [5]}
    known = {"presence_penalty": 0.5, "frequency_penalty": 0.25, "temperature": 1.3, "seed": 4, "max_tokens": 12}
    answer = client.completions.create(
        model=NAME, prompt="one", extra_body={**extensions, "return_token_ids": True}, **known  # type: ignore[call-overload]
    )  # fmt: skip
    assert answer.choices[0].token_ids == expected("one", **extensions, **known).token_ids
    plain = expected("one", temperature=1.3, seed=4, max_tokens=12)
    assert answer.choices[0].token_ids != plain.token_ids
    stop = plain.text[2:4]
    stopped = client.completions.create(model=NAME, prompt="one", temperature=1.3, seed=4, max_tokens=12, stop=stop)
    assert (stopped.choices[0].text, stopped.choices[0].finish_reason) == (plain.text[:2], "stop")


def test_a_prompt_is_echoed_and_scored(client: openai.OpenAI) -> None:
    """Log-probabilities of a prompt off by one token; a token more than was asked for."""
    prompt = "one two three"
    ids = text_tokenizer().encode(prompt)
    scored = client.completions.create(model=NAME, prompt=ids, echo=True, logprobs=0, max_tokens=0)
    (choice,) = scored.choices
    one = expected(ids, max_tokens=1, prompt_logprobs=True)
    assert (choice.text, scored.usage.completion_tokens) == (prompt, 0)
    assert choice.logprobs.token_logprobs[0] is None
    assert choice.logprobs.token_logprobs[1:] == pytest.approx(one.prompt_logprobs[1:])
    assert "".join(choice.logprobs.tokens) == prompt
    assert [prompt[offset:] for offset in choice.logprobs.text_offset] == [
        text_tokenizer().decode(ids[place:]) for place in range(len(ids))
    ]
    chunks = list(client.completions.create(model=NAME, prompt=prompt, echo=True, stream=True, **HOT))  # type: ignore[call-overload]
    assert "".join(chunk.choices[0].text for chunk in chunks) == prompt + expected(prompt, **HOT).text


def test_special_tokens_of_a_prompt_are_counted_where_they_are_shown(client: openai.OpenAI) -> None:
    """Offsets that pass over a special token whose spelling is in the text."""
    tokenizer = text_tokenizer()
    ids = [tokenizer.eos_id, *tokenizer.encode("one"), tokenizer.eos_id, *tokenizer.encode(" two")]
    for prompt in (ids, "<|endoftext|>one<|endoftext|> two"):
        scored = client.completions.create(model=NAME, prompt=prompt, echo=True, logprobs=0, max_tokens=0)
        (choice,) = scored.choices
        assert choice.text == "<|endoftext|>one<|endoftext|> two"
        rests = [choice.text[offset:] for offset in choice.logprobs.text_offset]
        assert rests == [tokenizer.decode(ids[place:]) for place in range(len(ids))]


def test_text_begins_with_the_tokenizers_own_bos_and_a_conversation_with_its_templates() -> None:
    """A bos that /v1/completions leaves out, that cannot be left out, or that comes twice before a conversation; one
    that is not shown in an echo and moves the places of all others."""
    tokenizer = bos_tokenizer()
    ids = tokenizer.encode("one two")
    with serving(text_engine(tokenizer=tokenizer)) as server:
        client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=90)

        def scored(**more: object) -> tuple[list[str], list[int]]:
            ask = {"model": NAME, "echo": True, "logprobs": 0, "max_tokens": 0, "extra_body": more}
            answer = client.completions.create(prompt="one two", **ask)  # type: ignore[call-overload]
            (choice,) = answer.choices
            assert choice.text == "one two"
            assert answer.usage.prompt_tokens == len(choice.logprobs.tokens)
            return choice.logprobs.tokens, choice.logprobs.text_offset

        words = [tokenizer.decode([token]) for token in ids]
        places = [len("".join(words[:place])) for place in range(len(words))]
        assert scored() == (["<s>", *words], [0, *places])
        assert scored(add_special_tokens=False) == (words, places)
        answer = client.chat.completions.create(model=NAME, messages=MESSAGES, max_tokens=1)  # type: ignore[arg-type]
        assert answer.usage.prompt_tokens == len(tokenizer.encode(RENDERED))


SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"], "additionalProperties": False}


def test_answers_follow_a_response_format(client: openai.OpenAI) -> None:
    """A format that is accepted and ignored. Negative control: without it, it is no JSON."""
    form = {"type": "json_schema", "json_schema": {"name": "a", "schema": SCHEMA, "strict": True}}
    ask = {"model": NAME, "messages": MESSAGES, "seed": 5, "max_tokens": 70}
    answer = client.chat.completions.create(**ask, response_format=form)  # type: ignore[call-overload]
    assert answer.choices[0].finish_reason == "stop"
    assert isinstance(json.loads(answer.choices[0].message.content)["a"], int)
    plain = client.chat.completions.create(**ask)  # type: ignore[call-overload]
    with pytest.raises(ValueError):  # noqa: PT011
        json.loads(plain.choices[0].message.content)
    for body, pattern in (
        ({"regex": "[0-9]{3}-[ab]"}, "[0-9]{3}-[ab]"),
        ({"choice": ["yes", "no"]}, "yes|no"),
        ({"grammar": 'start: "x" start | "y"'}, "x*y"),
    ):
        made = client.completions.create(model=NAME, prompt="one", seed=1, max_tokens=60, extra_body=body)
        assert re.fullmatch(pattern, made.choices[0].text)


def test_models_health_and_metrics(server: Running, client: openai.OpenAI) -> None:
    """Counters that count something else, or labels that clients can make up without end."""
    assert [model.id for model in client.models.list()] == [NAME]
    assert client.models.retrieve(NAME).id == NAME
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("other")
    assert httpx.get(f"{server.url}/health").json() == {"status": "ok"}
    before = server.metric("lattice_generated_tokens_total")
    client.completions.create(model=NAME, prompt="one", max_tokens=5, extra_body={"ignore_eos": True})
    assert server.metric("lattice_generated_tokens_total") == before + 5
    assert server.metric("lattice_cache_blocks_used") == 0
    httpx.get(f"{server.url}/made/up")
    assert server.metric('lattice_http_responses_total{path="other",status="404"}') >= 1
    assert server.metric("lattice_time_to_first_token_seconds_count") > 0


def test_requests_are_continued_by_the_servers_defaults() -> None:
    """`sampling` of the command line without effect, or above what a request says."""
    defaults = SamplingConfig(temperature=0.0, max_tokens=3)
    with serving(text_engine(), defaults=defaults, template=None) as server:
        client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)
        greedy = client.completions.create(model=NAME, prompt="one")
        assert greedy.choices[0].text == expected("one", temperature=0.0, max_tokens=3).text
        hot = client.completions.create(model=NAME, prompt="one", **HOT)  # type: ignore[call-overload]
        assert hot.choices[0].text == expected("one", **HOT).text
        with pytest.raises(openai.BadRequestError, match="no chat completions: the folder has none"):
            client.chat.completions.create(model=NAME, messages=MESSAGES)  # type: ignore[arg-type]


@pytest.mark.parametrize("overlap", [False, True])
def test_a_server_under_pressure_gives_the_same_answers(overlap: bool) -> None:
    """Preemption and swapping that show in an answer."""
    config = replace(SMALL, num_blocks=24, host_blocks=30, preemption="swap", overlap=overlap, prefix_cache=False)
    engine = text_engine(config)
    with serving(engine, ServeConfig(max_queue=100)) as server:
        body = {"prompt": [[number + 1] * 9 for number in range(8)], "max_tokens": 14, "seed": 3, "ignore_eos": True}
        answer = server.post("/v1/completions", body).json()
    wanted = text_engine(EngineConfig(block_size=4)).generate(
        [[number + 1] * 9 for number in range(8)], SamplingConfig(max_tokens=14, seed=3, ignore_eos=True)
    )
    assert [choice["text"] for choice in answer["choices"]] == [completion.text for completion in wanted]
    assert engine.counts.swapped > 0
