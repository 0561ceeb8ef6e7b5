"""Thousands of requests of every kind, many of which go away: in the end nothing is left of them."""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from inference.config import EngineConfig
from inference.engine import Engine
from inference.server.config import ServeConfig
from tests.inference.serving import Running, serving, text_model, text_tokenizer
from tests.inference.speculating import speculating
from tests.models.small import random_decoder, tiny

PRESSED = EngineConfig(
    block_size=4, num_blocks=30, host_blocks=12, max_batch_tokens=48, max_sequences=24, preemption="swap"
)


def any_body(chance: random.Random) -> dict[str, Any]:
    """A request that can be served, or one that cannot."""
    prompt = [chance.randrange(61) for _ in range(chance.choice([1, 2, 5, 9, 17]))]
    body: dict[str, Any] = {"prompt": prompt, "max_tokens": chance.choice([1, 2, 4, 8, 20]), "ignore_eos": True}
    body |= chance.choice([{}, {}, {"stream": True}, {"stream": True}, {"n": 3}, {"prompt": [prompt, [1, 2]]}])
    body |= chance.choice([{}, {"temperature": 0}, {"top_k": 3, "seed": 1}, {"stop_token_ids": [3]}, {"logprobs": 2}])
    return body | chance.choice([{}] * 9 + [{"prompt": [99]}, {"max_tokens": 99}, {"n": -1}])


def any_text(chance: random.Random) -> dict[str, Any]:
    """A conversation or a text, some of which have to end, or to look, in some way."""
    said = " ".join(chance.choice(["one", "two", "three"]) for _ in range(chance.choice([1, 3, 9])))
    body: dict[str, Any] = {"max_tokens": chance.choice([1, 4, 8, 20])}
    body |= chance.choice([{"prompt": said}, {"messages": [{"role": "user", "content": said}]}])
    body |= chance.choice([{}, {"stop": ["o", "two"]}, {"regex": "[a-c]{1,9}"}, {"choice": ["one two", "three"]}])
    body |= chance.choice([{}, {"stream": True}, {"n": 2}, {"temperature": 0}, {"repetition_penalty": 1.2}])
    return body | chance.choice([{}] * 9 + [{"regex": "[a"}, {"max_tokens": 99}])


AnyBody = Callable[[random.Random], dict[str, Any]]


async def one_client(
    port: int, chance: random.Random, requests: int, statuses: dict[str, int], bodies: AnyBody
) -> None:
    """Requests one after the other; about a third of them is not waited for to the end."""
    for _ in range(requests):
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        asked = bodies(chance)
        body, path = json.dumps(asked).encode(), b"chat/completions" if "messages" in asked else b"completions"
        head = b"POST /v1/%s HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: %d\r\n\r\n"
        writer.write(head % (path, len(body)) + body)
        patience = chance.choice([None, None, None, None, 0.0, 0.002, 0.02])
        try:
            answer = await asyncio.wait_for(reader.read() if patience is None else reader.read(200), patience)
            if patience is None:
                status = answer.split(b" ", 2)[1].decode()
                if status == "200" and b"text/event-stream" in answer:
                    assert answer.rstrip().endswith((b"[DONE]", b"0")), answer
                statuses[status] = statuses.get(status, 0) + 1
                await asyncio.sleep(0.02 if status == "429" else 0)
        except TimeoutError:
            statuses["left"] = statuses.get("left", 0) + 1
        if patience is not None and chance.random() < 0.5:
            writer.transport.abort()  # a reset, not a goodbye
        writer.close()


def engine_of_tokens(*, overlap: bool) -> Engine:
    model = random_decoder(tiny(num_layers=1, max_seq_len=40))
    return Engine(model, replace(PRESSED, overlap=overlap), tokenizer=None)


def soak(engine: Engine, requests: int, clients: int, *, seed: int, bodies: AnyBody = any_body) -> None:
    statuses: dict[str, int] = {}
    with serving(engine, ServeConfig(max_queue=30)) as server:
        port = int(server.url.rsplit(":", 1)[1])

        async def all_clients() -> None:
            each = requests // clients
            await asyncio.gather(
                *(one_client(port, random.Random(f"{seed}/{c}"), each, statuses, bodies) for c in range(clients))
            )

        asyncio.run(all_clients())
        _check_that_nothing_is_left(server)
    assert statuses["200"] > requests / 10
    assert {"400", "left"} <= statuses.keys() <= {"200", "400", "429", "left"}
    assert engine.counts.swapped + engine.counts.recomputed > 0


def _check_that_nothing_is_left(server: Running) -> None:
    """`serving` looks at the engine's blocks itself when the server has ended; this is before."""
    engine = server.engine
    quiet = 0  # looks in a row: the last clients left before their requests were read
    for _ in range(400):
        quiet = quiet + 1 if engine.num_unfinished == 0 and server.metric("lattice_sequences_running") == 0 else 0
        if quiet == 10:
            break
        time.sleep(0.01)
    assert engine.num_unfinished == 0
    assert engine.blocks.num_free == engine.blocks.num_blocks
    assert len(engine.blocks._free_host) == engine.config.host_blocks
    assert server.metric("lattice_sequences_waiting") == server.metric("lattice_sequences_swapped") == 0
    body = {"prompt": [1, 2, 3], "max_tokens": 4}
    assert server.post("/v1/completions", body).json()["usage"]["completion_tokens"] == 4


def test_hundreds_of_requests_leave_nothing_behind() -> None:
    """A block, a place in the queue or a stream that is lost with each client that goes away."""
    soak(engine_of_tokens(overlap=False), 500, 30, seed=0)


@pytest.mark.thorough
@pytest.mark.parametrize("overlap", [False, True])
def test_many_thousand_requests_leave_nothing_behind(overlap: bool) -> None:
    """What happens once in a thousand requests."""
    soak(engine_of_tokens(overlap=overlap), 4000, 60, seed=1)


@pytest.mark.thorough
@pytest.mark.parametrize("overlap", [False, True])
def test_hundreds_of_conversations_that_are_constrained_and_drafted_leave_nothing_behind(overlap: bool) -> None:
    """A grammar's state, a stop string's held-back text or blocks of drafts of whoever goes away in the middle."""
    pytest.importorskip("llguidance")
    tokenizer = text_tokenizer()
    engine = speculating(
        text_model(),
        replace(PRESSED, overlap=overlap, num_blocks=40, max_seq_len=96),
        method="ngram",
        tokenizer=tokenizer,
        eos_ids=[tokenizer.eos_id],
    )
    soak(engine, 400, 20, seed=2, bodies=any_text)
    assert engine.counts.speculation is not None
    assert sum(engine.counts.speculation.drafted) > sum(engine.counts.speculation.accepted) > 0
