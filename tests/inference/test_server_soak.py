"""Thousands of requests of every kind, many of which go away: in the end nothing is left of them."""

from __future__ import annotations

import asyncio
import json
import random
import time
from dataclasses import replace
from typing import Any

import pytest

from inference.config import EngineConfig
from inference.engine import Engine
from inference.server.config import ServeConfig
from tests.inference.serving import Running, serving
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


async def one_client(port: int, chance: random.Random, requests: int, statuses: dict[str, int]) -> None:
    """Requests one after the other; about a third of them is not waited for to the end."""
    for _ in range(requests):
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        body = json.dumps(any_body(chance)).encode()
        head = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: %d\r\n\r\n" % len(
            body
        )
        writer.write(head + body)
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


def soak(requests: int, clients: int, *, seed: int, overlap: bool) -> None:
    model = random_decoder(tiny(num_layers=1, max_seq_len=40))
    engine = Engine(model, replace(PRESSED, overlap=overlap), tokenizer=None)
    statuses: dict[str, int] = {}
    with serving(engine, ServeConfig(max_queue=30)) as server:
        port = int(server.url.rsplit(":", 1)[1])

        async def all_clients() -> None:
            each = requests // clients
            await asyncio.gather(
                *(one_client(port, random.Random(f"{seed}/{c}"), each, statuses) for c in range(clients))
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
    soak(500, 30, seed=0, overlap=False)


@pytest.mark.thorough
@pytest.mark.parametrize("overlap", [False, True])
def test_many_thousand_requests_leave_nothing_behind(overlap: bool) -> None:
    """What happens once in a thousand requests."""
    soak(4000, 60, seed=1, overlap=overlap)
